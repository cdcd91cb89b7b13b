"""The tasks as text: one file per family. Importing this package registers them all."""

from . import (  # noqa: F401
    blocks,
    brackets,
    calls,
    conditions,
    containers,
    english,
    quotes,
    variables,
)
