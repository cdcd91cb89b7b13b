"""The tasks as text: one file per family. Importing this package registers them all."""

from . import brackets, keywords, quotes
from .base import DEFINITIONS, Example, Pair, Split, TaskDefinition

__all__ = [
    "DEFINITIONS",
    "Example",
    "Pair",
    "Split",
    "TaskDefinition",
    "brackets",
    "keywords",
    "quotes",
]
