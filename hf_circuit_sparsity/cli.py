"""`hf-circuit-sparsity <command>`: parses the command line and calls `commands/`.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

import gc
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.metadata import version
from typing import Annotated, Any, NoReturn

from typer import Argument, Context, Exit, Option, Typer
from typer.core import CompletionItem, TyperCommand, TyperGroup

from .commands.console import Interrupted, say
from .commands.memory import keep_freed_memory
from .commands.options import GROUPS, help_of, names_of, options_of


class _Group(TyperGroup):
    """Hands Ctrl-C on to `main`; click would end the process itself."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as interrupt:
            if ctx.invoked_subcommand == "view":
                message = "and nothing was written; the same command begins anew"
            else:
                message = "finished steps are kept; the same command goes on after them"
            raise Interrupted(message) from interrupt


class _ByFields(TyperCommand):
    """A command whose options are the fields of dataclasses; completes these."""

    def shell_complete(self, ctx: Any, incomplete: str) -> list[CompletionItem]:
        given = [name for name in names_of(str(self.name)) if name.startswith(incomplete)]
        return [CompletionItem(name) for name in given] if incomplete.startswith("-") else []


app = Typer(
    cls=_Group, help="Train weight-sparse transformers and cut circuits out of them.",
    no_args_is_help=True, pretty_exceptions_enable=False,
    rich_markup_mode=None,
)  # fmt: skip
# Commands whose options are the fields of dataclasses, which HfArgumentParser reads.
BY_FIELDS: dict[str, Any] = {
    "cls": _ByFields,
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}

TASK = "Built-in task, CSV file, folder, or user/tasks:name on the Hub."
Circuit = Annotated[
    str, Argument(help="Folder of a circuit or run, or Hub id.", show_default=False)
]
Corpus = Annotated[
    str | None, Option(help="Folder of Python files; the standard library if not given.")
]
CircuitModel = Annotated[
    str | None, Option(help="Folder or Hub id of its model; what the circuit says if not given.")
]
CircuitFolder = Annotated[str | None, Option(help="The circuit's folder if not given.")]


def _say_version(asked: bool) -> None:
    if asked:
        say(version("hf-circuit-sparsity"))
        raise Exit


