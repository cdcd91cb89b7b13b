"""`train --model`: a model that others have trained becomes sparse."""

import json
import re
import shlex
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_circuit_sparsity import train_tokenizer
from hf_circuit_sparsity.cli import main
from hf_circuit_sparsity.commands import pretrained
from hf_circuit_sparsity.commands.loading import load_model
from hf_circuit_sparsity.tasks.corpus import build_corpus
from tests.decoders.dense_models import from_config

from .test_cli import TRAINING

DOCUMENT = Path(__file__).parents[2] / "docs" / "pretrained.md"


@pytest.fixture(scope="module")
def tokenizer(corpus):
    return train_tokenizer(build_corpus(corpus)["train"], vocab_size=300)


@pytest.fixture
def gpt2(tokenizer, make_gpt2, tmp_path):
    """A folder with a GPT-2, as `save_pretrained` leaves it."""
    model = make_gpt2(vocab_size=len(tokenizer), n_positions=32)
    model.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    return tmp_path / "gpt2"


def make_sparse(model, corpus, output, *more):
    arguments = ["train", "--model", str(model), "--corpus", str(corpus)]
    arguments += ["--output-dir", str(output), "--block-size", "32", "--max-steps", "4"]
    return main([*arguments, *TRAINING, *more])


def test_a_model_of_others_becomes_sparse(gpt2, corpus, tmp_path, capsys):
    dense = AutoModelForCausalLM.from_pretrained(gpt2)
    options = ["--no-sparse-embeddings", "--distillation-weight", "0.5"]
    options += ["--exclude-parameters", "*.h.1.mlp.c_proj.weight", "--learning-rate", "1e-9"]
    assert make_sparse(gpt2, corpus, tmp_path / "run", *options) == 0
    assert "nonzeros" in capsys.readouterr().out
    sparse = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    assert sparse.config.model_type == "gpt2" and len(AutoTokenizer.from_pretrained(gpt2)) == 300
    assert sparse.lm_head.weight is sparse.transformer.wte.weight
    for name, weight in sparse.named_parameters():
        before = dense.get_parameter(name)
        if (
            ".h." in name
            and name.endswith("weight")
            and "ln_" not in name
            and "1.mlp.c_p" not in name
        ):
            # It began at the dense weights, of which the large ones stay.
            kept = weight != 0
            assert kept.sum() == max(round(0.2 * kept.numel()), 4 * kept.shape[1])
            torch.testing.assert_close(weight[kept], before[kept])
        elif weight.ndim > 1:
            torch.testing.assert_close(weight, before)


