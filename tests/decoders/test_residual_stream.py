"""The residual streams are the models' own forward passes, cut into pieces."""

import pytest
import torch

from hf_circuit_sparsity.decoders.decoder import decoder_of, register_decoder
from hf_circuit_sparsity.decoders.llama import LlamaDecoder
from tests.decoders.dense_models import DENSE, PARALLEL, PHI3, circuitgpt, gpt2, llama

IDS = torch.arange(24).reshape(2, 12) % 60


MODELS = {
    **DENSE,
    **PHI3,
    "circuitgpt with concatenated positions": lambda: circuitgpt(d_pos_emb=8),
    "circuitgpt with a nonlinear stream": lambda: circuitgpt(
        residual_activation_type="relu", afrac_loctypes="attn_in,resid_post_attn,resid_post_mlp"
    ),
}
every_model = pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)


@torch.no_grad()
@every_model
@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_the_pieces_give_the_models_own_logits(make, padding):
    model = make()
    mask = None
    positions = {}
    if padding is not None:
        mask = torch.ones_like(IDS)
        mask[1, slice(3) if padding == "left" else slice(-3, None)] = 0
        positions = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    expected = model(IDS, attention_mask=mask, output_hidden_states=True, **positions)
    stream = decoder_of(model)
    x, context = stream.embed(IDS, mask)
    run = stream.run(x, context)
    assert len(run) == stream.n_locations == 5
    real = torch.ones_like(IDS).bool() if mask is None else mask.bool()
    torch.testing.assert_close(stream.logits(run[-1], context)[real], expected.logits[real])
    for layer in range(2):  # after the embedding and after the first block
        torch.testing.assert_close(run[2 * layer][real], expected.hidden_states[layer][real])
    for start in range(5):
        again = stream.run(run[start], context, start)[-1]
        assert torch.equal(again, run[-1])


@torch.no_grad()
@every_model
def test_an_edit_changes_the_stream_where_it_says(make):
    model = make()
    stream = decoder_of(model)
    x, context = stream.embed(IDS, None)
    run = stream.run(x, context)
    whole = model(IDS).logits
    for location in range(5):
        change = 1.0 + torch.arange(run[location].shape[-1]) / 10

        def edit(x, change=change):
            return x * change

        expected = stream.logits(stream.run(edit(run[location]), context, location)[-1], context)
        handles = stream.add_edit(location, edit)
        try:
            torch.testing.assert_close(model(IDS).logits, expected)
            # The same with a cache, where the later tokens come on their own.
            first = model(IDS[:, :7], use_cache=True)
            rest = model(IDS[:, 7:], past_key_values=first.past_key_values)
            torch.testing.assert_close(
                torch.cat([first.logits, rest.logits], 1), expected, rtol=1e-4, atol=1e-4
            )
        finally:
            for handle in handles:
                handle.remove()
        assert not torch.allclose(expected, whole)
        assert torch.equal(model(IDS).logits, whole)


def test_gpt2_with_cross_attention_is_refused():
    with pytest.raises(ValueError, match="add_cross_attention=True"):
        decoder_of(gpt2(add_cross_attention=True))


def test_parallel_layers_have_no_stream_between_attention_and_mlp():
    (make,) = PARALLEL.values()
    with pytest.raises(ValueError, match="parallel layers"):
        decoder_of(make()).embed(IDS, None)
    for location in range(5):
        with pytest.raises(ValueError, match="parallel layers"):
            decoder_of(make()).add_edit(location, lambda x: x)


def test_an_unknown_architecture_says_what_to_implement_and_can_be_registered():
    model = llama()
    model.config.model_type = "my_llama"
    with pytest.raises(ValueError, match=r"'my_llama'.*circuitgpt, .*gpt2, .*llama.*Decoder"):
        decoder_of(model)
    register_decoder("my_llama", LlamaDecoder)
    assert decoder_of(model).depth == 2