@app.callback()
def options(
    version: Annotated[
        bool, Option("--version", help="Say it and exit.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    """Train weight-sparse transformers and cut circuits out of them."""
    keep_freed_memory()


@app.command()
def quickstart(
    minutes: Annotated[
        float | None, Option(help="Of training; the README's number of steps if not given.")
    ] = None,
    output_dir: Annotated[str, Option(help="Of model and circuit.")] = "runs/quickstart",
    task: Annotated[str, Option(help=TASK)] = "single_double_quote",
    seed: Annotated[int, Option(help="Of everything random.")] = 0,
    corpus: Corpus = None,
) -> None:
    """Train a small sparse model on Python and cut out a circuit."""
    from .commands.quickstart import QuickstartSettings, run_quickstart

    run_quickstart(output_dir, QuickstartSettings(minutes, task, seed, corpus))


@app.command(**BY_FIELDS)
def train(context: Context) -> None:
    """Train a CircuitGPT, or make a pretrained model sparse."""
    _help_if_asked(context)
    from .commands.train import (
        DataArguments,
        ModelArguments,
        PretrainedTrainingArguments,
        run_train,
    )
    from .trainer.sparse_config import SparseTrainingArguments

    pretrained = any(argument.split("=")[0] == "--model" for argument in context.args)
    training = PretrainedTrainingArguments if pretrained else SparseTrainingArguments
    classes = (ModelArguments, DataArguments, training)
    run_train(*_parse(context, classes))


@app.command(**BY_FIELDS)
def bridge(context: Context) -> None:
    """Train a sparse model beside a dense one, joined by bridges."""
    _help_if_asked(context)
    from .bridge.bridge_config import BridgeTrainingArguments
    from .commands.bridge import BridgeModelArguments, run_bridge

    classes = (BridgeModelArguments, BridgeTrainingArguments)
    run_bridge(*_parse(context, classes))


@app.command(**BY_FIELDS)
def prune(context: Context) -> None:
    """Cut a task's circuit out of a trained model."""
    _help_if_asked(context)
    from .circuits.pruning.config import PruningConfig
    from .commands.prune import PruneArguments, run_prune

    run_prune(*_parse(context, (PruneArguments, PruningConfig)))


@app.command()
def verify(
    circuit: Circuit,
    model: CircuitModel = None,
    output_dir: CircuitFolder = None,
    corpus: Corpus = None,
    stability_seeds: Annotated[
        int,
        Option(help="Circuits to find from other seeds, prompts, wordings; 0 for no search."),
    ] = 2,
) -> None:
    """Check a circuit beside random ones of its size."""
    from .commands.verify import run_verify

    run_verify(circuit, model, output_dir, corpus, stability_seeds)


@app.command()
def view(
    circuit: Circuit,
    model: CircuitModel = None,
    output_dir: CircuitFolder = None,
    corpus: Corpus = None,
) -> None:
    """Write the page on which a circuit is looked at."""
    with _no_garbage():
        from .commands.view import run_view

    try:
        run_view(circuit, model, output_dir, corpus)
    finally:
        gc.unfreeze()


@app.command()
def evaluate(
    model: Annotated[str, Option(help="Folder or Hub id, with its tokenizer.")],
    task: Annotated[
        list[str] | None, Option(help=f"{TASK} May be repeated; those on Python if not given.")
    ] = None,
    output_dir: Annotated[str | None, Option(help="The model's folder if not given.")] = None,
    prompts: Annotated[int, Option(help="Per task, an even number.")] = 512,
    seed: Annotated[int, Option(help="Of the prompts.")] = 0,
) -> None:
    """Accuracy and loss of a model on every task."""
    from .commands.evaluate import run_evaluate

    run_evaluate(model, task or None, output_dir, prompts=prompts, seed=seed)


@app.command()
def publish(
    run_dir: Annotated[str, Argument(help="Output folder of quickstart or train.")],
    repo: Annotated[str, Option(help="user/name of the model; other names begin so.")],
    dry_run: Annotated[bool, Option("--dry-run", help="List what would go where.")] = False,
    public: Annotated[bool, Option("--public", help="New repositories are private else.")] = False,
    task: Annotated[
        list[str] | None,
        Option(help=f"To publish: {TASK} May be repeated; the circuits' if not given."),
    ] = None,
    corpus: Corpus = None,
) -> None:
    """Put a run's model, circuits, tasks and viewer on the Hub."""
    from .commands.publish import run_publish

    run_publish(run_dir, repo, dry_run=dry_run, public=public, tasks=task or None, corpus=corpus)


def _help_if_asked(context: Context) -> None:
    """Print the options and exit; before anything heavy is imported."""
    if {"-h", "--help"} & set(context.args):
        say(help_of(str(context.info_name), str(context.command.help)))
        raise Exit


def _parse(context: Context, classes: tuple[type, ...]) -> tuple[Any, ...]:
    """One object of each dataclass, from options named after their fields."""
    from transformers import HfArgumentParser

    command = str(context.info_name)
    parser = HfArgumentParser(
        classes, prog=f"hf-circuit-sparsity {command}", description=context.command.help,
        allow_abbrev=False, add_help=False,
    )  # fmt: skip
    described = {o.name: o.text for group in GROUPS[command] for o in options_of(group)}
    for action in parser._actions:
        if action.const is not False:  # not of --no-cleanup, which --cleanup stands beside
            text = described.get(f"--{action.dest.replace('_', '-')}", "").replace("%", "%%")
            action.help = action.help or text or None
    if "--help-all" in context.args:
        parser.print_help()
        raise Exit
    known = parser._option_string_actions

    def refuse(message: str) -> NoReturn:
        raise ValueError(f"{message}; see hf-circuit-sparsity {command} --help.")

    parser.error = refuse
    for name in (a.split("=")[0] for a in context.args if a.startswith("--") and len(a) > 2):
        if name not in known:
            dashed = [option for option in known if "_" not in option]
            meant = name.replace("_", "-")
            near = [option for option in dashed if option.startswith(meant)]
            near = near or get_close_matches(meant, dashed, n=1)
            refuse(f"There is no option {name}{f' (did you mean {near[0]}?)' if near else ''}")
    *parsed, rest = parser.parse_args_into_dataclasses(
        context.args, return_remaining_strings=True
    )  # fmt: skip
    if rest:
        refuse(f"{' '.join(rest)} was passed, but {command} takes options only")
    return tuple(parsed)


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        with _stopped_by_schedulers():
            app(argv, prog_name="hf-circuit-sparsity")
    except SystemExit as end:
        return int(end.code or 0)
    except Interrupted as interruption:
        say(f"\nStopped, {interruption}.")
        if interruption.checkpoint:
            say(f"To go on: {_resuming(argv)}")
        return 130
    except Exception as error:
        from .commands.hub_advice import hub_advice

        advice = hub_advice(error)
        if advice is None and not isinstance(error, (ValueError, OSError, FloatingPointError)):
            raise
        message = "\n".join(filter(None, (str(error).strip(), advice)))
        print(f"hf-circuit-sparsity: {message}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def _no_garbage() -> Iterator[None]:
    """For imports: they make a million objects, all of which stay. To look through them for
    garbage, again and again, takes two seconds of a command of twelve. They are to be unfrozen."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


@contextmanager
def _stopped_by_schedulers() -> Iterator[None]:
    """Within it SIGTERM, which schedulers send, is Ctrl-C, unless somebody has taken it already.

    So what is begun is cleaned up; a training of ours takes both signals for as long as it runs.
    """
    own = threading.current_thread() is threading.main_thread()
    if not own or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _resuming(argv: list[str]) -> str:
    """The command that goes on after a checkpoint of this one."""
    command = " ".join(["hf-circuit-sparsity", *argv])
    given = any(a.replace("_", "-").startswith("--resume-from-checkpoint") for a in argv)
    if argv[0] in ("train", "bridge") and not given:
        command += " --resume-from-checkpoint last"
    return command


if __name__ == "__main__":
    sys.exit(main())
