"""Fine-tuning the weights of one circuit and nothing else, as a PEFT method."""

from collections.abc import Mapping
from typing import Any

from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...modeling.fingerprint import model_fingerprint
from .config import CircuitPeftConfig
from .layer import CircuitLayer


class CircuitTuner(BaseTuner):
    """Puts a [`CircuitLayer`] around every layer with edges.

    Raises:
        ValueError: the adapter belongs to another model, or names a weight the model lacks.
    """

    prefix = "circuit_"
    tuner_layer_cls = CircuitLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012

    def _pre_injection_hook(
        self, model: nn.Module, config: CircuitPeftConfig, adapter_name: str
    ) -> None:
        expected = config.base_model_fingerprint
        # The first adapter only: afterwards the state dict has the adapters' weights too.
        if expected and not any(isinstance(m, CircuitLayer) for m in model.modules()):
            fingerprint = model_fingerprint(model)
            if fingerprint != expected:
                name = config.base_model_name_or_path
                raise ValueError(
                    f"This adapter trains a circuit for {config.task!r} of the model {expected}"
                    f"{f' ({name})' if name else ''}, but the model passed is {fingerprint}; load "
                    "that model, or find the circuit anew in this one."
                )
        modules = dict(model.named_modules())
        for name, positions in config.edges.items():
            layer = modules.get(name)
            layer = layer.get_base_layer() if isinstance(layer, CircuitLayer) else layer
            if not isinstance(layer, nn.Linear | Conv1D):
                raise ValueError(
                    f"The adapter names the layer {name!r}, which is "
                    f"{'missing' if layer is None else type(layer).__name__}; expected a Linear "
                    "or Conv1D of the model it was made for (call to_dense() if it runs on its "
                    "nonzeros)."
                )
            shape = layer.weight.shape[::-1] if isinstance(layer, Conv1D) else layer.weight.shape
            for row, column in positions:
                if not (0 <= row < shape[0] and 0 <= column < shape[1]):
                    raise ValueError(
                        f"The adapter names the weight [{row}, {column}] of {name}, which has "
                        f"the shape {list(shape)}."
                    )
        untie(model, config.edges)

    @staticmethod
    def _check_target_module_exists(config: CircuitPeftConfig, key: str) -> bool:
        return key in config.edges

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict) -> Any:
        return peft_config

    def _create_and_replace(
        self,
        peft_config: CircuitPeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **kwargs: Any,
    ) -> None:
        layer = target
        if not isinstance(target, CircuitLayer):
            layer = CircuitLayer(target)
            setattr(parent, target_name, layer)
        layer.add(adapter_name, peft_config.edges[current_key], peft_config.inference_mode)
        layer.set_adapter(self.active_adapters, inference_mode=peft_config.inference_mode)


def untie(model: nn.Module, edges: Mapping[str, Any]) -> None:
    """Give an unembedding with edges a copy of the weight that it shares with the embedding.

    The circuit's edges are weights of the one and not of the other, also once they are merged.
    """
    unembedding = getattr(model, "get_output_embeddings", lambda: None)()
    name = next((n for n, m in model.named_modules() if m is unembedding), None)
    if name in edges and unembedding.weight is model.get_input_embeddings().weight:
        weight = unembedding.weight
        unembedding.weight = nn.Parameter(weight.detach().clone(), weight.requires_grad)
        model.config.tie_word_embeddings = False
        (model.all_tied_weights_keys or {}).pop(f"{name}.weight", None)
