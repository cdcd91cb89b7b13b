"""Mean ablation: fix nodes of a model at their average over the pretraining distribution.

Gao et al. 2025, section 2.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from ..decoders.decoder import decoder_of
from ..decoders.hooks import temporary_hooks
from ..decoders.sites import Site
from ..optim.sparse_compute import on_nonzeros
from ..tasks.binary_task import BinaryTask
from ..tasks.corpus import build_corpus
from ..tasks.packing import pack_dataset

ReferenceTokens = Dataset | torch.Tensor | None
"""A sample of the pretraining distribution: a column `input_ids` of rows of equal length, or token
ids `(n, length)`; None is the Python standard library."""
TOKENS = "wte"
"""Where masks and means have a place for token embeddings: one node per vocabulary entry, whose
mean is the mean embedding, `(d_model,)`. It is no node site."""


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what `torch.compile`, data parallelism and PEFT put around it."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def node_sites(model: nn.Module) -> dict[str, Site]:
    """The model's node sites by name.

    Raises:
        ValueError: the model's architecture is not described.
    """
    # Where torch.compile was put around a part, its name stands in between.
    sites = decoder_of(unwrapped(model)).node_sites()
    return {name.replace("_orig_mod.", ""): site for name, site in sites.items()}


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in eval mode; then every module is in the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Within the block the model is in eval mode, and its layers multiply only nonzeros where that
    is faster."""
    with in_eval_mode(model), on_nonzeros(model):
        yield


@contextmanager
def at_the_answer(model: nn.Module) -> Iterator[None]:
    """Within the block the last layer computes only what the last position's logits need, as far as
    that can be had; so no hook in it may expect every position."""
    with temporary_hooks(decoder_of(unwrapped(model)).at_last_position()):
        yield


@contextmanager
def hooked_sites(model: nn.Module, hooks: Mapping[str, object]) -> Iterator[None]:
    """Attach forward hooks to node sites (or the token embedding) by name, and take them off."""
    sites = {**node_sites(model), TOKENS: unwrapped(model).get_input_embeddings()}
    with hooked([(sites[name], hook) for name, hook in hooks.items()]):
        yield


@contextmanager
def recorded_sites(model: nn.Module, sites: Iterable[str]) -> Iterator[dict[str, torch.Tensor]]:
    """Yields a dictionary in which every forward pass leaves what the sites put out."""
    recorded: dict[str, torch.Tensor] = {}
    hooks = {s: lambda module, args, output, s=s: recorded.update({s: output}) for s in sites}
    with hooked_sites(model, hooks):
        yield recorded


@contextmanager
def hooked(hooks: list[tuple[nn.Module, Callable]]) -> Iterator[None]:
    """Attach forward hooks to modules, and take them off again."""
    with temporary_hooks(module.register_forward_hook(hook) for module, hook in hooks):
        yield


class ReferenceMeans(NamedTuple):
    """Averages over the pretraining distribution, float32."""

    nodes: dict[str, torch.Tensor]
    """Site → `(width,)`."""
    attended: dict[str, torch.Tensor]
    """Site of values, as `h.0.attn.v` → what attention makes of them, which is what the output
    projection reads: `(inputs of the projection,)`."""
    token: torch.Tensor
    """`(d_model,)`, the mean embedding."""


@torch.no_grad()
def reference_means(
    model: nn.Module, input_ids: torch.Tensor | Sequence[torch.Tensor], batch_size: int = 32
) -> ReferenceMeans:
    """Averages over all tokens of `input_ids`.

    Args:
        model: of an architecture that is described, see `docs/decoders.md`.
        input_ids: `(n, length)` token ids, a sample of the pretraining distribution, unpadded; or
            several such, of different lengths.
        batch_size: sequences per forward pass.
    """
    samples = [input_ids] if isinstance(input_ids, torch.Tensor) else list(input_ids)
    model = unwrapped(model)
    sums: dict[str, dict[str, torch.Tensor]] = {"nodes": {}, "attended": {}, "token": {}}

    def adder(kind: str, name: str) -> Callable:
        def hook(module, args, output):
            activations = args[0] if kind == "attended" else output
            sums[kind][name] = sums[kind].get(name, 0) + activations.double().sum(dim=(0, 1))

        return hook

    hooks = [(site, adder("nodes", name)) for name, site in node_sites(model).items()]
    hooks += [
        (layer.attn_out, adder("attended", f"h.{i}.attn.v"))
        for i, layer in enumerate(decoder_of(model).layers)
    ]
    hooks.append((model.get_input_embeddings(), adder("token", TOKENS)))
    device = next(model.parameters()).device
    with in_eval_mode(model), hooked(hooks):
        for batch in (part for sample in samples for part in sample.split(batch_size)):
            model(batch.to(device), use_cache=False, logits_to_keep=1)
    count = sum(sample.numel() for sample in samples)
    means = {
        kind: {name: (s / count).float() for name, s in by_name.items()}
        for kind, by_name in sums.items()
    }
    return ReferenceMeans(means["nodes"], means["attended"], means["token"][TOKENS])


