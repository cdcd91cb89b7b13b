"""Blocks by kernels, on one new token or on all: the same as the blocks, wherever it is taken."""

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers.cache_utils import DynamicCache, StaticCache

from hf_circuit_sparsity import CircuitGPTConfig, CircuitGPTForCausalLM
from hf_circuit_sparsity.kernels.cpu import CpuKernels, load_kernels, without_kernels
from hf_circuit_sparsity.modeling.blocks import _Room

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no compiled kernels here")

VARIANTS = {
    "as the paper's": {},
    "positions concatenated": {"d_pos_emb": 6},
    "sinusoidal positions": {"d_pos_emb": 6, "sinusoidal_cat_pos_emb": True},
    "no positions": {"use_positional_embeddings": False},
    "no sinks": {"sink": False},
    "no biases": {"bias": False},
    "ReLUs": {"activation_type": "relu", "residual_activation_type": "relu"},
    "nothing is dropped": {"afrac": None},
    "wide heads": {"n_head": 1, "d_head": 64},
    "a stream that is sparse": {
        "afrac": 0.5, "afrac_loctypes": "attn_in,mlp_in,resid_post_attn,resid_post_mlp",
    },
}  # fmt: skip


def sparse_model(seed: int = 0, density: float = 0.08, **changes) -> CircuitGPTForCausalLM:
    """Weights large enough that blocks matter to the logits, more than the embeddings do."""
    torch.manual_seed(seed)
    settings = {
        "vocab_size": 50, "block_size": 200, "n_layer": 3, "d_model": 48, "n_head": 2,
        "d_head": 16, "d_mlp": 70, "bias": True, **changes,
    }  # fmt: skip
    model = CircuitGPTForCausalLM(CircuitGPTConfig(**settings)).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and ".h." in name:
                weight.normal_().mul_(torch.rand_like(weight) < density).mul_(2)
            elif "wte" not in name and "bigram" not in name:
                weight.add_(torch.randn_like(weight) * 0.3)
    return model.to_sparse()


