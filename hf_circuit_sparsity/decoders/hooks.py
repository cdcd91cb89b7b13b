"""Hooks that run within a block, whatever was made of the model, and then are gone."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.utils.hooks import RemovableHandle


@contextmanager
def temporary_hooks(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Within the block hooks are in place; when it ends, also by an exception, they are removed.

    Code that `torch.compile` made of a model, or of a part of it, does not know hooks that came
    later, so within the block everything runs eagerly.

    Args:
        handles: of the hooks; a generator places them as the block begins.
    """
    placed: list[RemovableHandle] = []
    try:
        placed.extend(handles)
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for handle in placed:
            handle.remove()
