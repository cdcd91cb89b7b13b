"""Checkpoints that hold only the nonzeros, and the model class that reads and writes them.

A matrix `NAME` with few nonzeros is stored as three tensors: `NAME.values`, in the matrix's dtype,
row by row; `NAME.columns`, the column of each; and `NAME.row_counts`, how many each row has. The
integers are of 1, 2 or 4 bytes, whichever the matrix's width allows. Everything else, and a matrix
that this would not make smaller, is stored as it is.
"""

import importlib.util
import os
import re
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel, _load_parameter_into_model
from transformers.utils import CONFIG_NAME
from transformers.utils.loading_report import LoadStateDictInfo

from .configuration_circuitgpt import FLOAT_DTYPES, REPRODUCTION, ArtifactError
from .csr import CSR
from .sparse_layers import (
    MAX_DENSITY,
    SPARSE_LAYERS,
    SparseWeight,
    run_on_nonzeros,
    sparse_layers,
    to_dense,
    to_sparse,
)

try:  # not there beside a copy of this file that came from the Hub with a model
    _files = importlib.import_module("..files", __package__)
except ImportError:
    _files = None
PARTS = VALUES, COLUMNS, ROW_COUNTS = ".values", ".columns", ".row_counts"
_AS_NONZEROS = ContextVar("from_pretrained(sparse=True)", default=False)
_INTEGERS = (torch.uint8, torch.uint16, torch.uint32, torch.int32, torch.int64)
_DTYPES = {"floats": FLOAT_DTYPES, "integers": _INTEGERS}
_DAMAGED = "copy or download it again"
# What safetensors and PyTorch are seen to raise on damaged headers and unknown dtypes.
TENSOR_ERRORS = (
    SafetensorError, OSError, RuntimeError, ValueError, TypeError, KeyError, AttributeError,
    OverflowError,
)  # fmt: skip


class SparsePreTrainedModel(PreTrainedModel):
    """Adds `to_sparse` / `to_dense`, and `sparse=True` to saving and loading."""

    _saves_sparse = False  # what `save_pretrained` does if not told

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, sparse: bool = False, **kwargs):
        """As every `from_pretrained`, from dense weights, sparse ones and OpenAI's Hub layout.

        `config._commit_hash` names the commit of a model from the Hub whose weights are one file.

        Args:
            sparse: return the model as `to_sparse()` leaves it; not over several devices, and not
                quantized. From sparse weights this never allocates a dense matrix.

        Raises:
            ValueError: a sparse tensor is damaged, or weights do not fit the config.
        """
        if sparse and kwargs.get("quantization_config") is not None:
            raise ValueError("quantization_config and sparse=True were passed; pass only one.")
        kwargs.setdefault("key_mapping", {r"^circuit_model\.": ""})  # OpenAI's names of weights
        asked = _AS_NONZEROS.set(sparse)
        try:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        finally:
            _AS_NONZEROS.reset(asked)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        model._weight_conversions = None  # save in our own layout, whichever was read
        nonzeros = model.__dict__.pop("_nonzeros", None)
        if nonzeros is not None:
            device = next(p.device for p in model.parameters() if p.device.type != "meta")
            run_on_nonzeros(model, nonzeros)
            for layer in sparse_layers(model).values() if device.type != "cpu" else ():
                layer.to(device)
        elif sparse:
            to_sparse(model)
        return loaded

    @classmethod
    def get_init_context(cls, *args, **kwargs):  # nothing is drawn that is then read
        return [*super().get_init_context(*args, **kwargs), init.no_init_weights()]

    @staticmethod
    def _load_pretrained_model(model, state_dict, checkpoint_files, load_config, *args, **kwargs):
        # Where `from_pretrained` of transformers fills the model, which is on the meta device.
        load = PreTrainedModel._load_pretrained_model
        device_map = load_config.device_map or {}
        for name in device_map.keys() & {*model._parameters, *model._buffers}:
            if device_map[name] == "disk":  # accelerate reads on demand for inner modules only
                device_map[name] = "cpu"
        path = "" if state_dict is not None or not checkpoint_files else checkpoint_files[0]
        commit = re.search(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]", path)  # in the Hub's cache
        model.config._commit_hash = commit and commit[1]
        if path.endswith(".bin") and importlib.util.find_spec("hf_circuit_sparsity"):
            state_dict = importlib.import_module(REPRODUCTION).read_weights(path, model)
        in_one = path.endswith(".safetensors")
        if not in_one or not any(n.endswith(PARTS) for n in read_tensors(path, names_only=True)):
            return load(model, state_dict, checkpoint_files, load_config, *args, **kwargs)
        weights, nonzeros = read_weights(path, model), {}
        if _AS_NONZEROS.get():
            if len(set(device_map.values())) > 1:
                raise ValueError("sparse=True was passed with a device_map over several devices.")
            layers = {f"{name}.weight": module for name, module in model.named_modules()}
            run_dense = {id(w) for n, w in weights.items() if not _runs_sparsely(layers.get(n), w)}
            nonzeros = {n: w for n, w in weights.items() if id(w) not in run_dense}
            model._nonzeros = {n.rpartition(".")[0]: w for n, w in nonzeros.items()}
        firsts = {id(w): n for n, w in reversed(weights.items())}.values()  # names of tied weights
        rest = {n: weights[n].to_dense() for n in set(firsts) - nonzeros.keys()}
        if not _AS_NONZEROS.get():
            return load(model, rest, None, load_config, expected_keys=list(rest))
        # Few and for one device. The nonzeros are put in place at the end of `from_pretrained`.
        place = next(iter(device_map.values()), "cpu")
        for name, weight in rest.items():
            dtype = model.get_parameter_or_buffer(name).dtype
            _load_parameter_into_model(model, name, weight.to(place, dtype))
            model.get_parameter_or_buffer(name)._is_hf_initialized = True
        for module in layers.values():  # all of it was read but buffers that no file holds
            module._is_hf_initialized = not module._non_persistent_buffers_set
        missing = weights.keys() - nonzeros.keys() - rest.keys()
        return LoadStateDictInfo(missing, set(), set(), [], {}, set()), None

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None, *args: Any, sparse: bool | None = None,
        **kwargs: Any,
    ) -> None:  # fmt: skip
        """As every `save_pretrained`; `sparse` ones, of nonzeros, never meet an older config."""
        sparse = self._saves_sparse if sparse is None else sparse
        if state_dict is None and (sparse or sparse_layers(self)):
            weights, tied = dict(named_weights(self)), self.all_tied_weights_keys or {}
            state_dict = {n: w for n, w in weights.items() if w is not weights.get(tied.get(n))}
        if sparse:
            state_dict = sparse_state_dict(state_dict)
            kwargs["max_shard_size"] = 1 << 62  # what belongs together stays in one file
        elif state_dict is not None:
            state_dict = {n: w.to_dense() for n, w in state_dict.items()}
        save, pushes = super().save_pretrained, args or kwargs.get("push_to_hub")
        if pushes or not (sparse and is_main_process and _files):
            return save(save_directory, is_main_process, state_dict, *args, **kwargs)
        with _files.replacing_together(save_directory, CONFIG_NAME) as folder:
            save(folder, True, state_dict, **kwargs)

    def push_to_hub(self, repo_id: str, *args: Any, sparse: bool = True, **kwargs: Any) -> str:
        """As every `push_to_hub`, but uploads only the nonzeros unless `sparse=False`."""
        self._saves_sparse = sparse
        try:
            return super().push_to_hub(repo_id, *args, **kwargs)
        finally:
            del self._saves_sparse

    to_sparse, to_dense = to_sparse, to_dense

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any):
        """As ever; a model that runs on its nonzeros must be made dense before."""
        if new_num_tokens is not None and sparse_layers(self):
            raise ValueError("resize_token_embeddings needs a dense model; call to_dense() before.")
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)


