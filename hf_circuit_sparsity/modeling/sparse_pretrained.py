"""What a `PreTrainedModel` needs to run on, save and load only the nonzeros of its weights."""

import contextlib
import os
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_utils import PreTrainedModel

from .sparse_checkpoint import (
    commit_hash,
    encoded_state_dict,
    fill_from_sparse_file,
    holds_nonzeros,
    hub_options,
    weights_file,
)
from .sparse_layers import MAX_DENSITY, sparse_layers, to_dense, to_sparse


class SparsePreTrainedModel(PreTrainedModel):
    """Adds `to_sparse` / `to_dense`, and `sparse=True` to saving and loading."""

    _saves_sparse = False  # what `save_pretrained` does if not told

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args: Any,
        sparse: bool = False,
        **kwargs: Any,
    ):
        """As every `from_pretrained`, from dense and from sparse weights alike.

        A model from the Hub knows in `config._commit_hash` the commit it is of (if its weights are
        one file), so that what is made of it can name it.

        Args:
            sparse: return the model as `to_sparse()` leaves it. From sparse weights this never
                allocates a dense matrix; it then takes no `device_map` over several devices and no
                quantization.

        Raises:
            ValueError: a sparse tensor is damaged, or weights do not fit the config.
        """
        path = None
        if kwargs.get("state_dict") is None and not kwargs.get("gguf_file"):
            path = weights_file(pretrained_model_name_or_path, kwargs)
        if path is None or not holds_nonzeros(path):
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            model.config._commit_hash = commit_hash(path)
            if sparse:
                to_sparse(model)
            return loaded
        where = hub_options(kwargs)
        config, kwargs = cls._config_for(pretrained_model_name_or_path, where, kwargs)
        if sparse:
            loaded = model = cls._from_sparse_weights(path, config, kwargs)
        else:
            weights = fill_from_sparse_file(cls._empty(config), path, None, 1.0).state_dict()
            loaded = super().from_pretrained(
                None, *args, config=config, state_dict=weights, **kwargs
            )
            model = loaded[0] if isinstance(loaded, tuple) else loaded
        model.name_or_path = model.config.name_or_path = str(pretrained_model_name_or_path)
        model.config._commit_hash = commit_hash(path)
        if model.can_generate() and kwargs.get("generation_config") is None:
            with contextlib.suppress(OSError):  # without one, what the config gives stays
                model.generation_config = GenerationConfig.from_pretrained(
                    pretrained_model_name_or_path, **where
                )
        return loaded

    @classmethod
    def _config_for(
        cls, source: str | os.PathLike, where: dict[str, Any], kwargs: dict[str, Any]
    ) -> tuple[PreTrainedConfig, dict[str, Any]]:
        """The config, and the keyword arguments that are not its fields."""
        kwargs = {name: value for name, value in kwargs.items() if name not in where}
        config = kwargs.pop("config", None)
        if isinstance(config, PreTrainedConfig):
            return config, kwargs
        # These are fields of every config too, but here they say how to load.
        kept = ("dtype", "torch_dtype", "attn_implementation", "quantization_config")
        loading = {name: kwargs.pop(name) for name in kept if name in kwargs}
        config, kwargs = cls.config_class.from_pretrained(
            source if config is None else config, return_unused_kwargs=True, **where, **kwargs
        )
        return config, {**kwargs, **loading}

    @classmethod
    def _empty(cls, config: PreTrainedConfig, **options: Any) -> "SparsePreTrainedModel":
        """The model without memory for its weights."""
        with init.no_init_weights(), torch.device("meta"):
            return cls._from_config(config, **options)

    @classmethod
    def _from_sparse_weights(
        cls, path: str, config: PreTrainedConfig, kwargs: dict[str, Any]
    ) -> "SparsePreTrainedModel":
        dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
        dtype = config.dtype if dtype in (None, "auto") else dtype
        dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype or torch.float32
        device = kwargs.get("device_map")
        if isinstance(device, dict) and set(device) == {""}:
            device = device[""]
        if isinstance(device, dict) or device in ("auto", "balanced", "sequential"):
            raise ValueError(
                f"device_map={device!r} was passed with sparse=True, which places the whole model "
                "on one device; pass a device, or load without sparse=True."
            )
        if kwargs.get("quantization_config") is not None:
            raise ValueError(
                "quantization_config was passed with sparse=True, but nonzeros are not quantized; "
                "load without one of the two."
            )
        options = {"dtype": dtype}
        if kwargs.get("attn_implementation") is not None:
            options["attn_implementation"] = kwargs["attn_implementation"]
        model = cls._empty(config, **options)
        fill_from_sparse_file(model, path, dtype, MAX_DENSITY)
        if isinstance(kwargs.get("generation_config"), GenerationConfig):
            model.generation_config = kwargs["generation_config"]
        return (model if device is None else model.to(device)).eval()

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        *args: Any,
        sparse: bool | None = None,
        **kwargs: Any,
    ) -> None:
        """As every `save_pretrained`.

        Args:
            sparse: write only the nonzeros (the layout is in `sparse_checkpoint.py`); a matrix that
                this would not make smaller is written as it is. `from_pretrained` reads both.
        """
        if self._saves_sparse if sparse is None else sparse:
            state_dict = encoded_state_dict(self, state_dict)
            kwargs["max_shard_size"] = 1 << 62  # what belongs together stays in one file
        elif state_dict is None and sparse_layers(self):
            # Tied layers share their nonzeros, but the dense matrices made here are two.
            tied = self.all_tied_weights_keys or {}
            state_dict = {n: t for n, t in self.state_dict().items() if tied.get(n) is None}
        super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)

    def push_to_hub(self, repo_id: str, *args: Any, sparse: bool = True, **kwargs: Any) -> str:
        """As every `push_to_hub`, but uploads only the nonzeros unless `sparse=False`."""
        self._saves_sparse = sparse
        try:
            return super().push_to_hub(repo_id, *args, **kwargs)
        finally:
            del self._saves_sparse

    def to_sparse(self, threshold: float = MAX_DENSITY) -> "SparsePreTrainedModel":
        """Run linear layers and embeddings on their nonzeros, in place; returns the model.

        A layer with a larger share of nonzeros than `threshold` stays dense, where that is faster.
        Names and values in `state_dict()`, node sites and their hooks stay what they are. Train
        with an optimizer made afterwards: the parameters then are the nonzeros. A model that is
        not sparse stays as it is, with a warning.

        Raises:
            ValueError: `threshold` is not a share, or weights are offloaded.
        """
        return to_sparse(self, threshold)

    def to_dense(self) -> "SparsePreTrainedModel":
        """Undo `to_sparse`, in place; returns the model."""
        return to_dense(self)

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args: Any, **kwargs: Any):
        """As ever; a model that runs on its nonzeros must be made dense before."""
        if new_num_tokens is not None and sparse_layers(self):
            raise ValueError(
                f"resize_token_embeddings({new_num_tokens}) was called on a model that runs on "
                "its nonzeros; call to_dense() before and to_sparse() after."
            )
        return super().resize_token_embeddings(new_num_tokens, *args, **kwargs)
