"""The folder a [`BridgedCausalLM`] is saved in: a PEFT-style adapter without the dense weights."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import cached_file

from ..modeling.fingerprint import model_fingerprint
from ..modeling.validation import FLOAT_DTYPES, ArtifactError, Field, read_tensors, tensor_shapes
from .configuration_bridge import BridgeConfig

PEFT_TYPE = "SPARSE_BRIDGE"
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
# What a PeftModel calls the part of it that is a bridge; see `adapters/bridge_adapter.py`.
PREFIX = "base_model.bridge_parts."
_HUB_OPTIONS = (
    "cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder",
)  # fmt: skip
# What the Auto classes pass along and what concerns only them.
_AUTO_OPTIONS = (
    "adapter_kwargs",
    "code_revision",
    "_from_auto",
    "_commit_hash",
    "attn_implementation",
)


def adapter_state_dict(
    bridged: Any, state_dict: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Weights of twin and bridges by the names they are saved under."""
    weights = bridged.state_dict() if state_dict is None else state_dict
    tied = {f"sparse.{name}" for name in (bridged.sparse.all_tied_weights_keys or {})}
    return {
        PREFIX + name: tensor.contiguous()
        for name, tensor in weights.items()
        if not name.startswith("dense.") and name not in tied
    }


def load_adapter_weights(bridged: Any, weights: Mapping[str, torch.Tensor], source: Any) -> None:
    """Put saved weights into twin and bridges, or raise a `ValueError` that names `source`."""
    check_adapter_shapes(bridged, {n: tuple(t.shape) for n, t in weights.items()}, source)
    for name, tensor in weights.items():
        if tensor.dtype not in FLOAT_DTYPES:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ArtifactError(source, f" has {name!r} of dtype {kind}, expected floats.")
    weights = {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}
    bridged.load_state_dict(weights, strict=False)
    bridged.sparse.tie_weights()


def check_adapter_shapes(
    bridged: Any, shapes: Mapping[str, tuple[int, ...]], source: str | os.PathLike
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


def adapter_config(config: BridgeConfig) -> dict[str, Any]:
    """The content of `adapter_config.json`."""
    fields = config.to_diff_dict()
    ours = {k: v for k, v in fields.items() if k not in ("auto_map", "transformers_version")}
    return {
        "peft_type": PEFT_TYPE,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": config.base_model_name_or_path,
        "revision": config.base_model_revision,
        "inference_mode": True,
        "bridge": ours,
    }


def save_bridge(
    bridged: Any,
    save_directory: str | os.PathLike,
    state_dict: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """See `BridgedCausalLM.save_pretrained`."""
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    bridged.config.architectures = [type(bridged).__name__]
    if getattr(bridged, "_auto_class", None) is not None:
        custom_object_save(bridged, folder, config=bridged.config)
    bridged.config.save_pretrained(folder)
    temporary = folder / f".{WEIGHTS_NAME}.tmp"
    save_file(adapter_state_dict(bridged, state_dict), temporary, metadata={"format": "pt"})
    os.replace(temporary, folder / WEIGHTS_NAME)
    temporary = folder / f".{CONFIG_NAME}.tmp"
    text = json.dumps(adapter_config(bridged.config), indent=2, sort_keys=True)
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, folder / CONFIG_NAME)


def load_bridge(
    cls: Any,
    source: str | os.PathLike,
    dense: Any,
    config: BridgeConfig | None,
    check_base_model: bool,
    kwargs: dict[str, Any],
) -> Any:
    """See `BridgedCausalLM.from_pretrained`."""
    where = {name: kwargs.pop(name) for name in _HUB_OPTIONS if name in kwargs}
    for name in _AUTO_OPTIONS:
        kwargs.pop(name, None)
    trust = kwargs.pop("trust_remote_code", None)
    options = {n: kwargs.pop(n) for n in ("dtype", "torch_dtype", "device_map") if n in kwargs}
    if kwargs:
        raise TypeError(
            f"from_pretrained got {', '.join(map(repr, sorted(kwargs)))}, which it does not know; "
            "it takes dense, config, check_base_model, dtype, device_map, trust_remote_code and "
            "where on the Hub."
        )
    config_file = f"{source}/config.json"
    if config is None:
        config = BridgeConfig.from_pretrained(source, **where)
    # Not by class: where the code came with the weights, the Auto classes may have it twice.
    if config.model_type != cls.config_class.model_type:
        raise ArtifactError(
            config_file,
            f" holds a {config.model_type!r} model, expected a bridge "
            f"({cls.config_class.model_type!r}); pass the folder BridgedCausalLM.save_pretrained "
            "wrote.",
        )
    path = cached_file(source, WEIGHTS_NAME, **where)
    shapes = tensor_shapes(path)
    if dense is None:
        if not config.base_model_name_or_path:
            raise ValueError(
                f"{source} does not say where its dense model is; pass the model as dense=."
            )
        dense = config.base_model_name_or_path
        if not os.path.isdir(source):  # of somebody else, who has no say on folders here
            Field(dense, config_file, "base_model_name_or_path").name_of_folder()
        options["revision"] = config.base_model_revision
    if isinstance(dense, (str, os.PathLike)):
        dense = load_dense(dense, trust_remote_code=trust, **options)
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
    # The parts follow the dense model: one place, one precision.
    parameter = next(dense.parameters())
    for part in (bridged.sparse, bridged.bridges):
        part.to(device=parameter.device)
        if "dtype" in options or "torch_dtype" in options:
            part.to(dtype=parameter.dtype)
    return bridged.eval()


def load_dense(source: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
    """A dense model by folder or Hub id, or an `OSError` of one sentence."""
    try:
        return AutoModelForCausalLM.from_pretrained(source, **kwargs)
    except OSError as error:
        raise OSError(
            f"The dense model {str(source)!r} was not found ({str(error).splitlines()[0]}); pass "
            "where it is, or the model itself, as dense=."
        ) from error


def check_base(config: BridgeConfig, dense: Any) -> None:
    """Raise a `ValueError` if `dense` is not the model the bridge was trained with."""
    width, kind = getattr(dense.config, "hidden_size", None), dense.config.model_type
    found = (kind, width)
    wanted = (config.base_model_type, config.base_width)
    fingerprint = None
    if found == wanted:
        fingerprint = model_fingerprint(dense)
        if not config.base_model_fingerprint or fingerprint == config.base_model_fingerprint:
            return
    name = f" ({config.base_model_name_or_path})" if config.base_model_name_or_path else ""
    raise ValueError(
        f"This bridge was trained for the {wanted[0]} model {config.base_model_fingerprint}{name} "
        f"of width {wanted[1]}, but the dense model passed is {found[0]} "
        f"{fingerprint or ''}{' ' if fingerprint else ''}of width {found[1]}; pass the model it "
        "was trained for, or check_base_model=False if only its precision differs."
    )