def task_means(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> ReferenceMeans:
    """Averages over the tokens of a task's prompts; `tensors` are those of `BinaryTask.tensors`."""
    lengths = tensors["attention_mask"].sum(1)
    ids = tensors["input_ids"]
    samples = [ids[lengths == length, -length:] for length in lengths.unique().tolist()]
    return reference_means(model, samples)


def means_over(
    model: nn.Module,
    task: BinaryTask,
    reference: ReferenceTokens | ReferenceMeans,
    tokens: int,
    progress: bool = False,
) -> ReferenceMeans:
    """Means over a sample of the pretraining distribution; those that are passed are returned."""
    if isinstance(reference, ReferenceMeans):
        return reference
    return reference_means(
        model, reference_input_ids(model, task.tokenizer, reference, tokens, progress)
    )


def reference_input_ids(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    reference: ReferenceTokens,
    tokens: int,
    progress: bool = False,
    files: int | None = None,
) -> torch.Tensor:
    """Token ids `(n, length)` of about `tokens` tokens, n ≥ 1.

    Args:
        model: its context bounds the length where `reference` is `None`.
        tokenizer: used where `reference` is `None`.
        reference: rows of equal length; `None` takes the Python standard library, tokenized.
        tokens: how many, roughly.
        progress: say so, in one line, when the standard library is taken.
        files: so many files of the standard library, the same ones each time, are tokenized in
            place of all of them: a tenth of the files takes a tenth of the time.
    """
    if isinstance(reference, torch.Tensor):
        if reference.dim() != 2 or not len(reference):
            raise ValueError(
                f"reference of shape {tuple(reference.shape)} was passed, expected token ids of "
                "shape (n, length) with n ≥ 1."
            )
        return reference[: max(1, tokens // reference.shape[1])]
    if reference is None:
        if progress:
            tqdm.write("No reference was passed: tokenizing the Python standard library.")
        block_size = min(256, model.config.max_position_embeddings)
        library = build_corpus()["train"]
        if files is not None and files < len(library):
            library = library.select(sorted(random.Random(0).sample(range(len(library)), files)))
        reference = pack_dataset(library, tokenizer, block_size)
    if "input_ids" not in reference.column_names or not len(reference):
        raise ValueError(
            f"reference has the columns {reference.column_names} and {len(reference)} rows, "
            "expected at least one row and the column input_ids."
        )
    length = len(reference[0]["input_ids"])
    count = min(len(reference), max(1, tokens // length))
    # Spread over the whole set: neighbouring blocks come from the same file.
    rows = torch.linspace(0, len(reference) - 1, count).long().tolist()
    return torch.tensor(reference.select(rows)["input_ids"][:])


def mean_activations(
    model: nn.Module, input_ids: torch.Tensor, batch_size: int = 32
) -> dict[str, torch.Tensor]:
    """Average activation of every node over all tokens of `input_ids`: site → float32 `(width,)`.

    The arguments are those of [`reference_means`].
    """
    return reference_means(model, input_ids, batch_size).nodes


def ablation_hook(keep: torch.Tensor, mean: torch.Tensor, tokens: bool = False) -> Callable:
    """A forward hook that lets the kept nodes through and fixes the others at their mean.

    Args:
        keep: bool `(width,)`, or `(vocab_size,)` for tokens.
        mean: `(width,)`.
        tokens: the hook is for the token embedding.
    """

    def hook(module, args, output):
        mask = keep.to(output.device)
        mask = mask[args[0]].unsqueeze(-1) if tokens else mask
        return torch.where(mask, output, mean.to(output))

    return hook


@contextmanager
def mean_ablated(
    model: nn.Module, keep: Mapping[str, torch.Tensor], means: Mapping[str, torch.Tensor]
) -> Iterator[None]:
    """Within the block, every node not marked in `keep` is fixed at its mean.

    Args:
        model: of an architecture that is described, see `docs/decoders.md`.
        keep: site → bool `(width,)`, and optionally `TOKENS` → bool `(vocab_size,)`; sites that
            are not named run untouched.
        means: site → `(width,)`, and `TOKENS` → `(d_model,)`, from [`reference_means`].
    """
    hooks = {
        name: ablation_hook(mask, means[name], tokens=name == TOKENS) for name, mask in keep.items()
    }
    with hooked_sites(model, hooks):
        yield