def named_weights(model: nn.Module) -> Iterator[tuple[str, Tensor | CSR]]:
    """Every weight by its name in `state_dict()`, a [`CSR`] if it runs sparsely; tied: the same."""
    shared: dict[int, CSR] = {}
    for name, module in model.named_modules():
        prefix, own = f"{name}." if name else "", {}
        if not isinstance(module, SparseWeight):
            module._save_to_state_dict(own, prefix, True)
        else:
            own[f"{prefix}weight"] = shared.setdefault(id(module.values), module.csr)
            if module.bias is not None:
                own[f"{prefix}bias"] = module.bias
        yield from own.items()


@torch.no_grad()
def sparse_state_dict(weights: dict[str, Tensor | CSR]) -> dict[str, Tensor]:
    """The weights in the layout above, on the CPU; those given as [`CSR`] are never made dense."""
    encoded: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if not isinstance(weight, CSR) and _is_smaller_sparse(weight):
            weight = CSR.from_dense(weight)
        if not isinstance(weight, CSR):
            encoded[name] = weight.detach().cpu().contiguous()
            continue
        counts = weight.row_starts.cpu().diff().numpy()
        index = np.min_scalar_type(max(0, weight.shape[1] - 1))
        columns = torch.from_numpy(weight.columns.cpu().numpy().astype(index))
        encoded[name + VALUES], encoded[name + COLUMNS] = weight.values.detach().cpu(), columns
        counts = counts.astype(np.min_scalar_type(counts.max(initial=0)))
        encoded[name + ROW_COUNTS] = torch.from_numpy(counts)
    return encoded


def _is_smaller_sparse(tensor: Tensor) -> bool:
    if tensor.dim() != 2 or not tensor.is_floating_point() or not tensor.numel():
        return False
    index = np.min_scalar_type(tensor.shape[1] - 1).itemsize
    size = int(torch.count_nonzero(tensor)) * (tensor.element_size() + index)
    return size + len(tensor) * index < tensor.numel() * tensor.element_size()


