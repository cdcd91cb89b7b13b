import pytest
from datasets import DatasetDict
from transformers import PreTrainedTokenizerFast

from hf_circuit_sparsity.tasks.corpus import build_corpus
from hf_circuit_sparsity.tasks.tokenizer import tokenizer_from_openai, train_tokenizer
from tests.conftest import FIXTURES


@pytest.fixture(scope="session")
def stdlib() -> DatasetDict:
    return build_corpus()


@pytest.fixture(scope="session")
def trained(stdlib) -> PreTrainedTokenizerFast:
    """The tokenizer of the quickstart."""
    return train_tokenizer(stdlib)


@pytest.fixture(scope="session")
def openai() -> PreTrainedTokenizerFast:
    return tokenizer_from_openai(FIXTURES / "tokenizer")


@pytest.fixture(scope="session", params=["trained", "openai"])
def tokenizer(request) -> PreTrainedTokenizerFast:
    """Both tokenizers that the tasks are made for."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def bytes_only(stdlib) -> PreTrainedTokenizerFast:
    """A tokenizer without a single merge."""
    return train_tokenizer(stdlib["train"].select(range(2))["text"], vocab_size=257)
