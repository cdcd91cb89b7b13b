"""`hf-circuit-sparsity <command>`: parses the command line and calls `commands/`."""

import argparse
import sys
from dataclasses import fields
from pathlib import Path

from transformers import HfArgumentParser

from .bridge.bridge_config import BridgeTrainingArguments
from .circuits.pruning.config import PruningConfig
from .commands.bridge import BridgeModelArguments, print_bridge_summary, run_bridge
from .commands.console import say
from .commands.evaluate import run_evaluate
from .commands.prune import print_prune_summary, run_prune
from .commands.publish import run_publish
from .commands.quickstart import QuickstartSettings, run_quickstart
from .commands.train import (
    DataArguments,
    Interrupted,
    ModelArguments,
    print_train_summary,
    run_train,
)
from .commands.view import print_view_summary, run_view
from .tasks.load import list_tasks
from .trainer.sparse_config import SparseTrainingArguments

PRUNING_OPTIONS = (
    "target_loss", "max_steps", "batch_size", "node_penalty", "learning_rate", "seed", "num_seeds"
)  # fmt: skip
PRUNING_SWITCHES = {
    "prune_edges": "also drop single weights between the nodes",
    "token_nodes": "also ask which tokens' embeddings are needed",
}


def build_parser() -> argparse.ArgumentParser:
    """The parser of everything but `train` and `bridge`, whose options are training arguments."""
    parser = argparse.ArgumentParser(
        prog="hf-circuit-sparsity",
        description="Train weight-sparse transformers and cut circuits out of them.",
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    quick = commands.add_parser(
        "quickstart", help="train a small sparse model on Python and cut out a circuit"
    )
    defaults = QuickstartSettings()
    quick.add_argument(
        "--minutes", type=float, help="of training (default: the 2,500 steps of the README)"
    )
    quick.add_argument("--output-dir", default="runs/quickstart", help="(default: %(default)s)")
    quick.add_argument(
        "--task", default=defaults.task, choices=list_tasks(), help="(default: %(default)s)"
    )
    quick.add_argument("--seed", type=int, default=defaults.seed, help="(default: %(default)s)")
    quick.add_argument("--corpus", help="folder of Python files (default: the standard library)")

    # Listed for --help only; its arguments go to HfArgumentParser as they are.
    commands.add_parser("train", help="train a model; see train --help", add_help=False)

    commands.add_parser(
        "bridge", help="train a sparse twin for a dense model; see bridge --help", add_help=False
    )

    prune = commands.add_parser("prune", help="cut a task's circuit out of a trained model")
    prune.add_argument("model", help="folder or Hub id of a model with its tokenizer")
    prune.add_argument("--task", required=True, choices=list_tasks())
    prune.add_argument("--output-dir", help="(default: MODEL/circuits/TASK)")
    prune.add_argument("--corpus", help="folder of Python for the means (the standard library)")
    for option in fields(PruningConfig):
        if option.name in PRUNING_OPTIONS:
            prune.add_argument(
                f"--{option.name.replace('_', '-')}",
                type=option.type,
                default=option.default,
                help="(default: %(default)s)",
            )

    for name, text in PRUNING_SWITCHES.items():
        prune.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=text)
    prune.add_argument(
        "--trials",
        type=int,
        default=1,
        help="search so many settings for the smallest circuit; the same command goes on after "
        "Ctrl-C (default: %(default)s, no search)",
    )
    prune.add_argument(
        "--verify", action="store_true", help="check the circuit beside random ones of its size"
    )

    view = commands.add_parser("view", help="write the page on which a circuit is looked at")
    view.add_argument("circuit", help="folder or Hub id of a circuit")
    view.add_argument("--model", help="folder or Hub id of its model (default: as it says itself)")
    view.add_argument("--output", help="the page (default: CIRCUIT/index.html)")
    view.add_argument("--corpus", help="folder of Python for examples (the standard library)")

    evaluate = commands.add_parser("evaluate", help="accuracy and loss of a model on every task")
    evaluate.add_argument("--model", required=True, help="folder or Hub id, with its tokenizer")
    evaluate.add_argument(
        "--task", action="append", choices=list_tasks(), help="may be repeated (default: all)"
    )
    evaluate.add_argument("--output", help="JSON file (default: MODEL/task_evaluation.json)")
    evaluate.add_argument(
        "--prompts", type=int, default=512, help="per task, an even number (default: %(default)s)"
    )
    evaluate.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")

    publish = commands.add_parser(
        "publish", help="put a run's model, circuits, tasks and viewer on the Hub"
    )
    publish.add_argument("run_dir", help="output folder of quickstart or train")
    publish.add_argument("--repo", required=True, help="user/name of the model on the Hub")
    publish.add_argument(
        "--dry-run", action="store_true", help="list what would go where, and its size"
    )
    publish.add_argument("--public", action="store_true", help="(default: private)")
    publish.add_argument(
        "--task",
        action="append",
        choices=list_tasks(),
        metavar="TASK",
        help="to publish as a dataset; may be repeated (default: those of the circuits)",
    )
    publish.add_argument("--corpus", help="folder of Python for the viewer's examples")

    return parser