def read_weights(path: str | os.PathLike, model: nn.Module) -> dict[str, Tensor | CSR]:
    """Every weight of `model` out of a sparse file, tied ones under each of their names.

    A body without its head is read from the file of the whole.

    Raises:
        ArtifactError: a tensor is damaged, lacking, surplus, or of another dtype or shape than the
            model's.
    """
    expected = {name: tuple(weight.shape) for name, weight in named_weights(model)}
    stored: dict[str, Any] = {}  # whole tensors, and dictionaries of the three parts
    for name, tensor in read_tensors(path).items():
        owner, dot, ending = name.rpartition(".")
        is_part = dot + ending in PARTS
        entry = stored.setdefault(owner if is_part else name, {} if is_part else tensor)
        if isinstance(entry, dict) != is_part:
            raise ArtifactError(path, f" has {name[:200]!r} both whole and by its nonzeros.")
        if is_part:
            entry[dot + ending] = tensor
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    is_body = not any(name.startswith(prefix) for name in expected)
    if is_body and any(name.startswith(prefix) for name in stored):
        stored = {n.removeprefix(prefix): t for n, t in stored.items() if n.startswith(prefix)}
    weights: dict[str, Tensor | CSR] = {}
    for name, tensor in stored.items():
        if name not in expected:
            raise ArtifactError(path, f" has {name[:200]!r}, which this config's model has not.")
        if isinstance(tensor, dict):
            weights[name] = _unpacked(path, name, tensor, expected[name])
            continue
        shape, needed = tuple(tensor.shape), f"this config needs {expected[name]} and floats"
        if shape != expected[name] or tensor.dtype not in FLOAT_DTYPES:
            raise ArtifactError(path, f" has {name!r} of {shape}, {tensor.dtype}, but {needed}.")
        weights[name] = tensor
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if target in expected and source in weights:
            weights.setdefault(target, weights[source])
    for name in expected.keys() - weights.keys():
        raise ArtifactError(path, f" lacks {name!r}, which this config's model needs.")
    return weights


def _unpacked(
    path: str | os.PathLike, name: str, parts: dict[str, Tensor], shape: tuple[int, ...]
) -> CSR:
    """A stored matrix, from its three tensors by their endings."""

    def check(holds: Any, otherwise: str) -> None:
        if not holds:
            raise ArtifactError(path, f": the sparse tensor {name!r} {otherwise}; {_DAMAGED}.")

    check(len(shape) == 2, f"is stored by its nonzeros, but the model needs the shape {shape}")
    rows, width = shape
    for ending in PARTS:
        part, kind = parts.get(ending), "floats" if ending == VALUES else "integers"
        check(part is not None, f"lacks {name}{ending}")
        fits = part.dim() == 1 and part.dtype in _DTYPES[kind]
        check(fits, f"has {ending} of {part.dtype} {tuple(part.shape)}, expected flat {kind}")
    values = parts[VALUES]
    counts = parts[ROW_COUNTS].numpy().astype(np.int64)
    columns = parts[COLUMNS].numpy().astype(np.int64)
    check(counts.size == rows, f"has {ROW_COUNTS} of {counts.size} rows, the model has {rows}")
    sizes = f"{counts.sum()} {ROW_COUNTS}, {columns.size} {COLUMNS}, {len(values)} {VALUES}"
    fits = counts.min(initial=0) >= 0 and counts.sum() == columns.size == len(values)
    check(fits, f"has {sizes}, expected as many of each")
    outside = columns[(columns < 0) | (columns >= width)]
    check(not outside.size, f"has {COLUMNS} {outside[:3]}, the matrix has {width}")
    # One number per entry that must grow throughout: it repeats or falls where columns do.
    flat = np.repeat(np.arange(rows), counts) * width + columns
    wrong = flat[1:][np.diff(flat) <= 0] // width
    check(not wrong.size, f"has {COLUMNS} twice or out of order in rows {wrong[:3]}")
    row_starts = torch.zeros(rows + 1, dtype=torch.int32)
    row_starts[1:] = torch.from_numpy(counts.cumsum())
    return CSR(row_starts, torch.from_numpy(columns.astype(np.int32)), values, width)


def _runs_sparsely(layer: nn.Module | None, weight: Tensor | CSR) -> bool:
    """Whether the weight is of a layer that is faster on its nonzeros."""
    if not isinstance(weight, CSR) or len(weight) > MAX_DENSITY * weight.shape[0] * weight.shape[1]:
        return False
    return type(layer) in SPARSE_LAYERS


def read_tensors(path: str | os.PathLike, names_only: bool = False) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU; None for each with `names_only`.

    Raises:
        ArtifactError: the file is damaged or has a dtype that PyTorch lacks.
    """
    tensors, name = {}, "its header"
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                tensors[name] = None if names_only else file.get_tensor(name)
    except TENSOR_ERRORS as error:
        raise ArtifactError(path, f" is damaged at {name[:80]!r} ({error}); {_DAMAGED}.") from error
    return tensors
