"""What tests of several rooms share: small models, OpenAI's reference files, a Hub on loopback."""

# Before anything that imports huggingface_hub: the only Hub that tests can reach is this one.
from tests.hub_server import session  # isort: skip

import shutil
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfFileSystem
from torch import nn

from hf_circuit_sparsity.kernels import load_kernels
from hf_circuit_sparsity.modeling import CircuitGPTConfig, CircuitGPTForCausalLM
from hf_circuit_sparsity.modeling.kernel_slot import without_kernels
from tests.hub_server import HubServer

# Test models are tiny: a second thread costs more than it brings, and several test runs beside each
# other would wait for each other's threads.
torch.set_num_threads(1)

FIXTURES = Path(__file__).parent / "fixtures"


@pytest.fixture(params=["kernels", "torch and numpy"])
def either_path(request):
    """Runs a test twice: with the compiled kernels, and with what runs where there are none."""
    if request.param == "kernels" and load_kernels() is None:
        pytest.skip("no C compiler was found, or it is switched off")
    with nullcontext() if request.param == "kernels" else without_kernels():
        yield request.param


@pytest.fixture
def hub_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """An empty Hub, and clients with empty caches that are signed in as `ada`.

    In this process the clients find it by themselves. For a process of its own, pass
    `env=os.environ`, which has all that it needs; `HF_TOKEN` says who it is.
    """
    server = session.SERVER
    with server.emptied():
        shutil.rmtree(session.CLIENT_HOME, ignore_errors=True)
        HfFileSystem.clear_instance_cache()
        monkeypatch.setenv("HF_TOKEN", server.add_user("ada"))
        yield server
        assert not server.unknown_paths(), "a client asked for what the server does not know"


@pytest.fixture
def tiny_config() -> CircuitGPTConfig:
    """All that the paper's model has, at the size of a test."""
    return CircuitGPTConfig(
        n_layer=2, n_head=4, d_head=8, d_model=32, d_mlp=64, block_size=32, vocab_size=64
    )


@pytest.fixture
def tiny_model(tiny_config: CircuitGPTConfig) -> CircuitGPTForCausalLM:
    return random_model(tiny_config)


def random_model(config: CircuitGPTConfig, seed: int = 0) -> CircuitGPTForCausalLM:
    """A model none of whose tensors is at its neutral value, so that each of them matters."""
    torch.manual_seed(seed)
    model = CircuitGPTForCausalLM(config).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            neutral = 1.0 if ".ln_" in name and name.endswith("weight") else 0.0
            tensor.copy_(neutral + 0.3 * torch.randn(tensor.shape))
    return model


def sparsify(model: nn.Module, density: float = 0.1) -> nn.Module:
    """Zero most of every linear layer and embedding, in place."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                keep = torch.rand(module.weight.shape, generator=generator) < density
                module.weight.masked_fill_(~keep, 0.0)
    return model
