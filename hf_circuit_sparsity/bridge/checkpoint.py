"""The folder a [`BridgedCausalLM`] is saved in: a PEFT-style adapter without the dense weights."""

import json
import os
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel
from transformers.utils import cached_file

from ..files import replacing_together
from ..modeling.causal_lm import load_causal_lm
from ..modeling.configuration_circuitgpt import FLOAT_DTYPES, ArtifactError
from ..modeling.fingerprint import model_fingerprint
from ..modeling.sparse_checkpoint import read_tensors
from ..modeling.validation import Field, tensor_shapes
from .configuration_bridge import BridgeConfig

PEFT_TYPE = "SPARSE_BRIDGE"
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
# What a PeftModel calls the part of it that is a bridge; see `adapters/bridge/model.py`.
PREFIX = "base_model.bridge_parts."
_HUB_OPTIONS = (
    "cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder",
)  # fmt: skip
_DENSE_OPTIONS = ("dtype", "torch_dtype", "device_map", "trust_remote_code")
# What the Auto classes pass along although it concerns only them.
_AUTO_OPTIONS = (
    "adapter_kwargs", "code_revision", "_from_auto", "_commit_hash", "attn_implementation",
)  # fmt: skip


def adapter_state_dict(
    bridged: PreTrainedModel, state_dict: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Weights of the sparse model and the bridges, by the names they are saved under.

    Args:
        bridged: a [`BridgedCausalLM`].
        state_dict: its weights, where they had to be gathered; by default its own.
    """
    weights = bridged.state_dict() if state_dict is None else state_dict
    tied = {f"sparse.{name}" for name in (bridged.sparse.all_tied_weights_keys or {})}
    return {
        PREFIX + name: tensor.contiguous()
        for name, tensor in weights.items()
        if not name.startswith("dense.") and name not in tied
    }


def load_adapter_weights(
    bridged: PreTrainedModel, weights: Mapping[str, torch.Tensor], source: str | os.PathLike
) -> None:
    """Put saved weights into the sparse model and the bridges.

    Raises:
        ArtifactError: a weight is missing, unknown, of another shape or no float; names `source`.
    """
    check_adapter_shapes(bridged, {n: tuple(t.shape) for n, t in weights.items()}, source)
    for name, tensor in weights.items():
        if tensor.dtype not in FLOAT_DTYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ArtifactError(source, f" has {name!r} of dtype {kind}, expected floats.")
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}
    bridged.load_state_dict(weights, strict=False)
    bridged.sparse.tie_weights()


def check_adapter_shapes(
    bridged: PreTrainedModel, shapes: Mapping[str, tuple[int, ...]], source: str | os.PathLike
) -> None:
    """Raise an `ArtifactError` that names `source` unless these are the weights of `bridged`."""
    shapes = {name.removeprefix(PREFIX): shape for name, shape in shapes.items()}
    expected = {n.removeprefix(PREFIX): t for n, t in adapter_state_dict(bridged).items()}
    wrong = sorted(n for n in shapes if n not in expected or shapes[n] != expected[n].shape)
    wrong += sorted(expected.keys() - shapes.keys())
    if wrong:
        raise ArtifactError(
            source,
            f" does not hold the bridge its config describes: {wrong[0][:200]!r}"
            f"{f' and {len(wrong) - 1} others' if len(wrong) > 1 else ''} are missing, unknown or "
            "of another shape; copy or download it again.",
        )


def load_dense(source: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
    """A dense model by folder or Hub id.

    Raises:
        OSError: it was not found.
    """
    try:
        return load_causal_lm(source, **kwargs)
    except OSError as error:
        raise OSError(
            f"The dense model {str(source)!r} was not found ({str(error).splitlines()[0]}); pass "
            "where it is, or the model itself, as dense=."
        ) from error


def check_base(config: BridgeConfig, dense: PreTrainedModel) -> None:
    """Raise a `ValueError` if `dense` is not the model the bridge was trained with."""
    kind, width = dense.config.model_type, getattr(dense.config, "hidden_size", None)
    expected, fingerprint = config.base_model_fingerprint, ""
    if (kind, width) == (config.base_model_type, config.base_width):
        fingerprint = model_fingerprint(dense)
        if expected in ("", fingerprint):
            return
    name = f" ({config.base_model_name_or_path})" if config.base_model_name_or_path else ""
    passed = f"{kind} {fingerprint}".rstrip()
    raise ValueError(
        f"This bridge was trained for the {config.base_model_type} model {expected}{name} of width "
        f"{config.base_width}, but the dense model passed is {passed} of width {width}; pass the "
        "model it was trained for, or check_base_model=False if only its precision differs."
    )


class BridgePreTrainedModel(PreTrainedModel):
    """Saves and loads a [`BridgedCausalLM`] as a PEFT-style adapter, without the dense weights."""

    config_class = BridgeConfig

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write the sparse model and the bridges as an adapter folder, without the dense weights.

        PEFT reads `adapter_config.json` and `adapter_model.safetensors`; the Auto classes read
        `config.json` too.
        """
        if push_to_hub:
            raise ValueError("push_to_hub=True is not taken here; call push_to_hub(repo_id).")
        if not is_main_process:
            return
        config = self.config
        config.architectures = [type(self).__name__]
        fields = config.to_diff_dict()
        fields.pop("transformers_version", None)
        adapter_config = {
            "peft_type": PEFT_TYPE,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": config.base_model_name_or_path,
            "revision": config.base_model_revision,
            "inference_mode": True,
            "bridge": fields,
        }
        # Whoever reads the weights looks at one of the configs before.
        with replacing_together(save_directory, CONFIG_NAME, "config.json") as folder:
            config.save_pretrained(folder)
            weights = adapter_state_dict(self, state_dict)
            save_file(weights, folder / WEIGHTS_NAME, metadata={"format": "pt"})
            text = json.dumps(adapter_config, indent=2, sort_keys=True)
            (folder / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        dense: PreTrainedModel | str | os.PathLike | None = None,
        config: BridgeConfig | None = None,
        check_base_model: bool = True,
        **kwargs: Any,
    ) -> "BridgePreTrainedModel":
        """Load a saved bridge and the dense model it belongs to.

        Args:
            pretrained_model_name_or_path: folder or Hub id of the bridge.
            dense: the dense model, or where it is; by default where the bridge says it was.
            config: the bridge's, if it has been loaded already.
            check_base_model: compare the dense model's weights with those the bridge was trained
                with. A quantized model needs `False`.
            kwargs: `dtype`, `device_map` and `trust_remote_code` of the dense model, and where on
                the Hub the bridge is (`revision`, `token`, `cache_dir`, ...).

        Raises:
            ValueError: the bridge is damaged, or was trained for another dense model.
            OSError: a file or the dense model was not found.
        """
        source = pretrained_model_name_or_path
        hub_options = {name: kwargs.pop(name) for name in _HUB_OPTIONS if name in kwargs}
        options = {name: kwargs.pop(name) for name in _DENSE_OPTIONS if name in kwargs}
        if unknown := kwargs.keys() - {*_AUTO_OPTIONS}:
            expected = ("dense", "config", "check_base_model", *_DENSE_OPTIONS, *_HUB_OPTIONS)
            raise TypeError(
                f"from_pretrained got {', '.join(map(repr, sorted(unknown)))}, expected only "
                f"{', '.join(expected)}."
            )
        config_file = f"{source}/config.json"
        if config is None:
            config = BridgeConfig.from_pretrained(source, **hub_options)
        if not isinstance(config, BridgeConfig):
            raise ArtifactError(
                config_file,
                f" holds a {config.model_type!r} model, expected a {BridgeConfig.model_type!r}; "
                "pass a folder that BridgedCausalLM.save_pretrained wrote.",
            )
        path = cached_file(source, WEIGHTS_NAME, **hub_options)
        shapes = tensor_shapes(path)
        if dense is None:
            dense = config.base_model_name_or_path
            if not dense:
                raise ValueError(
                    f"{source} does not say where its dense model is; pass the model as dense=."
                )
            if not os.path.isdir(source):  # a stranger's file must not name folders of this machine
                Field(dense, config_file, "base_model_name_or_path").name_of_folder()
            options["revision"] = config.base_model_revision
        if isinstance(dense, (str, os.PathLike)):
            dense = load_dense(dense, **options)
        try:
            if check_base_model:
                check_base(config, dense)
            with torch.device("meta"):  # without memory first: a config may claim any size
                skeleton = cls(config, dense)
        except ValueError as error:
            raise ArtifactError(config_file, f": {error}") from error
        check_adapter_shapes(skeleton, shapes, path)
        bridged = cls(config, dense)
        load_adapter_weights(bridged, read_tensors(path), path)
        bridged.name_or_path = bridged.config.name_or_path = str(source)
        parameter = next(dense.parameters())
        for part in (bridged.sparse, bridged.bridges):
            has_dtype = "dtype" in options or "torch_dtype" in options
            part.to(device=parameter.device, dtype=parameter.dtype if has_dtype else None)
        return bridged.eval()
