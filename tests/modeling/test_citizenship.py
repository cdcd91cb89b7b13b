"""What people expect of any `PreTrainedModel`."""

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, pipeline

from hf_circuit_sparsity import CircuitGPTConfig, CircuitGPTForCausalLM
from hf_circuit_sparsity.modeling import modeling_circuitgpt
from tests.circuits.planted import word_tokenizer
from tests.conftest import random_model

IDS = torch.arange(24).reshape(2, 12)


def pad_left(ids, width):
    padded = torch.cat([ids.new_zeros(len(ids), width), ids], dim=1)
    mask = torch.ones_like(padded)
    mask[:, :width] = 0
    return padded, mask


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(tiny_model, attention, side):
    tiny_model.set_attn_implementation(attention)
    ids, mask = pad_left(IDS, 5)
    kept = slice(5, None)
    if side == "right":
        ids, mask, kept = ids.roll(-5, 1), mask.roll(-5, 1), slice(0, 12)
    with torch.no_grad():
        alone = tiny_model(IDS).logits
        padded = tiny_model(ids, attention_mask=mask).logits[:, kept]
    torch.testing.assert_close(padded, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("cache", [None, "static"])
def test_sampling_is_seeded_and_beams_score_at_least_greedy(tiny_model, cache):
    def sample(**kwargs):
        torch.manual_seed(3)
        return tiny_model.generate(
            IDS[:, :4], max_new_tokens=6, pad_token_id=0, cache_implementation=cache, **kwargs
        )

    assert torch.equal(sample(do_sample=True), sample(do_sample=True))

    def score(sequences):
        with torch.no_grad():
            logp = tiny_model(sequences).logits.log_softmax(-1)[:, 3:-1]
        return logp.gather(-1, sequences[:, 4:, None]).sum((1, 2))

    greedy = score(sample(do_sample=False))
    assert (score(sample(num_beams=4, do_sample=False)) >= greedy - 1e-4).all()


def test_caches_equal_one_pass(tiny_model):
    for attention in ("sdpa", "eager"):
        tiny_model.set_attn_implementation(attention)
        ids, mask = pad_left(IDS[:, :6], 3)
        common = dict(attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
        static = tiny_model.generate(ids, cache_implementation="static", **common)
        assert torch.equal(static, tiny_model.generate(ids, use_cache=False, **common))

        # A prompt read in pieces of several tokens, as in chunked prefill or speculative decoding.
        with torch.no_grad():
            whole = tiny_model(IDS).logits
            first = tiny_model(IDS[:, :5], use_cache=True)
            second = tiny_model(IDS[:, 5:], past_key_values=first.past_key_values)
        torch.testing.assert_close(
            torch.cat([first.logits, second.logits], 1), whole, atol=1e-5, rtol=1e-5
        )


def test_hidden_states_and_attentions(tiny_model):
    tiny_model.set_attn_implementation("eager")
    with torch.no_grad():
        out = tiny_model(IDS, output_hidden_states=True, output_attentions=True)
    assert [h.shape for h in out.hidden_states] == [(2, 12, 32)] * 3
    assert [a.shape for a in out.attentions] == [(2, 4, 12, 12)] * 2
    t = tiny_model.transformer
    torch.testing.assert_close(out.hidden_states[0], t.wte(IDS) + t.wpe.weight[:12])
    logits = tiny_model.lm_head(out.hidden_states[-1]) + tiny_model.final_logits_bias
    torch.testing.assert_close(logits + tiny_model.bigram_table[IDS], out.logits)
    # The sink takes a share of every row; what is left attends to the past only.
    assert (out.attentions[0].sum(-1) < 1).all()
    assert out.attentions[0].triu(1).abs().max() == 0
    assert isinstance(tiny_model(IDS, return_dict=False), tuple)


def test_attentions_that_sdpa_does_not_give_are_warned_of(tiny_model, monkeypatch):
    said = []
    monkeypatch.setattr(modeling_circuitgpt.logger, "warning_once", said.append)
    assert tiny_model(IDS, output_attentions=True).attentions == ()
    assert "output_attentions" in said[0]


@pytest.mark.parametrize("padded", [False, True])
def test_sdpa_equals_eager_forward_and_backward(tiny_config, padded):
    ids, mask = pad_left(IDS, 3) if padded else (IDS, None)
    labels = ids if mask is None else ids.masked_fill(mask == 0, -100)
    results = []
    for attention in ("sdpa", "eager"):
        model = random_model(tiny_config)
        model.set_attn_implementation(attention)
        loss = model(ids, attention_mask=mask, labels=labels).loss
        loss.backward()
        results.append((loss, {n: p.grad for n, p in model.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0])
    for name, grad in results[0][1].items():
        torch.testing.assert_close(grad, results[1][1][name], atol=1e-5, rtol=1e-4)


def test_gradient_checkpointing_gives_the_same_gradients(tiny_config):
    gradients = []
    for checkpointing in (False, True):
        model = random_model(tiny_config).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_bfloat16(tiny_model, tmp_path):
    """Without AbsTopK, whose choice among near-equal activations rounding may change."""
    config = CircuitGPTConfig(**{**tiny_model.config.to_dict(), "afrac": None})
    model = random_model(config)
    model.save_pretrained(tmp_path)
    low = CircuitGPTForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in low.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        full, half = model(IDS, labels=IDS), low(IDS, labels=IDS)
    assert half.logits.dtype == torch.bfloat16 and half.loss.dtype == torch.float32
    cosine = torch.cosine_similarity(full.logits, half.logits.float(), dim=-1)
    assert cosine.min() > 0.99
    half_sparse = CircuitGPTForCausalLM(tiny_model.config).to(torch.bfloat16)
    half_sparse(IDS, labels=IDS).loss.backward()  # the sparse paths run and backpropagate too


def test_text_generation_pipeline(tiny_config):
    tiny_config.vocab_size = len(tokenizer := word_tokenizer())
    model = random_model(tiny_config)
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = ["w5 w9", "w3 w4 w7 w2"]
    together = generate(prompts, max_new_tokens=5, do_sample=False, batch_size=2)
    for prompt, output in zip(prompts, together, strict=True):
        alone = generate(prompt, max_new_tokens=5, do_sample=False)
        assert output[0]["generated_text"] == alone[0]["generated_text"]
        assert output[0]["generated_text"].startswith(prompt)
        assert len(output[0]["generated_text"]) > len(prompt)


@pytest.mark.parametrize("frozen", [False, True])
def test_resize_token_embeddings(tiny_model, frozen):
    tiny_model.bigram_table.requires_grad_(not frozen)
    with torch.no_grad():
        before = tiny_model(IDS).logits
        tiny_model.resize_token_embeddings(70)
        after = tiny_model(torch.cat([IDS, torch.full((2, 1), 69)], 1)).logits
    assert after.shape == (2, 13, 70) and tiny_model.config.vocab_size == 70
    torch.testing.assert_close(after[:, :12, :64], before)
    tiny_model.resize_token_embeddings(32)
    assert tiny_model.bigram_table.shape == (32, 32)
    assert isinstance(tiny_model.bigram_table, torch.nn.Parameter)
    assert tiny_model.bigram_table.requires_grad is not frozen
    with torch.no_grad():
        torch.testing.assert_close(tiny_model(IDS).logits, before[..., :32])


def test_compiles_without_a_graph_break(tiny_model):
    compiled = torch.compile(tiny_model, fullgraph=True, backend="eager")
    with torch.no_grad():
        logits = compiled(IDS, use_cache=False).logits
        torch.testing.assert_close(logits, tiny_model(IDS).logits)


@torch.no_grad()
@pytest.mark.parametrize("offloaded", ["transformer.h.1", "bigram_table", "lm_head"])
def test_device_map(tiny_model, tmp_path, offloaded):
    tiny_model.save_pretrained(tmp_path)
    parts = [n for n, _ in tiny_model.transformer.named_children() if n != "h"] + ["h.0", "h.1"]
    parts = [f"transformer.{n}" for n in parts] + ["lm_head", "final_logits_bias", "bigram_table"]
    for places in ({"": "cpu"}, {**dict.fromkeys(parts, "cpu"), offloaded: "disk"}):
        model = CircuitGPTForCausalLM.from_pretrained(
            tmp_path, device_map=places, offload_folder=tmp_path / "offload"
        )
        torch.testing.assert_close(model(IDS).logits, tiny_model(IDS).logits)


def test_logits_to_keep(tiny_model):
    with torch.no_grad():
        whole = tiny_model(IDS).logits
        torch.testing.assert_close(tiny_model(IDS, logits_to_keep=3).logits, whole[:, -3:])
        some = tiny_model(IDS, logits_to_keep=torch.tensor([0, 5])).logits
    torch.testing.assert_close(some, whole[:, [0, 5]])


def test_node_sites_are_named_and_hooked_in_order(tiny_model):
    sites = tiny_model.node_sites()
    parts = ["attn.act_in", "attn.q", "attn.k", "attn.v", "attn.resid_delta"]
    parts += ["mlp.act_in", "mlp.post_act", "mlp.resid_delta"]
    assert list(sites) == [f"h.{i}.{part}" for i in range(2) for part in parts]
    assert list(tiny_model.transformer.node_sites()) == list(sites)
    called = []
    for name, site in sites.items():
        site.register_forward_hook(lambda m, a, out, n=name: called.append((n, out.shape[-1])))
    tiny_model(IDS)
    assert called == [(name, site.width) for name, site in sites.items()]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("sink", [True, False])
def test_continuous_batching_equals_generate(tiny_config, attention, sink):
    model = random_model(CircuitGPTConfig(**{**tiny_config.to_dict(), "sink": sink}))
    model.set_attn_implementation(attention)
    greedy = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0)
    # Left to itself it takes half of the free memory for its cache.
    small = ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64)
    batch = model.generate_batch([[5, 6, 7, 8], [9, 1]], greedy, small)
    assert len(batch) == 2
    for request in batch.values():
        alone = model.generate(torch.tensor([request.prompt_ids]), generation_config=greedy)
        assert request.generated_tokens == alone[0, len(request.prompt_ids) :].tolist()


@torch.no_grad()
def test_embeddings_beside_the_ids_that_the_bigram_table_needs(tiny_model, tiny_config):
    embeds = tiny_model.get_input_embeddings()(IDS)
    both = dict(input_ids=IDS, inputs_embeds=embeds)
    torch.testing.assert_close(tiny_model(**both).logits, tiny_model(IDS).logits)
    assert not torch.equal(tiny_model(IDS, inputs_embeds=2 * embeds).logits, tiny_model(IDS).logits)
    greedy = dict(max_new_tokens=4, do_sample=False, pad_token_id=63)
    generated = tiny_model.generate(IDS, **greedy)
    assert torch.equal(tiny_model.generate(**both, **greedy), generated)
    for call in (tiny_model, tiny_model.generate):
        with pytest.raises(ValueError, match="input_ids"):
            call(inputs_embeds=embeds)
    plain = random_model(
        CircuitGPTConfig(**{**tiny_config.to_dict(), "enable_bigram_table": False})
    )
    embeds = plain.get_input_embeddings()(IDS)
    torch.testing.assert_close(plain(inputs_embeds=embeds).logits, plain(IDS).logits)


def test_text_ends_at_block_size(tiny_model):
    for limit in (dict(max_new_tokens=40), dict(max_length=50)):
        text = tiny_model.generate(IDS, min_new_tokens=20, pad_token_id=63, **limit)
        assert text.shape == (2, 32)
    static = tiny_model.generate(
        IDS, max_new_tokens=40, pad_token_id=63, do_sample=False, cache_implementation="static"
    )
    assert static.shape == (2, 32)
    with pytest.raises(ValueError, match="block_size"):
        tiny_model(IDS, position_ids=torch.arange(12)[None] + 21)
    full = torch.zeros(1, 32, dtype=torch.long)
    with pytest.raises(ValueError, match="block_size"):
        tiny_model.generate(full, max_new_tokens=1)
    for ids, new in (([5] * 4, 29), ([5] * 33, 1)):
        with pytest.raises(ValueError, match="block_size"):
            tiny_model.generate_batch([[1, 2], ids], max_new_tokens=new)


def test_bad_input(tiny_model):
    ids, mask = torch.zeros(1, 40, dtype=torch.long), torch.ones(1, 40, dtype=torch.long)
    for given in (None, mask):
        with pytest.raises(ValueError, match="block_size"):
            tiny_model(ids, attention_mask=given)
    mask[:, :10] = 0  # the tokens themselves fit
    assert tiny_model(ids, attention_mask=mask).logits.shape == (1, 40, 64)
    with pytest.raises(ValueError, match="inputs_embeds"):
        tiny_model.transformer()
