"""Checkpoints that hold only the nonzeros.

A matrix `NAME` with few nonzeros is stored as three tensors: `NAME.values`, in the matrix's dtype,
row by row; `NAME.columns`, the column of each; and `NAME.row_counts`, how many each row has. The
integers are of 1, 2 or 4 bytes, whichever the matrix's width allows. Everything else, and a matrix
that this would not make smaller, is stored as it is. So at 1 nonzero in 1000 an entry costs about
6 bytes where the dense file spends 4000.
"""

import os
import re
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.utils import cached_file

from .csr import CSR
from .sparse_layers import SparseWeight, dense_layer, replace_module, sparse_layer
from .validation import FLOAT_DTYPES, ArtifactError, read_tensors, tensor_shapes

VALUES, COLUMNS, ROW_COUNTS = ".values", ".columns", ".row_counts"
PARTS = (VALUES, COLUMNS, ROW_COUNTS)
# What `cached_file` needs in order to find a file as `from_pretrained` would.
_HUB_OPTIONS = (
    "cache_dir",
    "force_download",
    "proxies",
    "token",
    "revision",
    "local_files_only",
    "subfolder",
)
_UNSIGNED = (np.uint8, np.uint16, np.uint32)
_INTEGERS = (torch.uint8, torch.uint16, torch.uint32, torch.int32, torch.int64)


def hub_options(options: dict[str, Any]) -> dict[str, Any]:
    """Those of the keyword arguments of `from_pretrained` that say where files are."""
    return {name: options[name] for name in _HUB_OPTIONS if options.get(name) is not None}


def weights_file(source: str | os.PathLike | None, options: dict[str, Any]) -> str | None:
    """The safetensors file with the weights at `source` (folder or Hub id), if it is one file.

    Args:
        options: the keyword arguments of `from_pretrained`.
    """
    if source is None or options.get("use_safetensors") is False:
        return None
    variant = options.get("variant")
    return cached_file(
        source,
        f"model.{variant}.safetensors" if variant else "model.safetensors",
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub_options(options),
    )


def holds_nonzeros(path: str) -> bool:
    """Whether a safetensors file is in the layout above.

    Raises:
        ArtifactError: its header is damaged.
    """
    return any(name.endswith(PARTS) for name in tensor_shapes(path))


def commit_hash(path: str | None) -> str | None:
    """The commit that a file of the Hub's cache is of; None for any other file."""
    found = re.search(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]", path or "")
    return found[1] if found else None


