"""Make our models known to transformers and our adapters to PEFT without importing either.

Both keep tables from the name of a type to its class. As soon as such a table exists, it is
replaced by one that imports what registers our types when somebody looks up their names.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Name of the type → module that registers it.
MODEL_TYPES = {
    "circuitgpt": "hf_circuit_sparsity.modeling",
    "circuitgpt_bridge": "hf_circuit_sparsity.bridge",
}
ADAPTER_TYPES = {
    "SPARSE_BRIDGE": "hf_circuit_sparsity.adapters",
    "CIRCUIT_EDGES": "hf_circuit_sparsity.adapters",
}


class LazyTable(dict):
    """A table of classes in which some are entered only when they are looked up.

    Args:
        entries: what the table holds already.
        modules: name → module that enters the name's class when it is imported.
    """

    def __init__(self, entries: dict[str, Any], modules: dict[str, str]) -> None:
        super().__init__(entries)
        self.modules = modules

    def __contains__(self, name: object) -> bool:
        if name in self.modules and not super().__contains__(name):
            importlib.import_module(self.modules[name])
        return super().__contains__(name)

    def __missing__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise KeyError(name)


def _extend_transformers(module: ModuleType) -> None:
    mapping = module.CONFIG_MAPPING
    mapping._extra_content = LazyTable(mapping._extra_content, MODEL_TYPES)


def _extend_trainer(module: ModuleType) -> None:
    # By these names a `Trainer` knows whose labels to shift before it smooths them.
    names = getattr(module, "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", {})
    ours = {"circuitgpt": "CircuitGPTForCausalLM"}
    module.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = {**names, **ours}


def _extend_peft(module: ModuleType) -> None:
    table = LazyTable(module.PEFT_TYPE_TO_CONFIG_MAPPING, ADAPTER_TYPES)
    module.PEFT_TYPE_TO_CONFIG_MAPPING = table


class _Hook(MetaPathFinder):
    """Calls a function with a module once that is imported."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self.name, self.then = name, then

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_extend(module: ModuleType) -> None:
                execute(module)
                self.then(module)

            spec.loader.exec_module = execute_and_extend
        return spec


def register_lazily() -> None:
    """Make our types known now or, to libraries not yet imported, when they are."""
    for name, extend in (
        ("transformers.models.auto.configuration_auto", _extend_transformers),
        ("transformers.trainer", _extend_trainer),
    ):
        if name in sys.modules:
            extend(sys.modules[name])
        else:
            sys.meta_path.insert(0, _Hook(name, extend))
    if "peft" in sys.modules:
        # Modules of PEFT hold the table itself by now, so that it can no longer be replaced.
        with suppress(ImportError):  # PEFT is too old
            importlib.import_module("hf_circuit_sparsity.adapters")
    else:
        sys.meta_path.insert(0, _Hook("peft.mapping", _extend_peft))
