"""The model against what OpenAI's own code gives for the same checkpoints."""

from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file

from hf_circuit_sparsity import CircuitGPTConfig, CircuitGPTForCausalLM
from tests.conftest import FIXTURES, random_model
from tests.modeling.plain_model import plain_logits

REFERENCES = ["paper", "gpt2_like", "concat_position"]
TOLERANCE = 1e-4


@pytest.fixture(params=REFERENCES)
def reference(request):
    folder = FIXTURES / "reference" / request.param
    return CircuitGPTForCausalLM.from_openai(folder), load_file(folder / "expected.safetensors")


@pytest.fixture(params=["sdpa", "eager"])
def attention(request):
    return request.param


@contextmanager
def recorded_activations(model):
    """OpenAI's recorded activations by OpenAI's names, read with ordinary hooks."""
    seen = {}

    def output_as(name):
        return lambda module, args, output: seen.__setitem__(name, output)

    def input_as(name):
        return lambda module, args: seen.__setitem__(name, args[0])

    handles = [
        site.register_forward_hook(output_as(name.removeprefix("h.")))
        for name, site in model.node_sites().items()
    ]
    for i, block in enumerate(model.transformer.h):
        handles += [
            block.register_forward_pre_hook(input_as(f"{i}.resid_in")),
            block.ln_2.register_forward_pre_hook(input_as(f"{i}.resid_mid")),
            block.attn.c_proj.register_forward_pre_hook(input_as(f"{i}.attn.y")),
        ]
    handles.append(model.transformer.ln_f.register_forward_pre_hook(input_as("final_resid")))
    yield seen
    for handle in handles:
        handle.remove()


def test_logits_loss_and_every_recorded_activation(reference, attention):
    model, expected = reference
    model.set_attn_implementation(attention)
    targets = expected["targets"].masked_fill(expected["targets"] == -1, -100)
    with recorded_activations(model) as activations, torch.no_grad():
        output = model(expected["input_ids"], shift_labels=targets)
    activations |= {"logits": output.logits, "loss": output.loss[None]}
    names = {name for name in expected if name.startswith("act.")} | {"logits", "loss"}
    assert set(activations) == {name.removeprefix("act.") for name in names}
    for name in names:
        torch.testing.assert_close(
            activations[name.removeprefix("act.")], expected[name], atol=TOLERANCE, rtol=0,
            msg=lambda m, n=name: f"{n}: {m}",
        )  # fmt: skip


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("lengths", [(8, 8, 8), (8, 11, 14)], ids=["whole", "left padded"])
def test_greedy_generation(reference, attention, use_cache, lengths):
    """Rows of different lengths in one batch continue as each does alone."""
    model, expected = reference
    model.set_attn_implementation(attention)
    greedy, longest = expected["greedy_from_8"], max(lengths)
    ids = torch.zeros(3, longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, longest - length :] = greedy[row, :length]
        mask[row, longest - length :] = 1
    total = greedy.shape[1]
    output = model.generate(
        ids, attention_mask=mask, max_new_tokens=total - min(lengths), do_sample=False,
        use_cache=use_cache, pad_token_id=0,
    )  # fmt: skip
    for row, length in enumerate(lengths):
        new = output[row, longest : longest + total - length]
        assert torch.equal(new, greedy[row, length : length + len(new)])
        assert len(new) == total - length


SWITCHES = {
    "paper": {},
    "resid_topk": {"afrac_loctypes": "resid_post_attn,resid_post_mlp,mlp_neuron", "afrac": 0.5},
    "relu_residual": {"residual_activation_type": "relu", "activation_type": "relu"},
    "layer_norm": {"rms_norm": False},
    "layer_norm_without_bias": {"rms_norm": False, "ln_bias": False, "bias": False},
    "no_positions": {"use_positional_embeddings": False, "dropout_cat_pos_emb": True},
    "concat_sinusoidal": {"d_pos_emb": 6, "sinusoidal_cat_pos_emb": True, "rms_norm": False},
    "concat_odd_width": {"d_pos_emb": 5, "sinusoidal_cat_pos_emb": True},
    "bigram_buffer": {"learnable_bigram_table": False},
    "no_bigram": {"enable_bigram_table": False},
    "no_sink_tied": {"sink": False, "tied_unembed": True},
    "wide_heads": {"n_head": 3, "d_head": 10},
    "dense": {"afrac": None},
}


@pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)
def test_every_switch_against_the_plain_model(switches, attention):
    sizes = {"n_layer": 2, "n_head": 4, "d_head": 8, "d_model": 32, "d_mlp": 48}
    config = CircuitGPTConfig(block_size=16, vocab_size=40, **{**sizes, **switches})
    model = random_model(config)
    model.set_attn_implementation(attention)
    ids = torch.randint(0, 40, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(ids).logits
        expected = plain_logits(config, model.state_dict(), ids)
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=1e-4)


def test_frozen_sinusoids_start_as_sinusoids_and_stay():
    config = CircuitGPTConfig(
        n_layer=1, n_head=2, d_head=8, d_model=16, block_size=12, vocab_size=20,
        d_pos_emb=4, sinusoidal_cat_pos_emb=True,
    )  # fmt: skip
    wpe = CircuitGPTForCausalLM(config).transformer.wpe.weight
    assert not wpe.requires_grad
    # Two periods, 4 tokens and block_size tokens: sin, sin, cos, cos.
    t = torch.arange(12.0)
    for column, (function, period) in enumerate(
        [(torch.sin, 4), (torch.sin, 12), (torch.cos, 4), (torch.cos, 12)]
    ):
        expected = function(2 * torch.pi * t / period)
        torch.testing.assert_close(wpe[:, column], expected, atol=1e-5, rtol=0)
