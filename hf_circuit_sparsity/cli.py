"""`hf-circuit-sparsity <command>`: parses the command line and calls `commands/`.

Nothing heavy is imported before a command runs, so that `--help` answers at once.
"""

import ast
import inspect
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Annotated, Any

from typer import Argument, Context, Option, Typer
from typer.core import TyperGroup

from .commands.console import Interrupted, say


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


app = Typer(
    cls=_Group, help="Train weight-sparse transformers and cut circuits out of them.",
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
    rich_markup_mode=None,
)  # fmt: skip
# Commands whose options are the fields of dataclasses, which HfArgumentParser reads.
BY_FIELDS = {
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


@app.command()
def quickstart(
    minutes: Annotated[
        float | None, Option(help="Of training; the 2,500 steps of the README if not given.")
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
    """Train a model; see train --help."""
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
    run_train(*_parse(context, classes, "Train a CircuitGPT, or make a pretrained model sparse."))


@app.command(**BY_FIELDS)
def bridge(context: Context) -> None:
    """Train a sparse model beside a dense one, joined by bridges; see bridge --help."""
    from .bridge.bridge_config import BridgeTrainingArguments
    from .commands.bridge import BridgeModelArguments, run_bridge

    classes = (BridgeModelArguments, BridgeTrainingArguments)
    run_bridge(*_parse(context, classes, "Train a sparse model beside a dense one."))


@app.command(**BY_FIELDS)
def prune(context: Context) -> None:
    """Cut a task's circuit out of a trained model; see prune --help."""
    from .circuits.pruning.config import PruningConfig
    from .commands.prune import PruneArguments, run_prune

    run_prune(*_parse(context, (PruneArguments, PruningConfig), "Cut out the circuit of a task."))


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
    from .commands.view import run_view

    run_view(circuit, model, output_dir, corpus)


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


def _parse(context: Context, classes: tuple[type, ...], description: str) -> tuple[Any, ...]:
    """One object of each dataclass, from options named after their fields."""
    from transformers import HfArgumentParser

    program = f"hf-circuit-sparsity {context.info_name}"
    parser = HfArgumentParser(classes, prog=program, description=description)
    described = {name: text for cls in classes for name, text in field_docs(cls).items()}
    for action in parser._actions:
        if action.const is not False:  # not of --no-cleanup, which --cleanup stands beside
            action.help = action.help or described.get(action.dest)
    return parser.parse_args_into_dataclasses(context.args)


def field_docs(cls: type) -> dict[str, str]:
    """The string below each field of a dataclass, as argparse takes help."""
    (definition,) = ast.parse(inspect.getsource(cls)).body
    return {
        field.target.id: " ".join(below.value.value.split()).replace("%", "%%")
        for field, below in pairwise(definition.body)
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr)
    }


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
