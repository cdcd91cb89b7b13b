import math

import pytest
import torch

from hf_circuit_sparsity import CircuitGPTConfig, CircuitGPTForCausalLM, initialize_bigram_table_


def model(**settings):
    config = CircuitGPTConfig(
        n_layer=1, n_head=1, d_head=8, d_model=8, d_mlp=16, block_size=16, vocab_size=4, **settings
    )
    silent = CircuitGPTForCausalLM(config)
    torch.nn.init.zeros_(silent.lm_head.weight)
    return silent


@pytest.mark.parametrize("learnable", [True, False])
def test_a_silent_model_then_has_the_loss_of_the_counts(learnable):
    # After 0 comes 1 or 2, twice as often 1; after 1 and 2 always 0; 3 is never seen.
    blocks = torch.tensor([[0, 1, 0, 2, 0, 1, 0]]).repeat(50, 1)
    counting = model(enable_bigram_table=True, learnable_bigram_table=learnable)
    initialize_bigram_table_(counting, blocks, smoothing=1e-6)
    loss = counting(blocks, labels=blocks).loss.item()
    after_zero = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert loss == pytest.approx(after_zero / 2, abs=1e-4)

    initialize_bigram_table_(counting, blocks, smoothing=1e9)  # nothing but the single tokens
    probabilities = counting(blocks).logits[0, 0].softmax(-1)
    single = torch.bincount(blocks.flatten(), minlength=4) + 1.0
    torch.testing.assert_close(probabilities, single / single.sum(), atol=1e-4, rtol=1e-4)


def test_says_what_does_not_fit():
    blocks = torch.tensor([[0, 1, 4]])
    with pytest.raises(ValueError, match="blocks"):
        initialize_bigram_table_(model(enable_bigram_table=True), blocks)
    with pytest.raises(TypeError, match="blocks"):
        initialize_bigram_table_(model(enable_bigram_table=True), iter(blocks))
    with pytest.raises(ValueError, match="enable_bigram_table"):
        initialize_bigram_table_(model(enable_bigram_table=False), blocks)
