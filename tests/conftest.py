"""What tests of several rooms share: small models, OpenAI's reference files, a Hub on loopback."""

# Before anything that imports huggingface_hub: the only Hub that tests can reach is this one.
from loopback_hub.plugin import hub_server  # noqa: F401  isort: skip

import gc
import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from hf_circuit_sparsity import CircuitGPTConfig, CircuitGPTForCausalLM
from hf_circuit_sparsity.kernels.cpu import load_kernels, without_kernels
from hf_circuit_sparsity.trainer import SparseTrainer, SparseTrainingArguments

# Test models are tiny: a second thread costs more than it brings, and several test runs beside each
# other would wait for each other's threads. The same holds for the processes that tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

FIXTURES = Path(__file__).parent / "fixtures"


def pytest_collection_finish(session):
    """What the libraries made when imported stays: the collector need not look at it each time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


@pytest.fixture(params=["kernels", "torch and numpy"])
def either_path(request):
    """Runs a test twice: with the compiled kernels, and with what runs where there are none."""
    if request.param == "kernels" and load_kernels() is None:
        pytest.skip("no C compiler was found, or it is switched off")
    with nullcontext() if request.param == "kernels" else without_kernels():
        yield request.param


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
            if isinstance(module, (nn.Linear, Conv1D, nn.Embedding)):
                keep = torch.rand(module.weight.shape, generator=generator) < density
                module.weight.masked_fill_(~keep, 0.0)
    return model


@pytest.fixture
def make_gpt2():
    def make(dropout=0.0, seed=0, **fields):
        torch.manual_seed(seed)
        shape = {"vocab_size": 61, "n_positions": 16, "n_embd": 24, "n_layer": 2, "n_head": 2}
        settings = {
            "bos_token_id": 0, "eos_token_id": 0, "resid_pdrop": dropout, "embd_pdrop": dropout,
            "attn_pdrop": dropout,
        }  # fmt: skip
        return GPT2LMHeadModel(GPT2Config(**(shape | settings | fields)))

    return make


@pytest.fixture
def make_llama():
    def make(seed=0, **fields):
        torch.manual_seed(seed)
        shape = {
            "vocab_size": 61, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16,
        }  # fmt: skip
        settings = {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False}
        return LlamaForCausalLM(LlamaConfig(**(shape | settings | fields)))

    return make


@pytest.fixture(scope="session")
def dataset():
    """64 sequences of 12 tokens that follow a rule, so that there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    start = torch.randint(0, 61, (64, 1), generator=generator)
    tokens = ((start + 7 * torch.arange(12)) % 61).tolist()
    return Dataset.from_dict({"input_ids": tokens, "labels": tokens})


@pytest.fixture
def make_trainer(tmp_path, dataset):
    def make(
        model,
        callbacks=None,
        name="run",
        model_init=None,
        trainer_class=SparseTrainer,
        arguments_class=SparseTrainingArguments,
        **arguments,
    ):
        settings = {
            "output_dir": str(tmp_path / name),
            "max_steps": 12,
            "per_device_train_batch_size": 8,
            "target_density": 1 / 8,
            "anneal_start": 0.0,
            "anneal_end": 0.5,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 3,
        }
        return trainer_class(
            model, arguments_class(**{**settings, **arguments}), train_dataset=dataset,
            eval_dataset=dataset.select(range(16)), callbacks=callbacks,
            **({} if model_init is None else {"model_init": model_init}),
        )  # fmt: skip

    return make