def _quickstart(args: argparse.Namespace) -> None:
    settings = QuickstartSettings(args.minutes, args.task, args.seed, args.corpus)
    run_quickstart(args.output_dir, settings)


def _train(argv: list[str]) -> None:
    parser = HfArgumentParser(
        (ModelArguments, DataArguments, SparseTrainingArguments),
        prog="hf-circuit-sparsity train",
        description="Train a CircuitGPT. Beside the options of every TrainingArguments:",
    )
    print_train_summary(run_train(*parser.parse_args_into_dataclasses(argv)))


def _bridge(argv: list[str]) -> None:
    parser = HfArgumentParser(
        (BridgeModelArguments, BridgeTrainingArguments),
        prog="hf-circuit-sparsity bridge",
        description="Train a sparse twin for a dense model. Beside the options of `train`:",
    )
    print_bridge_summary(run_bridge(*parser.parse_args_into_dataclasses(argv)))


def _prune(args: argparse.Namespace) -> None:
    names = (*PRUNING_OPTIONS, *PRUNING_SWITCHES)
    config = PruningConfig(**{name: getattr(args, name) for name in names})
    circuit = run_prune(
        args.model, args.task, args.output_dir, config, args.corpus, args.trials, args.verify
    )
    folder = args.output_dir or Path(args.model) / "circuits" / args.task
    print_prune_summary(circuit, Path(folder))


def _view(args: argparse.Namespace) -> None:
    print_view_summary(run_view(args.circuit, args.model, args.output, args.corpus))


def _evaluate(args: argparse.Namespace) -> None:
    run_evaluate(args.model, args.task, args.output, prompts=args.prompts, seed=args.seed)


def _publish(args: argparse.Namespace) -> None:
    run_publish(
        args.run_dir,
        args.repo,
        dry_run=args.dry_run,
        public=args.public,
        tasks=args.task,
        corpus=args.corpus,
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["train"]:
            _train(argv[1:])
        elif argv[:1] == ["bridge"]:
            _bridge(argv[1:])
        else:
            args = build_parser().parse_args(argv)
            run = {
                "quickstart": _quickstart,
                "prune": _prune,
                "view": _view,
                "evaluate": _evaluate,
                "publish": _publish,
            }
            run[args.command](args)
    except Interrupted as interruption:
        say(f"\n{str(interruption).capitalize()}; the checkpoint is saved.")
        command = " ".join(["hf-circuit-sparsity", *argv])
        if argv[0] in ("train", "bridge") and "--resume_from_checkpoint" not in argv:
            command += " --resume_from_checkpoint last"
        say(f"To go on: {command}")
        return 130
    except KeyboardInterrupt:
        if argv[:1] == ["view"]:
            say("\nStopped, and nothing was written. The same command begins anew.")
            return 130
        say("\nStopped. Finished steps are kept; the same command goes on after them.")
        return 130
    except (ValueError, OSError) as error:
        print(f"hf-circuit-sparsity: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
