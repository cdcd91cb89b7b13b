"""Bridges: what is computed, saved and refused."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassFieldValidationError
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from hf_circuit_sparsity.bridge.configuration_bridge import BridgeConfig
from hf_circuit_sparsity.bridge.losses import mean_kl, normalized_mse
from hf_circuit_sparsity.bridge.modeling_bridge import BridgedCausalLM, default_sparse_config
from tests.decoders.dense_models import DENSE, circuitgpt, gpt2, llama

IDS = torch.arange(24).reshape(2, 12) % 60


def sparse_model(**fields):
    return circuitgpt(d_model=16, d_mlp=24, **fields)


def bridged_pair(make=gpt2, **fields) -> BridgedCausalLM:
    """A dense model, a sparse one of another width and random bridges."""
    torch.manual_seed(2)
    bridged = BridgedCausalLM.from_models(make(), sparse_model(), **fields)
    with torch.no_grad():
        for parameter in bridged.bridges.parameters():
            parameter.normal_()
        for bridge in bridged.bridges:
            width = len(bridge.dense_mean)
            bridge.standardize_(torch.randn(width), torch.rand(width) + 0.5)
    return bridged.eval()


def run_streams(bridged, ids=IDS):
    """Both streams at every location, and what runs on from them: `logits(stream, location)`."""
    both = []
    for stream in (bridged.dense_stream, bridged.sparse_stream):
        x, context = stream.embed(ids, None)

        def go_on(x, location, stream=stream, context=context):
            return stream.logits(stream.run(x, context, location)[-1], context)

        both += [stream.run(x, context), go_on]
    return both


every_dense = pytest.mark.parametrize("make", DENSE.values(), ids=DENSE)


@torch.no_grad()
@every_dense
def test_hybrid_runs_are_made_of_the_two_models(make):
    bridged = bridged_pair(make)
    dense_run, dense_logits, sparse_run, sparse_logits = run_streams(bridged)
    for location in range(5):
        encoded = bridged.encode(dense_run[location], location)
        assert encoded.shape == (2, 12, 16)
        assert ((encoded != 0).sum(-1) == 4).all()  # a quarter of the sparse channels
        expected = sparse_logits(encoded, location)
        assert torch.equal(bridged.hybrid(IDS, enter=location), expected)
        decoded = bridged.decode(sparse_run[location], location)
        assert decoded.shape == dense_run[location].shape
        assert torch.equal(bridged.hybrid(IDS, leave=location), dense_logits(decoded, location))
    _, context = bridged.sparse_stream.embed(IDS, None)
    x = bridged.sparse_stream.run(bridged.encode(dense_run[1], 1), context, 1, 4)[-1]
    assert torch.equal(bridged.hybrid(IDS, 1, 4), dense_logits(bridged.decode(x, 4), 4))


@torch.no_grad()
def test_leaving_at_the_entry_through_exact_bridges_changes_nothing():
    torch.manual_seed(2)
    dense = circuitgpt()
    bridged = BridgedCausalLM.from_models(dense, circuitgpt(), encoder_afrac=None)
    for location, bridge in enumerate(bridged.bridges):
        bridge.encoder.weight.copy_(torch.linalg.qr(bridge.encoder.weight).Q)
        bridge.decoder.weight.copy_(bridge.encoder.weight.T)
        bridge.decoder.bias.copy_(-bridge.encoder.bias @ bridge.encoder.weight)
        logits = bridged.hybrid(IDS, location, location)
        torch.testing.assert_close(logits, dense(IDS).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@every_dense
def test_the_output_is_what_it_says(make):
    bridged = bridged_pair(make)
    out = bridged(IDS, labels=IDS, enter_at=[0, 3], leave_at=[2])
    dense_logits, sparse_logits = bridged.dense(IDS).logits, bridged.sparse(IDS).logits
    torch.testing.assert_close(out.dense_logits, dense_logits)
    torch.testing.assert_close(out.sparse_logits, sparse_logits)
    p = dense_logits.softmax(-1)
    hybrid_logits = [bridged.hybrid(IDS, *where) for where in ((0,), (3,), (None, 2))]
    terms = [out.kl, *out.dense_to_sparse_kl, *out.sparse_to_dense_kl]
    for term, logits in zip(terms, [sparse_logits, *hybrid_logits], strict=True):
        kl = (p * (dense_logits.log_softmax(-1) - logits.log_softmax(-1))).sum(-1).mean()
        torch.testing.assert_close(term, kl, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(out.lm, bridged.sparse(IDS, labels=IDS).loss)
    terms = (out.lm, out.kl, out.nmse, out.dense_to_sparse, out.sparse_to_dense)
    torch.testing.assert_close(out.loss, sum(terms))
    weights = {"lm": 2.0, "kl": 0.0, "nmse": 3.0, "dense_to_sparse": 0.5, "sparse_to_dense": 0.0}
    weighted = bridged(IDS, labels=IDS, enter_at=[0, 3], leave_at=[2], loss_weights=weights).loss
    torch.testing.assert_close(weighted, 2 * out.lm + 3 * out.nmse + 0.5 * out.dense_to_sparse)


@torch.no_grad()
def test_standardization_is_another_way_to_write_the_same_maps():
    bridged = bridged_pair(encoder_afrac=None)
    bridge = bridged.bridges[1]
    x, y = torch.randn(5, 24), torch.randn(5, 16)
    z = (x - bridge.dense_mean) / bridge.dense_scale
    torch.testing.assert_close(bridge.encode(x), bridge.encoder(z))
    decoded = bridge.decode(y)
    z = (decoded - bridge.dense_mean) / bridge.dense_scale
    torch.testing.assert_close(z, bridge.decoder(y), rtol=1e-4, atol=1e-4)
    change = torch.randn(16)
    changed = decoded + bridge.decode_change(change)
    torch.testing.assert_close(bridge.decode(y + change), changed, rtol=1e-4, atol=1e-4)
    # A channel that never moves does not make numbers that are not finite.
    for variance in (torch.zeros(24), torch.arange(24.0)):
        bridge.standardize_(torch.zeros(24), variance)
        assert bridge.encode(x).isfinite().all()
    assert bridge.is_standardized


def test_normalized_error_is_zero_for_the_target_and_one_for_its_mean():
    target = torch.randn(2, 9, 5) * torch.arange(1, 6) + 3
    assert normalized_mse(target, target) == 0
    mean = target.mean((0, 1)).expand_as(target)
    torch.testing.assert_close(normalized_mse(mean, target), torch.tensor(1.0))


def test_padding_counts_in_no_term():
    bridged = bridged_pair()
    mask = torch.ones_like(IDS)
    mask[1, 8:] = 0
    scrambled = torch.where(mask.bool(), IDS, 63 - IDS)
    first = bridged(IDS, attention_mask=mask, enter_at=[1], leave_at=[1])
    second = bridged(scrambled, attention_mask=mask, enter_at=[1], leave_at=[1])
    for name in ("kl", "nmse", "dense_to_sparse", "sparse_to_dense"):
        torch.testing.assert_close(first[name], second[name])
    kept = mean_kl(first.dense_logits, first.sparse_logits, mask.bool())
    p = F.log_softmax(first.dense_logits[mask.bool()], -1)
    q = F.log_softmax(first.sparse_logits[mask.bool()], -1)
    torch.testing.assert_close(kept, (p.exp() * (p - q)).sum(-1).mean(), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@every_dense
@pytest.mark.parametrize("location", range(5))
def test_steering_adds_the_decoded_difference(make, location):
    bridged = bridged_pair(make)
    run, go_on, *_ = run_streams(bridged)
    whole = bridged.dense(IDS).logits
    # Plainly: move the channel in the sparse stream, decode before and after, add the difference.
    encoded = bridged.encode(run[location], location)
    for mode in ("add", "set"):
        moved = encoded.clone()
        moved[..., 5] = 2.5 if mode == "set" else moved[..., 5] + 2.5
        difference = bridged.decode(moved, location) - bridged.decode(encoded, location)
        expected = go_on(run[location] + difference, location)
        with bridged.steer(location, 5, 2.5, mode=mode) as inside:
            assert inside is bridged
            torch.testing.assert_close(bridged.dense(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="within"), bridged.steer(2, 1, 9.0):
        raise RuntimeError("within")
    assert torch.equal(bridged.dense(IDS).logits, whole)
    difference = bridged.bridges[location].decode_change(2.5 * F.one_hot(torch.tensor(5), 16))
    last = run[location].clone()
    last[:, -1] += difference
    with bridged.steer(location, 5, 2.5, positions=-1):
        logits = bridged.dense(IDS).logits
    torch.testing.assert_close(logits, go_on(last, location), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[:, :-1], whole[:, :-1])


@torch.no_grad()
@every_dense
def test_a_model_that_was_compiled_is_steered_too(make):
    bridged = bridged_pair(make)

    def steered(location):
        with bridged.steer(location, 5, 2.5, positions=-1):
            return bridged.dense(IDS).logits

    whole, expected = bridged.dense(IDS).logits, [steered(location) for location in range(5)]
    torch._dynamo.reset()  # compiled once for all locations, which is what costs
    bridged.dense.compile(backend="eager")
    for location, logits in enumerate(expected):
        torch.testing.assert_close(bridged.dense(IDS).logits, whole)
        assert not torch.allclose(logits, whole)
        torch.testing.assert_close(steered(location), logits)


@torch.no_grad()
def test_sites_are_steered_where_they_meet_the_stream():
    bridged = bridged_pair()

    def logits(*where):
        with bridged.steer(*where):
            return bridged.dense(IDS).logits

    for site, location in {
        "h.0.attn.act_in": 0, "h.0.attn.resid_delta": 1, "h.0.mlp.act_in": 1,
        "h.1.attn.resid_delta": 3, "h.1.mlp.resid_delta": 4,
    }.items():  # fmt: skip
        assert torch.equal(logits(site, 3, 1.5), logits(location, 3, 1.5))
    # A neuron writes to many channels at once.
    write = bridged.sparse.transformer.h[1].mlp.c_proj.weight[:, 7]
    decoded = bridged.decode(write, 4) - bridged.decode(0 * write, 4)
    run, go_on, *_ = run_streams(bridged)
    expected = go_on(run[-1] + 1.5 * decoded, 4)
    torch.testing.assert_close(logits("h.1.mlp.post_act", 7, 1.5), expected)


@torch.no_grad()
def test_steering_works_within_generate_with_its_cache():
    bridged = bridged_pair()
    dense = bridged.dense

    def by_hand(steps):
        ids = IDS[:1, :4]
        for _ in range(steps):
            ids = torch.cat([ids, dense(ids).logits[:, -1:].argmax(-1)], 1)
        return ids

    # Without a mask, generate takes the prompt's token 0 for padding.
    settings = {"attention_mask": torch.ones(1, 4).long(), "max_new_tokens": 6, "do_sample": False}
    plain = dense.generate(IDS[:1, :4], pad_token_id=0, **settings)
    with bridged.steer(1, 3, 40.0):
        steered = dense.generate(IDS[:1, :4], pad_token_id=0, eos_token_id=None, **settings)
        expected = by_hand(6)
    assert torch.equal(steered, expected)
    assert not torch.equal(steered[:, : plain.shape[1]], plain)


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda b: b.encode(torch.zeros(1, 1, 24), 5), "location"),
        (lambda b: b.hybrid(IDS, enter=-1), "location"),
        (lambda b: b.hybrid(IDS), "enter"),
        (lambda b: b.hybrid(IDS, 3, 2), "leave"),
        (lambda b: b(IDS, enter_at=[7]), "location"),
        (lambda b: b.steer(9, 0, 1.0), "location"),
        (lambda b: b.steer(1, 16, 1.0), "channel"),
        (lambda b: b.steer("h.0.mlp.act_in", -1, 1.0), "channel"),
        (lambda b: b.steer("h.7.mlp.act_in", 0, 1.0), "h.7.mlp.act_in"),
        (lambda b: b.steer("h.0.attn.q", 0, 1.0), "h.0.attn.q"),
        (lambda b: b.steer(1, 0, 1.0, mode="mul"), "mode"),
        (lambda b: b.steer("h.0.mlp.post_act", 0, 1.0, mode="set"), "mode"),
        (lambda b: b.from_models(gpt2(), sparse_model(n_layer=3)), "n_layer"),
        (lambda b: b.from_models(gpt2(), sparse_model(vocab_size=60)), "vocabulary"),
        (lambda b: b.from_models(gpt2(), sparse_model(), encoder_afrac=0.01), "encoder_afrac"),
    ],
)
def test_what_does_not_exist_or_fit_is_refused(call, argument):
    with pytest.raises(ValueError, match=argument), call(bridged_pair()):
        pass


def test_a_config_out_of_range_is_refused():
    for fields in ({"encoder_afrac": 2}, {"base_model_fingerprint": "x"}, {"base_model_type": 1}):
        with pytest.raises(StrictDataclassFieldValidationError, match=next(iter(fields))):
            BridgeConfig(**fields)


def test_the_default_sparse_config_fits():
    config = default_sparse_config(gpt2(n_embd=32))
    assert (config.n_layer, config.d_model, config.vocab_size, config.block_size) == (2, 32, 64, 32)


def save_pair(folder):
    """A dense model and a bridge saved in `folder`; their folders, and the bridge."""
    gpt2().save_pretrained(folder / "dense")
    bridged = BridgedCausalLM.from_models(str(folder / "dense"), sparse_model()).eval()
    bridged.save_pretrained(folder / "bridge")
    return folder / "dense", folder / "bridge", bridged


@pytest.fixture
def saved(tmp_path):
    return save_pair(tmp_path)


def hybrids(bridged):
    with torch.no_grad():
        return bridged.hybrid(IDS, 1, 3), bridged.hybrid(IDS, enter=2), bridged.hybrid(IDS, leave=0)


def test_what_is_saved_comes_back_without_the_dense_weights(saved):
    dense, folder, bridged = saved
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(dense)
    assert config["peft_type"] == "SPARSE_BRIDGE"
    assert not (folder / "model.safetensors").exists()
    small = sum(p.numel() for n, p in bridged.state_dict().items() if not n.startswith("dense."))
    assert (folder / "adapter_model.safetensors").stat().st_size < 4 * small + 8192
    loaded = [
        BridgedCausalLM.from_pretrained(folder, dense=d) for d in (None, str(dense), bridged.dense)
    ]
    for again in (*loaded, AutoModelForCausalLM.from_pretrained(folder)):
        assert type(again) is BridgedCausalLM and not again.training
        for one, other in zip(hybrids(again), hybrids(bridged), strict=True):
            assert torch.equal(one, other)


def test_tied_embeddings_come_back(tmp_path):
    bridged = BridgedCausalLM.from_models(llama(), sparse_model(tied_unembed=True)).eval()
    bridged.save_pretrained(tmp_path)
    again = BridgedCausalLM.from_pretrained(tmp_path, dense=bridged.dense)
    assert again.sparse.lm_head.weight is again.sparse.transformer.wte.weight
    assert torch.equal(hybrids(again)[1], hybrids(bridged)[1])


def test_another_precision(saved):
    dense, folder, _ = saved
    half = BridgedCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert hybrids(half)[0].dtype == torch.bfloat16
    # A dense model in half precision alone.
    mixed = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.bfloat16)
    mixed = BridgedCausalLM.from_pretrained(folder, dense=mixed)
    assert mixed.sparse.dtype == torch.float32
    assert hybrids(mixed)[0].dtype == torch.bfloat16


def test_another_base_model_is_refused(saved, tmp_path):
    dense, folder, _ = saved
    other = gpt2()
    with torch.no_grad():
        other.transformer.wte.weight[0, 0] += 1
    for model, name in ((other, "gpt2"), (llama(), "llama")):
        with pytest.raises(ValueError, match=name):
            BridgedCausalLM.from_pretrained(folder, dense=model)
    BridgedCausalLM.from_pretrained(folder, dense=other, check_base_model=False)
    dense.rename(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="dense="):
        BridgedCausalLM.from_pretrained(folder)
    with pytest.raises(OSError, match="nowhere/at/all"):
        BridgedCausalLM.from_models("nowhere/at/all")


def test_damaged_folders_are_refused(saved, tmp_path):
    dense, folder, bridged = saved
    narrow = BridgedCausalLM.from_models(bridged.dense, circuitgpt(d_model=8, d_mlp=24))
    narrow.save_pretrained(tmp_path / "narrow")
    weights = (folder / "adapter_model.safetensors").read_bytes()
    for where, content in ((tmp_path / "narrow", weights), (folder, weights[:-100])):
        (where / "adapter_model.safetensors").write_bytes(content)
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
            BridgedCausalLM.from_pretrained(where, dense=bridged.dense)
    with pytest.raises(ValueError, match="gpt2"):
        BridgedCausalLM.from_pretrained(dense, config=bridged.dense.config)
    with pytest.raises(TypeError, match="no_such_option"):
        BridgedCausalLM.from_pretrained(folder, no_such_option=1)
