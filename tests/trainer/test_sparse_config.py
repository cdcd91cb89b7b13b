import json

import pytest
from transformers import HfArgumentParser, TrainingArguments

from hf_circuit_sparsity import RCDConfig, SparseTrainingArguments


@pytest.fixture
def build(tmp_path):
    return lambda **kw: SparseTrainingArguments(output_dir=str(tmp_path / "out"), **kw)


def test_defaults_are_the_recipe(build, tmp_path):
    args = build()
    assert isinstance(args, TrainingArguments)
    assert args.sparsifier == "topk"
    assert (args.target_density, args.anneal_start, args.anneal_end) == (1 / 64, 0.01, 0.5)
    assert (args.learning_rate, args.adam_beta1, args.adam_beta2) == (1e-2, 0.9, 0.95)
    assert (args.adam_epsilon, args.weight_decay, args.max_grad_norm) == (0.1, 0.1, 0.0)
    assert (args.min_nonzeros, args.normalize_gradients, args.sharkfin) == (4, "always", True)
    assert args.lr_scheduler_type == "linear"
    assert args.get_warmup_steps(1000) == 10
    assert not (tmp_path / "out").exists()


def test_command_line(tmp_path):
    parser = HfArgumentParser(SparseTrainingArguments)
    line = (
        f"--output_dir {tmp_path} --target_density 0.125 --min_nonzeros 2 --sparsifier none "
        "--no_sharkfin --no_sparse_biases --normalize_gradients clip --learning_rate 0.5 "
        "--exclude_parameters *.mlp.* lm_head.*"
    )
    (args,) = parser.parse_args_into_dataclasses(line.split())
    assert (args.target_density, args.min_nonzeros, args.sparsifier) == (0.125, 2, "none")
    assert (args.sharkfin, args.sparse_biases, args.sparse_embeddings) == (False, False, True)
    assert (args.normalize_gradients, args.learning_rate) == ("clip", 0.5)
    assert args.exclude_parameters == ["*.mlp.*", "lm_head.*"]
    help = " ".join(parser.format_help().split())  # fails on an unescaped % in a help string
    assert "share of each sparse matrix that is nonzero at the end" in help


def test_coordinate_descent_on_the_command_line(tmp_path):
    parser = HfArgumentParser(SparseTrainingArguments)
    settings = '{"selection": "magnitude", "block_fraction": 0.03}'
    for flag in ("--rcd_config", "--rcd-config"):
        line = ["--output_dir", str(tmp_path), "--sparsifier", "rcd", flag, settings]
        (args,) = parser.parse_args_into_dataclasses(line)
        assert args.rcd_config == RCDConfig(selection="magnitude", block_fraction=0.03)
        assert json.loads(args.to_json_string())["rcd_config"]["block_fraction"] == 0.03


def test_survives_a_round_trip_through_a_dict(build):
    args = build(target_density=0.3, exclude_parameters=["*.bias"])
    again = SparseTrainingArguments(**{k: v for k, v in args.to_dict().items() if v is not None})
    assert again.target_density == 0.3
    assert again.exclude_parameters == ["*.bias"]


BAD_FOR_RCD = [
    ({"rcd_config": {"block_fraction": 0.0}}, "block_fraction"),
    ({"rcd_config": {"selection": "best"}}, "selection"),
    ({"rcd_config": {"init": "dense"}}, "init"),
    ({"rcd_config": {"start_density": 1e-3}}, "start_density"),
    ({"rcd_config": {"blocks": 3}}, "blocks"),
    ({"rcd_config": "block_fraction=0.5"}, "rcd_config"),
    ({"rcd_config": [1]}, "rcd_config"),
    ({"max_grad_norm": 1.0}, "max_grad_norm"),
    ({"torch_compile": True}, "torch_compile"),
]


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"target_density": 0.0}, "target_density"),
        ({"target_density": -1.0}, "target_density"),
        ({"target_density": 64.0}, "target_density"),
        ({"anneal_start": 0.5, "anneal_end": 0.4}, "anneal_start"),
        ({"anneal_end": 2.0}, "anneal_end"),
        ({"min_nonzeros": -1}, "min_nonzeros"),
        ({"sparsifier": "lottery"}, "sparsifier"),
        ({"normalize_gradients": "never"}, "normalize_gradients"),
        ({"exclude_parameters": "*.bias"}, "exclude_parameters"),
        ({"optim": "adafactor"}, "optim"),
        *(({"sparsifier": "rcd", **arguments}, word) for arguments, word in BAD_FOR_RCD),
    ],
)
def test_bad_values_are_named(build, tmp_path, arguments, word):
    with pytest.raises(ValueError, match=word):
        build(**arguments)
    assert not (tmp_path / "out").exists()