def tokens(batch: int = 1, n: int = 24, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 50, (batch, n), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def one_by_one(model, ids, first: int = 8, mask=None, cache=None):
    """Logits of the tokens from `first` on, each with the cache of those before."""
    seen = (lambda n: None) if mask is None else (lambda n: mask[:, :n])
    cache = DynamicCache(config=model.config) if cache is None else cache
    model(ids[:, :first], attention_mask=seen(first), past_key_values=cache)
    logits = [
        model(ids[:, i : i + 1], attention_mask=seen(i + 1), past_key_values=cache).logits
        for i in range(first, ids.shape[1])
    ]
    return torch.cat(logits, 1), cache


def taken(cache: DynamicCache) -> bool:
    """Whether the last token went through all blocks in one call."""
    room = cache.layers[0].__dict__.get("_room")
    return room is not None and room.used == cache.get_seq_length()


@pytest.fixture
def at_once(monkeypatch) -> list[tuple[int, ...]]:
    """The shapes of the streams that go through all blocks by kernels."""
    shapes = []
    all_tokens = CpuKernels.all_tokens

    def recorded(self, blocks, shape, sinks, x, *rest):
        shapes.append(tuple(x.shape))
        return all_tokens(self, blocks, shape, sinks, x, *rest)

    monkeypatch.setattr(CpuKernels, "all_tokens", recorded)
    return shapes


@pytest.mark.parametrize(("batch", "n"), [(1, 2), (1, 33), (3, 40)])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_all_tokens_give_what_the_blocks_give(variant, batch, n, at_once):
    model, ids = sparse_model(**VARIANTS[variant]), tokens(batch, n)
    cache, plain_cache = (DynamicCache(config=model.config) for _ in range(2))
    fast = model(ids, past_key_values=cache).logits
    assert at_once == [(batch, n, 48)]
    with without_kernels():
        plain = model(ids, past_key_values=plain_cache).logits
    assert len(at_once) == 1
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4)
    for layer, other in zip(cache.layers, plain_cache.layers, strict=True):
        torch.testing.assert_close(layer.keys, other.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.values, other.values, rtol=1e-4, atol=1e-4)
    step = tokens(batch, 1, seed=7)
    after = model(step, past_key_values=cache).logits
    assert taken(cache)
    whole = model(torch.cat([ids, step], 1), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(after, whole, rtol=1e-4, atol=1e-4)
    untouched = model.lm_head(model.transformer.ln_f(model.transformer.wte(ids)))
    assert (fast - untouched).abs().mean() > 0.1 * fast.abs().mean()


@torch.no_grad()
def test_tokens_after_others_or_beside_padding_go_through_the_blocks(at_once):
    model, ids = sparse_model(), tokens(2)
    cache = DynamicCache(config=model.config)
    model(ids[:, :8], past_key_values=cache)
    rest = model(ids[:, 8:], past_key_values=cache).logits
    padded = torch.ones_like(ids)
    padded[0, :3] = 0
    model(ids, attention_mask=padded)
    sparse_model()(ids, output_hidden_states=True)  # leaves hooks behind
    assert at_once == [(2, 8, 48)]
    torch.testing.assert_close(rest, model(ids).logits[:, 8:], rtol=1e-4, atol=1e-4)
    eager = sparse_model()
    eager.set_attn_implementation("eager")
    at_once.clear()
    assert eager(ids, output_attentions=True).attentions[0].shape[-1] == 24 and not at_once
    torch.testing.assert_close(eager(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    model.bfloat16()(ids)
    assert at_once == [(2, 24, 48)]


def test_a_gradient_goes_through_the_blocks(at_once):
    model, ids = sparse_model(), tokens()
    model(ids, labels=ids).loss.backward()
    assert model.transformer.h[0].mlp.c_fc.values.grad.abs().sum() > 0 and not at_once


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_it_gives_what_the_blocks_give(variant, batch):
    model, ids = sparse_model(**VARIANTS[variant]), tokens(batch)
    fast, cache = one_by_one(model, ids)
    assert taken(cache)
    with without_kernels():
        plain, plain_cache = one_by_one(model, ids)
    assert not taken(plain_cache)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4)
    for layer, other in zip(cache.layers, plain_cache.layers, strict=True):
        torch.testing.assert_close(layer.keys, other.keys, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(layer.values, other.values, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        whole = model(ids).logits[:, 8:]
        untouched = model.lm_head(model.transformer.ln_f(model.transformer.wte(ids[:, 8:])))
    torch.testing.assert_close(fast, whole, rtol=1e-4, atol=1e-4)
    # Else the blocks could be left out and nobody would notice.
    assert (fast - untouched).abs().mean() > 0.1 * fast.abs().mean()


@pytest.mark.parametrize("change", [{"rms_norm": False}, {"d_head": 24}, {"d_head": 8}])
def test_what_the_kernel_does_not_know_goes_through_the_blocks(change):
    model, ids = sparse_model(**change), tokens()
    logits, cache = one_by_one(model, ids)
    assert not taken(cache)
    with torch.no_grad():
        torch.testing.assert_close(logits, model(ids).logits[:, 8:], rtol=1e-4, atol=1e-4)


def test_padding_is_not_seen():
    model, ids = sparse_model(), tokens(3)
    mask = torch.ones_like(ids)
    mask[1, :5], mask[2, :2] = 0, 0
    fast, cache = one_by_one(model, ids, mask=mask)
    assert taken(cache)
    with without_kernels():
        plain, _ = one_by_one(model, ids, mask=mask)
    torch.testing.assert_close(fast, plain, rtol=1e-4, atol=1e-4)
    alone, _ = one_by_one(model, ids[1:2, 5:], first=3)
    torch.testing.assert_close(fast[1:2], alone, rtol=1e-4, atol=1e-4)


def test_generation_is_the_same_beyond_its_first_room():
    model, ids = sparse_model(), tokens(2, 5)
    options = {"max_new_tokens": 150, "min_new_tokens": 150, "do_sample": False, "pad_token_id": 0}
    fast = model.generate(ids, **options)
    with without_kernels():
        assert fast.tolist() == model.generate(ids, **options).tolist()
    beams = {**options, "max_new_tokens": 20, "min_new_tokens": 20, "num_beams": 3}
    fast = model.generate(ids, **beams)
    with without_kernels():
        assert fast.tolist() == model.generate(ids, **beams).tolist()


def watched_by_a_hook(model):
    model.transformer.h[1].mlp.post_act.register_forward_hook(lambda *_: None)


def watched_before(model):
    model.transformer.h[0].attn.q.register_forward_pre_hook(lambda *_: None)


def another_forward(model):
    site = model.transformer.h[0].mlp.act_in
    site.forward = lambda x: x * 2


def another_layer(model):
    mlp = model.transformer.h[2].mlp
    mlp.c_fc = torch.nn.Linear(48, 70)


def another_norm(model):
    model.transformer.h[0].ln_1.eps = 0.5


def another_scale(model):
    model.transformer.h[1].attn.scaling = 0.1


def a_norm_without_weights(model):
    norm = torch.nn.RMSNorm(48, eps=torch.finfo(torch.float32).eps, elementwise_affine=False)
    model.transformer.h[0].ln_1 = norm.eval()


def another_order(model):
    blocks = model.transformer.h
    model.transformer.h = torch.nn.ModuleList([blocks[1], blocks[0], blocks[2]])


def nothing_kept(model):
    model.transformer.h[0].mlp.act_in.k = 0


def in_training(model):
    model.train()


@pytest.mark.parametrize(
    "change",
    [
        watched_by_a_hook, watched_before, another_forward, another_layer, another_norm,
        another_scale, a_norm_without_weights, another_order, nothing_kept, in_training,
    ],
)  # fmt: skip
def test_where_somebody_looks_on_or_has_changed_something_blocks_are_called(change, at_once):
    model, ids = sparse_model(), tokens()
    one_by_one(model, ids)  # has been taken before
    change(model)
    at_once.clear()
    logits, cache = one_by_one(model, ids)
    assert not taken(cache) and not at_once
    with without_kernels():
        plain, _ = one_by_one(model, ids)
    torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-4)


def test_hooks_see_and_change_every_token():
    model, ids = sparse_model(), tokens()
    before, _ = one_by_one(model, ids)
    seen = []

    def ablate(module, args, output):
        seen.append(output.shape[1])
        return torch.zeros_like(output)

    handle = model.transformer.h[0].mlp.post_act.register_forward_hook(ablate)
    ablated, _ = one_by_one(model, ids)
    handle.remove()
    assert seen == [8, *[1] * 16] and (ablated - before).abs().max() > 0.1
    after, cache = one_by_one(model, ids)
    assert taken(cache) and torch.equal(after, before)


def test_parts_of_other_sizes_are_an_error_and_no_memory_is_read_or_written():
    model, ids = sparse_model(), tokens()
    _, cache = one_by_one(model, ids)
    mlp = model.transformer.h[1].mlp
    fitting, mlp.c_fc = mlp.c_fc, sparse_model(d_mlp=90).transformer.h[1].mlp.c_fc
    with torch.no_grad(), pytest.raises(RuntimeError):
        model(ids[:, :1], past_key_values=copy.deepcopy(cache))
    mlp.c_fc = fitting
    with torch.no_grad(), pytest.raises(RuntimeError):
        model.transformer(inputs_embeds=torch.randn(1, 1, 40), past_key_values=cache)


def test_threads_share_no_cache():
    """What points to a cache is a call's own: another thread's call may be under way."""
    model, ids = sparse_model(), tokens()
    _, cache = one_by_one(model, ids)
    assert taken(cache)
    kept = model.transformer.__dict__["_decoded"].blocks
    assert all(block.keys is None and block.values is None for block in kept)


def test_gradients_and_modes_go_through_the_blocks():
    model, ids = sparse_model(), tokens()
    cache = DynamicCache(config=model.config)
    model(ids[:, :8], past_key_values=cache)
    logits = model(ids[:, 8:9], past_key_values=cache).logits
    assert not taken(cache) and logits.requires_grad
    with torch.no_grad(), FlopCounterMode(display=False):
        model(ids[:, 9:10], past_key_values=cache)
    assert not taken(cache)
    static = StaticCache(config=model.config, max_cache_len=40)
    logits, _ = one_by_one(model, ids, cache=static)
    torch.testing.assert_close(logits, model(ids).logits[:, 8:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_what_is_trained_in_between_counts():
    model, ids = sparse_model(), tokens()
    one_by_one(model, ids)
    layer = model.transformer.h[0].mlp.c_fc
    other = sparse_model(seed=5).transformer.h[0].mlp.c_fc
    changes = (
        lambda: layer.values.data.mul_(-1.5),  # which no version counts
        lambda: layer.values.add_(0.5),
        lambda: layer.assign(other.csr),
        lambda: setattr(layer, "values", torch.nn.Parameter(layer.values * 2)),
        lambda: setattr(model.transformer.h[1].mlp.post_act, "k", 3),
        lambda: layer.columns.sub_(layer.columns.clamp(max=1)),
        lambda: model.transformer.h[2].ln_2.weight.data.mul_(3),
        lambda: model.transformer.h[0].attn.attn_imp.sink_logit.data.add_(4),
    )
    last = None
    for change in changes:
        change()
        logits, cache = one_by_one(model, ids)
        assert taken(cache)
        with without_kernels():
            plain, _ = one_by_one(model, ids)
        torch.testing.assert_close(logits, plain, rtol=1e-4, atol=1e-4)
        assert last is None or (logits - last).abs().max() > 1e-3
        last = logits


def test_copies_of_a_model_and_its_files_are_whole(tmp_path):
    model, ids = sparse_model(), tokens()
    logits, _ = one_by_one(model, ids)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.values.zero_()
    assert torch.equal(one_by_one(copied, ids)[0], logits)
    copied.save_pretrained(tmp_path)
    loaded = CircuitGPTForCausalLM.from_pretrained(tmp_path, sparse=True, dtype="float32")
    torch.testing.assert_close(one_by_one(loaded, ids)[0], logits, rtol=1e-4, atol=1e-4)
    torch.save(copied, tmp_path / "whole.pt")
    again = torch.load(tmp_path / "whole.pt", weights_only=False)
    torch.testing.assert_close(one_by_one(again, ids)[0], logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_caches_with_the_same_tensors_do_not_write_over_each_other():
    model, ids = sparse_model(), tokens()
    _, cache = one_by_one(model, ids)
    assert taken(cache)
    copies = {
        "views": DynamicCache([(layer.keys, layer.values) for layer in cache.layers]),
        "a deep copy": copy.deepcopy(cache),
        "the same": cache,
    }
    shallow = DynamicCache(config=model.config)
    shallow.layers = [copy.copy(layer) for layer in cache.layers]
    copies["copied layers"] = shallow
    kept = [(layer.keys, layer.values) for layer in cache.layers]
    before = [(keys.clone(), values.clone()) for keys, values in kept]
    steps = {name: tokens(1, 4, seed=10 + i) for i, name in enumerate(copies)}
    got = {name: [] for name in copies}
    for i in range(4):  # in turn, so that each could spoil the others
        for name, own in copies.items():
            step = steps[name][:, i : i + 1]
            got[name].append(model(step, past_key_values=own).logits)
    for name in copies:
        whole = model(torch.cat([ids, steps[name]], 1)).logits[:, -4:]
        torch.testing.assert_close(torch.cat(got[name], 1), whole, rtol=1e-4, atol=1e-4)
    for (keys, values), (old_keys, old_values) in zip(kept, before, strict=True):
        assert torch.equal(keys, old_keys) and torch.equal(values, old_values)


@torch.no_grad()
def test_a_cache_cut_shorter_goes_on_from_there():
    model, ids = sparse_model(), tokens()
    _, cache = one_by_one(model, ids)
    cache.crop(-6)
    step = tokens(1, 1, seed=9)
    logits = model(step, past_key_values=cache).logits
    whole = model(torch.cat([ids[:, :-6], step], 1)).logits[:, -1:]
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
    cache.reorder_cache(torch.tensor([0]))
    logits = model(step, past_key_values=cache).logits
    whole = model(torch.cat([ids[:, :-6], step, step], 1)).logits[:, -1:]
    torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)


def test_room_grows_and_keeps_what_is_there():
    layer = DynamicCache([(torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4))]).layers[0]
    keys = layer.keys.clone()
    room = _Room(layer)
    room.show(layer)
    assert room.continues(layer) and torch.equal(layer.keys, keys) and room.size > 5
    room.used = room.size
    room.show(layer)
    assert not room.continues(layer)
