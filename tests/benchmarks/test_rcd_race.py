"""The race between optimizers: clocks, resuming, and what is compared with what."""

import math

import numpy as np
import pytest
import torch

from benchmarks.findings.optimizer_comparison import ARCHITECTURES, METHODS, builder
from benchmarks.findings.rcd_headline import builders
from benchmarks.findings.rcd_race import Recipe, Training, bigram_loss, race, seconds_to
from benchmarks.findings.rcd_search import parse
from tests.conftest import random_model

BLOCKS = torch.arange(64 * 16).reshape(64, 16) % 61


@pytest.fixture
def make(tiny_config):
    def training(method, steps=6, held="matrices", **settings):
        recipe = Recipe(method, steps, 1e-2, 4, settings)
        sparse = builders(tiny_config, BLOCKS)[1] if held == "nonzeros" else None
        return Training(
            lambda: random_model(tiny_config), recipe, 1 / 8, BLOCKS, BLOCKS[:8], sparse
        )

    return training


def test_when_a_curve_reaches_a_loss():
    curve = [{"loss": 4.0, "seconds": 10.0}, {"loss": 3.0, "seconds": 20.0}]
    assert seconds_to(curve, 4.5) == 10.0
    assert seconds_to(curve, 3.25) == pytest.approx(17.5)
    assert seconds_to(curve, 2.9) is None


def test_the_bigram_loss_is_that_of_the_counts():
    blocks = np.array([[0, 1, 0, 1]] * 50)
    loss, smoothing = bigram_loss(blocks, blocks, 2)
    assert smoothing == 3.0
    # 0 is always followed by 1: (100 + 3 / 2) of 103, and 1 by 0 in all 50 cases.
    expected = -(2 * math.log(101.5 / 103) + math.log(51.5 / 53)) / 3
    assert loss == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("topk", {}),
        ("rcd", {"start_density": 1 / 4}),
        ("rcd", {"start_density": 1 / 4, "held": "nonzeros"}),
        ("adamw", {}),
        ("sgd", {}),
    ],
)
def test_a_race_that_was_interrupted_ends_as_one_that_was_not(make, method, settings, tmp_path):
    whole, halves = make(method, **settings), make(method, **settings)
    race({"a": whole}, tmp_path / "whole", 1e9, 3, lambda line: None)
    halves.run(2)
    halves.evaluate()
    (tmp_path / "halves").mkdir()
    halves.save(tmp_path / "halves" / "a.pt")
    again = make(method, **settings)
    said = []
    race({"a": again}, tmp_path / "halves", 1e9, 3, said.append)
    assert said[0] == "a: going on at step 2"
    assert [p["step"] for p in again.curve] == [p["step"] for p in whole.curve] == [2, 4, 6]
    assert [p["loss"] for p in again.curve] == [p["loss"] for p in whole.curve]
    assert again.curve[-1]["loss"] < again.curve[0]["loss"]
    nonzeros, entries = again.nonzeros()
    if method in ("topk", "rcd"):
        assert entries / 10 < nonzeros < entries / 4
    for training in (whole, halves, again):
        training.close()


def test_lines_of_a_search():
    recipe = parse("rcd steps=12 lr=2e-2 block_fraction=1/4 selection=gradient")
    assert recipe == Recipe("rcd", 12, 0.02, 4, {"block_fraction": 0.25, "selection": "gradient"})
    with pytest.raises(ValueError, match="does not begin with topk or rcd"):
        parse("adam lr=1")
    with pytest.raises(ValueError, match=r"'fast' in .* is not name=value"):
        parse("rcd fast")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_optimizer_trains_every_architecture(architecture):
    build = builder(architecture, 64, 1, 64)
    blocks = BLOCKS % 64
    for kind, (*_, lr), settings in METHODS.values():
        training = Training(build, Recipe(kind, 4, lr, 4, settings), 1 / 8, blocks, blocks[:4])
        before = training.evaluate()
        training.run(4)
        assert training.evaluate() < before
        training.close()
