"""The tasks as text: one file per family. Importing this package registers them all."""

from . import blocks, brackets, calls, conditions, containers, keywords, quotes, variables
from .base import DEFINITIONS, Example, Pair, Split, TaskDefinition

__all__ = [
    "DEFINITIONS",
    "Example",
    "Pair",
    "Split",
    "TaskDefinition",
    "blocks",
    "brackets",
    "calls",
    "conditions",
    "containers",
    "keywords",
    "quotes",
    "variables",
]
