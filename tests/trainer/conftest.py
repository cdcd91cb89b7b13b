"""Tiny models and data for the trainer tests; everything is seeded and runs on one CPU thread."""

import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hf_circuit_sparsity.trainer import SparseTrainer, SparseTrainingArguments


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def make_gpt2():
    def make(dropout=0.0, seed=0):
        torch.manual_seed(seed)
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=61,
                n_positions=16,
                n_embd=24,
                n_layer=2,
                n_head=2,
                resid_pdrop=dropout,
                embd_pdrop=dropout,
                attn_pdrop=dropout,
                bos_token_id=0,
                eos_token_id=0,
            )
        )

    return make


@pytest.fixture
def make_llama():
    def make(seed=0):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=61,
                hidden_size=24,
                intermediate_size=40,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=16,
                bos_token_id=0,
                eos_token_id=0,
                tie_word_embeddings=False,
            )
        )

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
    def make(model, callbacks=None, name="run", model_init=None, **arguments):
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
        return SparseTrainer(
            model,
            SparseTrainingArguments(**{**settings, **arguments}),
            train_dataset=dataset,
            eval_dataset=dataset.select(range(16)),
            callbacks=callbacks,
            model_init=model_init,
        )

    return make