def test_the_command_of_the_document_runs(tokenizer, make_gpt2, corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_gpt2(vocab_size=len(tokenizer), n_positions=256).save_pretrained("runs/my_gpt2")
    tokenizer.save_pretrained("runs/my_gpt2")
    (command,) = re.findall(r"```bash\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    argv = shlex.split(command.replace("\\\n", ""))[1:]
    smaller = ["--max-steps", "2", "--corpus", str(corpus), "--report-to", "none"]
    assert main([*argv, *smaller]) == 0
    assert AutoModelForCausalLM.from_pretrained("runs/sparse").config.model_type == "gpt2"


def test_the_default_rate_is_for_a_model_that_has_learned(gpt2, corpus, tmp_path):
    assert make_sparse(gpt2, corpus, tmp_path / "run") == 0
    arguments = torch.load(tmp_path / "run" / "training_args.bin", weights_only=False)
    assert arguments.learning_rate < 1e-3


def write_gguf(path, model, tokenizer):
    """A Llama and its BPE tokenizer, as llama.cpp's converter lays them out, in float32."""
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    merges = tokenizer._tokenizer.model.__getstate__()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([3 if t == tokenizer.eos_token else 1 for t in vocabulary])
    writer.add_token_merges([" ".join(m) for m in json.loads(merges)["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        for projection, count in heads.items():
            if projection in name:  # llama.cpp rotates neighbouring channels, not halves
                weight = weight.unflatten(0, (count, 2, -1)).transpose(1, 2).flatten(0, 2)
        stem = name.removesuffix(".weight")
        writer.add_tensor(f"{names.get_name(stem)}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def gguf_file(tokenizer, make_llama, tmp_path):
    (tmp_path / "gguf").mkdir()
    model = make_llama(vocab_size=len(tokenizer), max_position_embeddings=32)
    write_gguf(tmp_path / "gguf" / "tiny.gguf", model.eval(), tokenizer)
    return tmp_path / "gguf" / "tiny.gguf", model


def test_a_gguf_file_is_read_trained_and_saved(gguf_file, corpus, tokenizer, tmp_path):
    path, model = gguf_file
    loaded, tokens = pretrained.load_pretrained(str(path))
    text = "alpha = 'beta gamma'\n"
    assert tokens(text)["input_ids"] == tokenizer(text)["input_ids"]
    ids = torch.tensor([tokens(text)["input_ids"]])
    torch.testing.assert_close(loaded.eval()(ids).logits, model(ids).logits)
    assert make_sparse(path, corpus, tmp_path / "run") == 0
    sparse = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    weight = sparse.model.layers[0].mlp.up_proj.weight
    assert (weight != 0).sum() == round(0.2 * weight.numel())


def test_a_gguf_file_without_its_reader(gguf_file, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pretrained, "is_gguf_available", lambda: False)
    assert make_sparse(gguf_file[0], corpus, tmp_path / "run") == 2
    assert "hf-circuit-sparsity[gguf]" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, named",
    [
        (["--model", "{gpt2}", "--d-model", "64"], "--d-model"),
        (["--model", "{gpt2}", "--block-size", "64"], "--block-size 64"),
        (["--model", "{gpt2}", "--tokenizer", "{large}"], "300"),
        (["--model", "{gpt2}", "--distillation-weight", "2"], "distillation_weight"),
        (["--model", "{bare}"], "--tokenizer"),
        (["--model", "{t5}"], "predicts the next token"),
        (["--model", "{damaged}"], "damaged"),
        (["--model", "nowhere.gguf"], "nowhere.gguf"),
    ],
)
def test_what_cannot_be_made_sparse(options, named, gpt2, corpus, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = {name: tmp_path / name for name in ("bare", "t5", "damaged", "large")}
    weights, config = (gpt2 / n for n in ("model.safetensors", "config.json"))
    for name in ("bare", "t5", "damaged"):
        folders[name].mkdir()
        (folders[name] / config.name).write_text(config.read_text())
        (folders[name] / weights.name).write_bytes(weights.read_bytes())
    (folders["t5"] / config.name).write_text('{"model_type": "t5"}')
    (folders["damaged"] / weights.name).write_bytes(weights.read_bytes()[:99])
    train_tokenizer(build_corpus(corpus)["train"], vocab_size=310).save_pretrained(folders["large"])
    arguments = ["train", "--output-dir", "run", "--block-size", "32", "--max-steps", "1"]
    filled = [option.format(gpt2=gpt2, **folders) for option in options]
    assert main([*arguments, "--corpus", str(corpus), *TRAINING, *filled]) == 2
    assert named in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3", "gemma2", "gpt_neox"])
@pytest.mark.parametrize("load", [load_model, pretrained.load_pretrained])
def test_no_tokenizer_is_made_up(load, name, tmp_path):
    """As transformers does, of special tokens alone, beside most architectures."""
    from_config(name).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer"):
        load(str(tmp_path))


def test_options_that_contradict_are_said_before_text_is_read(gpt2, tmp_path, capsys):
    arguments = ["train", "--model", str(gpt2), "--n-layer", "9", "--corpus", "nowhere"]
    assert main([*arguments, "--output-dir", str(tmp_path / "run"), "--max-steps", "1"]) == 2
    assert "--n-layer" in capsys.readouterr().err
