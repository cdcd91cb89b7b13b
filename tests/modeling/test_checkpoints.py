"""Our checkpoint layout and OpenAI's two, and the model's code travelling with its weights."""

import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_circuit_sparsity import CircuitGPTConfig, CircuitGPTForCausalLM
from tests.conftest import FIXTURES, sparsify
from tests.hub.outside import run_outside

IDS = torch.arange(24).reshape(2, 12)
PAPER = FIXTURES / "reference" / "paper"


def logits_of(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


def openai_hub_folder(path, model, *, extra=None, drop=(), **fields):
    """The layout of OpenAI's Hub repository: keys start with `circuit_model.`."""
    path.mkdir()
    tensors = {f"circuit_model.{k}": v.clone() for k, v in model.state_dict().items()}
    tensors = {k: v for k, v in {**tensors, **(extra or {})}.items() if k not in drop}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = {
        **model.config.to_dict(),
        "architectures": ["CircuitGPTForCausalLM"],
        "auto_map": {
            "AutoConfig": "config.CircuitGPTConfig",
            "AutoModelForCausalLM": "modeling_circuitgpt.CircuitGPTForCausalLM",
        },
        **fields,
    }
    (path / "config.json").write_text(json.dumps(config, default=str))
    return path


def test_openai_hub_layout_loads_and_is_saved_in_ours(tiny_model, tmp_path):
    folder = openai_hub_folder(tmp_path / "hub", tiny_model)
    for auto in (CircuitGPTForCausalLM, AutoModelForCausalLM):
        model, info = auto.from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        assert torch.equal(logits_of(model), logits_of(tiny_model))
    model.save_pretrained(tmp_path / "own")
    assert "lm_head.weight" in load_file(tmp_path / "own" / "model.safetensors")
    again = CircuitGPTForCausalLM.from_pretrained(tmp_path / "own")
    assert torch.equal(logits_of(again), logits_of(tiny_model))


def test_openai_hub_layout_with_the_oddities_of_real_releases(tiny_model, tmp_path):
    tiny_model.final_logits_bias.zero_()
    config = {"n_mlp": tiny_model.config.d_mlp, "d_mlp": None, "some_future_field": [1, {"a": 2}]}
    folder = openai_hub_folder(
        tmp_path / "hub",
        tiny_model,
        drop={"circuit_model.final_logits_bias"},
        extra={"circuit_model.transformer.h.0.attn.bias": torch.ones(1, 1, 32, 32).tril()},
        **config,
    )
    model, info = CircuitGPTForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(model.final_logits_bias, torch.zeros(64))
    assert torch.equal(logits_of(model), logits_of(tiny_model))
    assert model.config.some_future_field == [1, {"a": 2}]
    model.save_pretrained(tmp_path / "own")
    assert CircuitGPTConfig.from_pretrained(tmp_path / "own").some_future_field == [1, {"a": 2}]


def blob_folder(path, edit_config=lambda c: c, edit_weights=lambda w: w):
    path.mkdir()
    config = edit_config(json.loads((PAPER / "beeg_config.json").read_text()))
    (path / "beeg_config.json").write_text(json.dumps(config))
    weights = torch.load(PAPER / "final_model.pt", weights_only=True)
    torch.save(edit_weights(dict(weights)), path / "final_model.pt")
    return path


def test_blob_layout_with_old_names_and_missing_parts(tmp_path):
    def old(config):
        config["n_mlp"] = config.pop("d_mlp")
        return {k: v for k, v in config.items() if k not in ("d_pos_emb", "d_head")}

    def without_bias(weights):
        del weights["final_logits_bias"]
        weights["transformer.h.1.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
        return weights

    model = CircuitGPTForCausalLM.from_openai(blob_folder(tmp_path / "a", old, without_bias))
    reference = CircuitGPTForCausalLM.from_openai(PAPER)
    reference.final_logits_bias.zero_()
    torch.testing.assert_close(logits_of(model), logits_of(reference))


def test_blob_layout_bad_input(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"beeg_config\.json was not found"):
        CircuitGPTForCausalLM.from_openai(tmp_path)

    def missing(weights):
        del weights["transformer.h.1.mlp.c_fc.weight"]
        return weights

    def surplus(weights):
        return {**weights, "transformer.h.7.oddity": torch.zeros(2)}

    def reshaped(weights):
        return {**weights, "lm_head.weight": torch.zeros(64, 31)}

    for number, (edit, message) in enumerate(
        [
            (missing, "lacks 'transformer.h.1.mlp.c_fc.weight'"),
            (surplus, "'transformer.h.7.oddity'"),
            (reshaped, r"'lm_head.weight' of shape \(64, 31\)"),
        ]
    ):
        folder = blob_folder(tmp_path / str(number), edit_weights=edit)
        with pytest.raises(ValueError, match=message):
            CircuitGPTForCausalLM.from_openai(folder)

    truncated = blob_folder(tmp_path / "truncated")
    data = (truncated / "final_model.pt").read_bytes()
    (truncated / "final_model.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"final_model\.pt is not a readable"):
        CircuitGPTForCausalLM.from_openai(truncated)

    class Hostile:
        def __reduce__(self):
            return (exec, ("raise SystemExit('executed')",))

    hostile = blob_folder(tmp_path / "hostile")
    torch.save({"lm_head.weight": Hostile()}, hostile / "final_model.pt")
    with pytest.raises(ValueError, match="plain tensors"):
        CircuitGPTForCausalLM.from_openai(hostile)


REMOTE = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("model", trust_remote_code=True, sparse={sparse})
ids = torch.load("ids.pt")
with torch.no_grad():
    logits = model.eval()(ids).logits
greedy = model.generate(ids[:, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
torch.save({{"logits": logits, "greedy": greedy, "sites": list(model.node_sites())}}, "out.pt")
"""


@pytest.mark.parametrize("sparse", [False, True])
def test_loads_by_remote_code_where_the_package_is_not_installed(tiny_model, tmp_path, sparse):
    folder = tmp_path / "model"
    if sparse:
        sparsify(tiny_model)
    tiny_model.save_pretrained(folder, sparse=sparse)
    # Few enough to be read before somebody trusts them.
    texts = [path.read_text() for path in folder.glob("*.py")]
    assert len(texts) <= 6
    assert sum(len(text.splitlines()) for text in texts) <= 1500
    torch.save(IDS, tmp_path / "ids.pt")
    run_outside(REMOTE.format(sparse=sparse), tmp_path, HF_HOME=str(tmp_path / "hf"),
                HF_MODULES_CACHE=str(tmp_path / "modules"), HF_HUB_OFFLINE="1")  # fmt: skip
    out = torch.load(tmp_path / "out.pt")
    torch.testing.assert_close(out["logits"], logits_of(tiny_model), atol=1e-6, rtol=0)
    greedy = tiny_model.generate(IDS[:, :4], max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert torch.equal(out["greedy"], greedy)
    assert out["sites"] == list(tiny_model.node_sites())


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("d_model", {"d_model": 30, "n_head": 4}),
        ("d_model", {"d_model": 30}),
        ("afrac", {"afrac": 0.0}),
        ("attn_in", {"afrac": 0.001, "d_model": 64}),
        ("afrac_loctypes", {"afrac_loctypes": "attn_in,elsewhere"}),
        ("activation_type", {"activation_type": "swish"}),
        ("residual_activation_type", {"residual_activation_type": "tanh"}),
        ("n_layer", {"n_layer": 0}),
        ("n_layer", {"n_layer": 10**9}),
        ("d_model", {"d_model": "32"}),
        ("dropout", {"dropout": float("nan")}),
        ("dropout", {"dropout": 2}),
        ("sink", {"sink": "yes"}),
        ("n_head", {"n_head": 2**20, "d_head": 2**20}),
        ("d_pos_emb", {"sinusoidal_cat_pos_emb": True}),
        ("dtype", {"dtype": "int32"}),
    ],
)
def test_config_refuses_what_cannot_be_built(name, fields):
    with pytest.raises((ValueError, StrictDataclassError), match=name):
        CircuitGPTConfig(**fields)


def test_config_speaks_both_languages():
    config = CircuitGPTConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=2)
    assert (config.d_model, config.n_layer, config.n_head, config.d_head) == (64, 3, 2, 32)
    assert (config.hidden_size, config.intermediate_size, config.head_dim) == (64, 256, 32)
    assert CircuitGPTConfig(d_model=64).n_head == 4  # the paper's d_head of 16
    assert CircuitGPTConfig(afrac_loctypes=["attn_q", "mlp_in"]).afrac_loctypes == "attn_q,mlp_in"
    assert CircuitGPTConfig(tie_word_embeddings=True).tied_unembed is True
