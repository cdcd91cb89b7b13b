import pytest

from hf_circuit_sparsity import Circuit, CircuitGPTForCausalLM
from tests.circuits.planted import planted_circuit, planted_model


@pytest.fixture
def model() -> CircuitGPTForCausalLM:
    """The planted model, for the test to change as it likes."""
    return planted_model()


@pytest.fixture
def circuit(model) -> Circuit:
    """Its circuit, for the test to change as it likes."""
    return planted_circuit(model)
