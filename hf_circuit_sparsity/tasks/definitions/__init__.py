"""The tasks as text: one file per family. Importing this package registers them all."""

from . import blocks, brackets, calls, conditions, containers, quotes, variables  # noqa: F401
