"""The options of commands that are fields of dataclasses, read from the source.

So a command's `--help` and the completion of its options come without importing what the command
needs, which takes seconds.
"""

import ast
import shutil
import textwrap
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from ..docstrings import documented

_PACKAGE = Path(__file__).parents[1]


class Option(NamedTuple):
    """One field of a dataclass, as an option."""

    name: str
    """With dashes, as `--d-model`."""
    default: str | None
    """As it is written in the source; None where the option must be given."""
    text: str
    """What it is, in one line."""


class Group(NamedTuple):
    """Options that stand together."""

    title: str
    source: str
    """File and class, as `commands/train.py:ModelArguments`."""
    only: tuple[str, ...] = ()
    """Names of fields; all if empty."""
    without: tuple[str, ...] = ()
    """Names of fields that are left out."""


# Of transformers' hundred and more, those that a run is most often given.
_RUN = {
    "output_dir": "Where model, tokenizer and checkpoints go.",
    "max_steps": "Optimizer steps; in place of epochs.",
    "num_train_epochs": "Passes through the data.",
    "per_device_train_batch_size": "Sequences per step and process.",
    "gradient_accumulation_steps": "Batches per optimizer step.",
    "learning_rate": "Peak; 1e-2, or 3e-4 where train has --model.",
    "lr_scheduler_type": "Its course: linear, cosine, constant, ...",
    "seed": "Of everything random.",
    "bf16": "Compute in bfloat16.",
    "use_cpu": "Even where there is a GPU.",
    "logging_steps": "Steps between lines of the log.",
    "save_steps": "Steps between checkpoints.",
    "resume_from_checkpoint": "Folder of a checkpoint, or last.",
    "report_to": "Trackers: wandb, tensorboard, ..., or none.",
}
_SPARSITY = Group(
    "Sparsity", "trainer/sparse_config.py:SparseTrainingArguments",
    without=("rcd_config", "learning_rate", "warmup_steps", "weight_decay", "adam_beta2",
             "adam_epsilon", "max_grad_norm"),
)  # fmt: skip
_RCD = Group("RCD", _SPARSITY.source, only=("rcd_config",))
GROUPS: dict[str, tuple[Group, ...]] = {
    "train": (
        Group("Model", "commands/train.py:ModelArguments"),
        Group("Data", "commands/train.py:DataArguments"),
        _SPARSITY,
        _RCD,
    ),
    "bridge": (
        Group("Models", "commands/bridge.py:BridgeModelArguments"),
        Group("Bridge", "bridge/bridge_config.py:BridgeTrainingArguments"),
        _SPARSITY,
        _RCD,
    ),
    "prune": (
        Group("Task", "commands/prune.py:PruneArguments"),
        Group("Search", "circuits/pruning/config.py:PruningConfig"),
    ),
}
"""By command; those that train have the group Run as well."""


def options_of(group: Group) -> list[Option]:
    """The options of a group, in the order of the source."""
    file, _, name = group.source.partition(":")
    tree = ast.parse((_PACKAGE / file).read_text(encoding="utf-8"))
    (cls,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    above = documented(ast.get_docstring(cls, clean=False) or "")
    below = {
        field.target.id: str(text.value.value)
        for field, text in pairwise(cls.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }  # fmt: skip
    found = []
    for field in cls.body:
        if not isinstance(field, ast.AnnAssign) or not isinstance(field.target, ast.Name):
            continue
        name = field.target.id
        if name in group.without or (group.only and name not in group.only):
            continue
        default = None if field.value is None else ast.unparse(field.value)
        text = " ".join((below.get(name) or above.get(name, "")).replace("`", "").split())
        found.append(Option(_dashes(name), default, text))
    return found


def names_of(command: str) -> list[str]:
    """The options of a command that are listed by its help."""
    names = [option.name for group in GROUPS[command] for option in options_of(group)]
    return [*names, *(map(_dashes, _RUN) if command != "prune" else ()), "--help", "--help-all"]


def help_of(command: str, description: str) -> str:
    """A command's help, on one screen."""
    parts = [(group.title, options_of(group)) for group in GROUPS[command]]
    more = ""
    if command != "prune":
        parts.append(("Run", [Option(_dashes(n), "None", text) for n, text in _RUN.items()]))
        more = ", and every other option of transformers' TrainingArguments"
    width = max(len(option.name) for _, options in parts for option in options)
    columns = shutil.get_terminal_size((100, 24)).columns
    lines = [f"Usage: hf-circuit-sparsity {command} [OPTIONS]", "", f"  {description}"]
    for title, options in parts:
        lines += ["", f"{title}:"]
        lines += [f"  {o.name:<{width}}  {_line(o, columns - width - 5)}" for o in options]
    return "\n".join([*lines, "", f"  --help-all  These in full{more}."])


def _line(option: Option, room: int) -> str:
    default = option.default
    ending = " (required)" if default is None else f" [{default}]"
    if default in ("None", "False", "''"):
        ending = ""
    text = option.text[:1].upper() + option.text[1:]
    return textwrap.shorten(text, max(20, room - len(ending)), placeholder=" …") + ending


def _dashes(name: str) -> str:
    return f"--{name.replace('_', '-')}"
