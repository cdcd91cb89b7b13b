"""Causal language models of any architecture by their nonzeros: as functions, what CircuitGPT has
as methods. This file does not travel to the Hub.

A model of transformers keeps its class and its config. Its nonzeros are in a file of another name
than its dense weights have, in the layout of `sparse_checkpoint.py`: so transformers alone says
that it finds no weights, where it would otherwise draw random ones.

No quantizer of transformers carries this layout: it must know the shapes of a layer's parameters
before any file is opened.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils import SAFE_WEIGHTS_NAME, cached_file

from .configuration_circuitgpt import CircuitGPTConfig
from .csr import CSR
from .modeling_circuitgpt import CircuitGPTForCausalLM
from .sparse_checkpoint import SparsePreTrainedModel
from .sparse_layers import SPARSE_LAYERS, SparseLinear, to_sparse

VARIANT = "nonzeros"  # what transformers calls part of a weight file's name
NONZEROS_NAME = f"model.{VARIANT}.safetensors"
_DENSE_NAMES = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
_HUB_OPTIONS = (
    "cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder",
)  # fmt: skip


class SparseConv1D(SparseLinear):
    """transformers' `Conv1D` on the nonzeros of its weight, which is stored inputs × outputs."""

    def __init__(self, csr: CSR, bias: nn.Parameter | None = None) -> None:
        super().__init__(csr, bias)
        self.in_features, self.out_features = self.shape

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x, self.csr.transposed())


SPARSE_LAYERS[Conv1D] = SparseConv1D
TRANSPOSED_LAYERS = (Conv1D, SparseConv1D)  # whose weights are stored inputs × outputs


class _ByNonzeros(SparsePreTrainedModel):
    """What a class of transformers needs beside it to read and write nonzeros."""

    _saves_sparse = True

    @classmethod
    def from_pretrained(cls, name: str | os.PathLike, *args: Any, **kwargs: Any) -> PreTrainedModel:
        kwargs |= {"variant": VARIANT, "use_safetensors": True, "key_mapping": None}
        return super().from_pretrained(name, *args, **kwargs)

    def save_pretrained(self, folder: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        kwargs |= {"variant": VARIANT, "save_original_format": False}
        super().save_pretrained(folder, *args, **kwargs)
        for path in _dense_weights(folder):  # of the model that this one takes the place of
            path.unlink()


def _by_nonzeros(cls: type[PreTrainedModel]) -> type[PreTrainedModel]:
    return type(cls.__name__, (_ByNonzeros, cls), {"__module__": cls.__module__})


def _dense_weights(folder: str | os.PathLike) -> list[Path]:
    return [path for path in Path(folder).iterdir() if _DENSE_NAMES.fullmatch(path.name)]


@contextmanager
def saving_nonzeros(model: PreTrainedModel) -> Iterator[None]:
    """Within the block `model.save_pretrained` and `push_to_hub` write only the nonzeros."""
    own = type(model)
    if isinstance(model, SparsePreTrainedModel):
        model._saves_sparse = True
    else:
        model.__class__ = _by_nonzeros(own)
    try:
        yield
    finally:
        model.__class__ = own
        model.__dict__.pop("_saves_sparse", None)


def save_nonzeros(model: PreTrainedModel, save_directory: str | os.PathLike, **kwargs: Any) -> None:
    """Save a model of any architecture by its nonzeros, whether it runs on them or not.

    A CircuitGPT becomes what its `save_pretrained(sparse=True)` writes. For another model weights
    are in `model.nonzeros.safetensors`, which [`load_causal_lm`] reads; dense weights of a model
    saved there before are removed.

    Args:
        save_directory: a folder, which is made.
        kwargs: others of `save_pretrained`.
    """
    with saving_nonzeros(model):
        model.save_pretrained(save_directory, **kwargs)


def load_causal_lm(
    name: str | os.PathLike, *, sparse: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """A causal language model of any architecture, from its nonzeros or from dense weights.

    Args:
        name: folder or Hub id.
        sparse: return it as [`to_sparse`] leaves it. From nonzeros this never allocates a dense
            matrix.
        kwargs: those of `AutoModelForCausalLM.from_pretrained`, without `output_loading_info`.

    Raises:
        ArtifactError: (a `ValueError`) the nonzeros are damaged, or do not fit the config.
        ValueError: there are nonzeros and dense weights, which cannot both be the model's.
        OSError: it was not found.
    """
    options = {option: kwargs[option] for option in _HUB_OPTIONS if option in kwargs}
    if model_type_of(name, **options) == CircuitGPTConfig.model_type:
        return CircuitGPTForCausalLM.from_pretrained(name, sparse=sparse, **kwargs)
    has_nonzeros = cached_file(
        name, NONZEROS_NAME, _raise_exceptions_for_missing_entries=False, **options
    )
    if not has_nonzeros:
        model = AutoModelForCausalLM.from_pretrained(name, **kwargs)
        return to_sparse(model) if sparse else model
    if dense := _dense_weights(Path(has_nonzeros).parent):
        raise ValueError(
            f"{os.fspath(name)} holds a model twice, in {NONZEROS_NAME} and in {dense[0].name}; "
            "remove the one that is not meant."
        )
    cls = MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.from_pretrained(name, **options))]
    model = _by_nonzeros(cls).from_pretrained(name, sparse=sparse, **kwargs)
    model.__class__ = cls
    return model


def model_type_of(name: str | os.PathLike, **hub_options: Any) -> str:
    """The architecture that a saved model's config names; without one it is CircuitGPT's."""
    content = PreTrainedConfig.get_config_dict(name, **hub_options)[0]
    return content.get("model_type", CircuitGPTConfig.model_type)


def weights_file(folder: str | os.PathLike) -> Path:
    """The one file of weights in a folder, by nonzeros or dense."""
    path = Path(folder) / NONZEROS_NAME
    return path if path.is_file() else Path(folder) / SAFE_WEIGHTS_NAME
