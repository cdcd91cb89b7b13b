"""Checkpoints of the public reproduction, against what its own code gives for them."""

import json
import shutil

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file

from hf_circuit_sparsity.commands.loading import load_model
from hf_circuit_sparsity.modeling.configuration_circuitgpt import (
    ArtifactError,
    CircuitGPTConfig,
)
from hf_circuit_sparsity.modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from tests.circuits.planted import word_tokenizer
from tests.conftest import FIXTURES

CHECKPOINTS = ["sparse_pretrain", "sparse_pretrain_dense"]
every_checkpoint = pytest.mark.parametrize("name", CHECKPOINTS)


def folder_of(name):
    return FIXTURES / "reproduction" / name


@every_checkpoint
@pytest.mark.parametrize("sparse", [False, True], ids=["run dense", "run on nonzeros"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_it_gives_what_their_code_gives(name, attention, sparse):
    model, info = CircuitGPTForCausalLM.from_pretrained(
        folder_of(name), attn_implementation=attention, sparse=sparse, output_loading_info=True
    )
    assert not any(info.values()) and model.dtype == torch.float32
    expected = load_file(folder_of(name) / "expected.safetensors")
    ids, stream = expected["input_ids"], []
    model.transformer.ln_f.register_forward_pre_hook(lambda module, args: stream.append(args[0]))
    output = model(ids, labels=ids, output_hidden_states=True)
    torch.testing.assert_close(output.logits, expected["logits"], rtol=0, atol=1e-4)
    torch.testing.assert_close(output.loss, expected["loss"][0], rtol=0, atol=1e-4)
    # Theirs is the stream before the last norm; transformers' last hidden state comes after it.
    for at, hidden in enumerate([*output.hidden_states[:-1], stream[0]]):
        torch.testing.assert_close(hidden, expected[f"hidden.{at}"], rtol=0, atol=1e-4)
    tokens = model.generate(ids[:, :8], max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(tokens, expected["greedy_from_8"])


@every_checkpoint
def test_it_is_saved_as_one_of_ours(name, tmp_path):
    model = CircuitGPTForCausalLM.from_pretrained(folder_of(name))
    assert (model.transformer.wpe is None) == (name == "sparse_pretrain")
    model.save_pretrained(tmp_path, sparse=True)
    assert "model_config" not in json.loads((tmp_path / "config.json").read_text())
    again = CircuitGPTForCausalLM.from_pretrained(tmp_path)
    for key, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], weight)


def test_commands_and_the_hub_take_it(hub_server, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folder_of("sparse_pretrain"), folder)
    word_tokenizer().save_pretrained(folder)
    model, _ = load_model(str(folder))
    api = HfApi()
    api.create_repo("ada/stories")
    api.upload_folder(repo_id="ada/stories", folder_path=folder)
    again = CircuitGPTForCausalLM.from_pretrained("ada/stories")
    assert again.config._commit_hash == api.model_info("ada/stories").sha
    for key, weight in model.state_dict().items():
        assert torch.equal(again.state_dict()[key], weight)


def test_the_tokenizer_may_be_the_one_that_the_config_names(hub_server, tmp_path, capsys):
    api, folder = HfApi(), tmp_path / "model"
    shutil.copytree(folder_of("sparse_pretrain"), folder)
    content = json.loads((folder / "config.json").read_text())
    content["training_config"]["tokenizer_name"] = "ada/words"
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="no tokenizer"):
        load_model(str(folder))
    word_tokenizer().push_to_hub("ada/words")
    api.create_repo("ada/stories")
    api.upload_folder(repo_id="ada/stories", folder_path=folder)
    for name in (str(folder), "ada/stories"):
        assert load_model(name)[1].get_vocab() == word_tokenizer().get_vocab()
        assert "ada/words" in capsys.readouterr().out


def without(weights, name):
    return {key: weight for key, weight in weights.items() if key != name}


@pytest.mark.parametrize(
    "change, named",
    [
        (lambda w: {**w, "blocks.0.attn.rope.freqs": torch.ones(3)}, "attn.rope.freqs"),
        (lambda w: {**w, "blocks.2.ln_1.weight": torch.ones(32)}, "h.2.ln_1.weight"),
        (lambda w: without(w, "blocks.1.mlp.c_fc.bias"), "h.1.mlp.c_fc.bias"),
        (lambda w: {**w, "ln_f.weight": torch.ones(31)}, "ln_f.weight"),
        (lambda w: {**w, "ln_f.weight": torch.ones(32, dtype=torch.int64)}, "ln_f.weight"),
        (lambda w: list(w), "list"),
    ],
)
def test_weights_that_do_not_fit(change, named, tmp_path):
    shutil.copytree(folder_of("sparse_pretrain"), tmp_path, dirs_exist_ok=True)
    path = tmp_path / "pytorch_model.bin"
    torch.save(change(torch.load(path, weights_only=True)), path)
    with pytest.raises(ArtifactError, match=named):
        CircuitGPTForCausalLM.from_pretrained(tmp_path)


class Code:
    def __reduce__(self):
        return print, ("ran",)


def test_a_pickle_that_wants_code_is_refused(tmp_path, capsys):
    shutil.copytree(folder_of("sparse_pretrain"), tmp_path, dirs_exist_ok=True)
    torch.save({"wte.weight": Code()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match="pytorch_model"):
        CircuitGPTForCausalLM.from_pretrained(tmp_path)
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "section, fields, named",
    [
        ("model_config", {"n_experts": 8}, "n_experts"),
        ("model_config", {"d_head": 5}, "d_head"),
        ("model_config", {"activation": "swish"}, "activation_type"),
        ("sparsity_config", {"activation_sparsity_locations": "attn_in,resid_pre"}, "resid_pre"),
        ("sparsity_config", {"activation_topk_fraction": 2}, "afrac"),
        ("sparsity_config", None, "sparsity_config"),
        ("model_config", None, "model_config"),
    ],
)
def test_a_config_that_says_something_else(section, fields, named, tmp_path):
    content = json.loads((folder_of("sparse_pretrain") / "config.json").read_text())
    content[section] = fields if fields is None else {**content[section], **fields}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=named):
        CircuitGPTConfig.from_pretrained(tmp_path)


def test_a_config_that_says_little_means_what_their_code_assumes(tmp_path):
    def read(content):
        (tmp_path / "config.json").write_text(json.dumps(content))
        return CircuitGPTConfig.from_pretrained(tmp_path)

    config = read({"model_config": {"vocab_size": 64}, "training_config": {"tokenizer_name": "a"}})
    assert (config.d_model, config.n_layer, config.d_head, config.d_mlp) == (1024, 8, 16, 4096)
    assert (config.block_size, config.afrac, config.use_positional_embeddings) == (256, 0.25, False)
    assert config.enable_bigram_table and config.sink and config.rms_norm and config.bias
    assert config.training_config == {"tokenizer_name": "a"} and config.vocab_size == 64
    sites = {"activation_topk_fraction": 0.5, "activation_sparsity_locations": "resid_mid, mlp_in"}
    config = read({"model_config": {"use_flash_attention": False}, "sparsity_config": sites})
    assert config.activation_sites == ("resid_post_attn", "mlp_in") and config.afrac == 0.5


def test_concatenated_positions_need_positions():
    with pytest.raises(ValueError, match="use_positional_embeddings"):
        CircuitGPTConfig(d_pos_emb=8, use_positional_embeddings=False)
