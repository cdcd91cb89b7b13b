"""Places in a model where hooks see activations, and may put others in their place."""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class Site(Protocol):
    """A place where circuits are cut: `width` nodes per token.

    A hook is called as `hook(module, args, activations)` with activations `(B, T, width)`; what it
    returns, unless `None`, takes their place.
    """

    width: int

    def register_forward_hook(self, hook: Callable) -> RemovableHandle: ...


class OutputSite:
    """A [`Site`]: what a module puts out, or some of its columns.

    Args:
        module: its output is a tensor `(B, T, columns)`.
        width: number of nodes.
        columns: the nodes' columns of the output, int64 `(width,)`; `None` is all of them in order.
    """

    def __init__(self, module: nn.Module, width: int, columns: Tensor | None = None):
        self.module, self.width, self.columns = module, width, columns

    def register_forward_hook(self, hook: Callable) -> RemovableHandle:
        def on_columns(module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
            columns = self.columns.to(output.device)
            changed = hook(module, args, output[..., columns])
            return None if changed is None else output.index_copy(-1, columns, changed)

        return self.module.register_forward_hook(hook if self.columns is None else on_columns)


class InputSite:
    """A [`Site`]: what a module reads, its only argument."""

    def __init__(self, module: nn.Module, width: int):
        self.module, self.width = module, width

    def register_forward_hook(self, hook: Callable) -> RemovableHandle:
        def before(module: nn.Module, args: tuple) -> tuple | None:
            changed = hook(module, args, args[0])
            return None if changed is None else (changed, *args[1:])

        return self.module.register_forward_pre_hook(before)


class LogitsSite:
    """The logits, before the loss is computed of them; what a hook returns takes their place."""

    def __init__(self, model: nn.Module):
        self.model = model

    def register_forward_hook(self, hook: Callable) -> "RemovableHandle | _Uncapped":
        config = self.model.config
        cap = getattr(config, "final_logit_softcapping", None)

        def on_logits(module: nn.Module, args: tuple, logits: Tensor) -> Tensor:
            logits = soft_capped(logits, cap)
            changed = hook(module, args, logits)
            return logits if changed is None else changed

        handle = self.model.get_output_embeddings().register_forward_hook(on_logits)
        return handle if cap is None else _Uncapped(handle, config, cap)


class _Uncapped:
    """Takes the place of a model's soft cap, which comes after the module that has the hook."""

    def __init__(self, handle: RemovableHandle, config: Any, cap: float):
        self.handle, self.config, self.cap = handle, config, cap
        config.final_logit_softcapping = None

    def remove(self) -> None:
        self.config.final_logit_softcapping = self.cap
        self.handle.remove()


def soft_capped(logits: Tensor, cap: float | None) -> Tensor:
    """Gemma's bound on logits."""
    return logits if cap is None else torch.tanh(logits / cap) * cap