@torch.no_grad()
def encoded_state_dict(
    model: nn.Module, state_dict: dict[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """The weights in the layout above, on the CPU; layers run sparsely are never made dense.

    Args:
        state_dict: what to encode instead of the model's own weights.
    """
    encoded: dict[str, torch.Tensor] = {}
    if state_dict is not None:
        for name, tensor in state_dict.items():
            encoded.update(_encoded(name, tensor))
        return encoded
    written: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, SparseWeight):
            if id(module.values) not in written:  # tied layers are written once, as ever
                written.add(id(module.values))
                encoded.update(_packed(f"{name}.weight", module.csr))
            own = {f"{name}.bias": module.bias} if getattr(module, "bias", None) is not None else {}
        else:
            own = {}
            module._save_to_state_dict(own, f"{name}." if name else "", True)
        for key, tensor in own.items():
            if id(tensor) not in written:
                written.add(id(tensor))
                encoded.update(_encoded(key, tensor.detach()))
    return encoded


def _encoded(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    tensor = tensor.detach()
    if tensor.dim() == 2 and tensor.is_floating_point() and tensor.numel():
        width = tensor.shape[1]
        index = _smallest_unsigned(width).itemsize
        size = int(torch.count_nonzero(tensor)) * (tensor.element_size() + index)
        if size + len(tensor) * index < tensor.numel() * tensor.element_size():
            return _packed(name, CSR.from_dense(tensor))
    return {name: tensor.cpu().contiguous()}


def _packed(name: str, csr: CSR) -> dict[str, torch.Tensor]:
    counts, width = csr.row_starts.cpu().diff().numpy(), csr.shape[1]
    largest = int(counts.max(initial=0))
    return {
        name + VALUES: csr.values.detach().cpu().contiguous(),
        name + COLUMNS: torch.from_numpy(
            csr.columns.cpu().numpy().astype(_smallest_unsigned(width))
        ),
        name + ROW_COUNTS: torch.from_numpy(counts.astype(_smallest_unsigned(largest + 1))),
    }


def _smallest_unsigned(count: int) -> np.dtype:
    """The smallest integers that tell `count` numbers apart."""
    return next(np.dtype(t) for t in _UNSIGNED if count <= np.iinfo(t).max + 1)


def unpack(path: str, name: str, parts: dict[str, torch.Tensor], shape: tuple[int, ...]) -> CSR:
    """A stored matrix.

    Args:
        path, name: of the file and of the matrix, for the error.
        parts: its three tensors by their endings.
        shape: rows and width that the model expects.

    Raises:
        ArtifactError: a part is missing, of another dtype, or of another length than the others
            say, or columns are out of range, out of order or repeated.
    """

    def refusal(what: str) -> ArtifactError:
        return ArtifactError(
            path,
            f": the sparse tensor {name!r} {what}; the file is damaged, fetch or save it again.",
        )

    if len(shape) != 2:
        raise refusal(f"is stored by its nonzeros, but the model needs the shape {shape}")
    rows, width = shape
    for ending in PARTS:
        part = parts.get(ending)
        if part is None:
            raise refusal(f"lacks {name}{ending}")
        if part.dim() != 1 or part.dtype not in (FLOAT_DTYPES if ending == VALUES else _INTEGERS):
            kind = f"{str(part.dtype).removeprefix('torch.')} of shape {tuple(part.shape)}"
            wanted = "floats" if ending == VALUES else "integers"
            raise refusal(f"{name}{ending} is {kind}, expected {wanted}, flat")
    values = parts[VALUES]
    counts = parts[ROW_COUNTS].numpy().astype(np.int64)
    columns = parts[COLUMNS].numpy().astype(np.int64)
    if counts.size != rows:
        raise refusal(f"counts {counts.size} rows, the model has {rows}")
    if counts.min(initial=0) < 0 or not counts.sum() == columns.size == len(values):
        raise refusal(
            f"counts {counts.sum()} nonzeros but lists {columns.size} columns and "
            f"{len(values)} values"
        )
    if columns.size and not (columns.min() >= 0 and columns.max() < width):
        wrong = columns[(columns < 0) | (columns >= width)][0]
        raise refusal(f"lists column {wrong}, the matrix has {width}")
    # One number per entry that must grow throughout: it repeats or falls where columns do.
    flat = np.repeat(np.arange(rows), counts) * width + columns
    steps = np.diff(flat)
    if steps.size and steps.min() <= 0:
        row = int(flat[1 + int(steps.argmin())] // width)
        what = "twice the same column" if steps.min() == 0 else "columns out of order"
        raise refusal(f"lists {what} in row {row}")
    row_starts = torch.zeros(rows + 1, dtype=torch.int32)
    row_starts[1:] = torch.from_numpy(counts.cumsum())
    return CSR(row_starts, torch.from_numpy(columns.astype(np.int32)), values, width)


def fill_from_sparse_file(
    model: nn.Module, path: str, dtype: torch.dtype | None, max_density: float
) -> nn.Module:
    """Give a model built on the meta device its weights, never making a sparse layer dense.

    Linear layers and embeddings stored by their nonzeros are replaced by layers that run on them,
    unless they have a larger share of nonzeros than `max_density`.

    Args:
        dtype: what floats are converted to; None leaves them as stored.

    Raises:
        ArtifactError: a tensor is damaged, lacking, surplus, or of another dtype or shape than the
            model's.
    """
    modules = dict(model.named_modules())
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    prefix = f"{model.base_model_prefix}."
    # A body without its head is filled from the file of the whole.
    is_body = not any(name.startswith(prefix) for name in expected)
    stored = _read(path)
    if is_body and any(name.startswith(prefix) for name in stored):
        stored = {n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)}
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    dense: dict[str, torch.Tensor] = {}
    for name, tensor in stored.items():
        if name not in expected:
            raise ArtifactError(
                path, f" has {name[:200]!r}, which this config's model does not have."
            )
        if isinstance(tensor, torch.Tensor):
            if tuple(tensor.shape) != expected[name]:
                raise ArtifactError(
                    path,
                    f" has {name!r} of shape {tuple(tensor.shape)}, but this config needs "
                    f"{expected[name]}.",
                )
            if tensor.dtype not in FLOAT_DTYPES:
                kind = str(tensor.dtype).removeprefix("torch.")
                raise ArtifactError(path, f" has {name!r} of dtype {kind}, expected floats.")
            dense[name] = tensor.to(dtype)
            continue
        shape = expected[name]
        csr = unpack(path, name, tensor, shape)
        csr = csr.with_values(nn.Parameter(csr.values.to(dtype)))
        owner = name.removesuffix(".weight")
        shared: dict[int, nn.Parameter] = {}  # per stored matrix: later ones may reuse its id
        for target in (owner, *(t.removesuffix(".weight") for t, s in tied.items() if s == name)):
            module = modules.get(target)
            if type(module) not in (nn.Embedding, nn.Linear):
                dense[name] = csr.to_dense().detach()  # as the bigram table, which is no layer
                continue
            layer = sparse_layer(module, csr)
            layer.values.requires_grad_(module.weight.requires_grad)
            dense_enough = len(csr) > max_density * shape[0] * shape[1]
            replace_module(model, target, dense_layer(layer, shared) if dense_enough else layer)
    _assign(model, dense, set(stored), expected, tied, path)
    return model


def _read(path: str) -> dict[str, torch.Tensor | dict[str, torch.Tensor]]:
    """All tensors of a file; those of one stored matrix together under its name."""
    whole: dict[str, torch.Tensor] = {}
    parts: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in read_tensors(path).items():
        owner, _, ending = name.rpartition(".")
        if f".{ending}" in PARTS:
            parts.setdefault(owner, {})[f".{ending}"] = tensor
        else:
            whole[name] = tensor
    for name in whole.keys() & parts.keys():
        raise ArtifactError(path, f" has {name[:200]!r} both whole and by its nonzeros.")
    return {**whole, **parts}


def _assign(
    model: nn.Module,
    dense: dict[str, torch.Tensor],
    stored: set[str],
    expected: dict[str, tuple[int, ...]],
    tied: dict[str, str],
    path: str,
) -> None:
    """Put the dense tensors in place of the model's meta tensors."""
    for target, source in tied.items():
        if target in expected and target not in stored and source in stored:
            stored = stored | {target}
            if source in dense:
                dense[target] = dense[source]
    for name in expected:
        if name not in stored:
            raise ArtifactError(path, f" lacks {name!r}, which this config's model needs.")
    placed: dict[int, nn.Parameter] = {}
    for name, tensor in dense.items():
        owner, _, attribute = name.rpartition(".")
        module = model.get_submodule(owner)
        if attribute in module._buffers:
            module._buffers[attribute] = tensor
            continue
        old = module._parameters[attribute]
        if id(tensor) not in placed:
            placed[id(tensor)] = nn.Parameter(tensor, requires_grad=old.requires_grad)
        module._parameters[attribute] = placed[id(tensor)]
