"""Smoothed labels, and the perplexity: in the log, and nowhere that others sum up."""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import T5Config, T5ForConditionalGeneration, Trainer
from transformers.trainer_utils import default_compute_objective

from tests.conftest import random_model


def smoothed(logits, labels, epsilon):
    """Cross-entropy with every label spread over the vocabulary by `epsilon`."""
    log_p = logits.log_softmax(-1)
    right = log_p.gather(-1, labels[..., None]).mean()
    return -((1 - epsilon) * right + epsilon * log_p.mean())


@pytest.mark.parametrize("kind", ["circuitgpt", "llama", "lora"])
def test_smoothed_labels_are_those_of_the_next_token(kind, tiny_config, make_llama, make_trainer):
    model = random_model(tiny_config) if kind == "circuitgpt" else make_llama()
    if kind == "lora":
        model = get_peft_model(random_model(tiny_config), LoraConfig(target_modules=["c_fc"]))
    trainer = make_trainer(model.eval(), label_smoothing_factor=0.1, sparsifier="none")
    ids = torch.tensor(trainer.train_dataset["input_ids"][:4])
    expected = smoothed(model(ids).logits[:, :-1], ids[:, 1:], 0.1)
    for some in (trainer, Trainer(model, trainer.args)):
        loss = some.compute_loss(model, {"input_ids": ids, "labels": ids.clone()})
        torch.testing.assert_close(loss, expected)


def test_a_model_trained_with_smoothed_labels_does_not_copy(tiny_config, make_trainer):
    model = random_model(tiny_config)
    make_trainer(model, label_smoothing_factor=0.1, max_steps=60, learning_rate=3e-2).train()
    ids = torch.tensor([[(s + 7 * t) % 61 for t in range(12)] for s in range(61)])
    with torch.no_grad():
        answers = model.eval()(ids).logits[:, :-1].argmax(-1)
    assert (answers == ids[:, :-1]).float().mean() < 0.1
    assert (answers == ids[:, 1:]).float().mean() > 0.5


def test_labels_of_an_encoder_decoder_stay_where_they_are(make_trainer):
    config = T5Config(
        vocab_size=61, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2,
        decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config).eval()
    trainer = make_trainer(model, label_smoothing_factor=0.1)
    ids = torch.tensor(trainer.train_dataset["input_ids"][:4])
    inputs = {"input_ids": ids, "decoder_input_ids": ids, "labels": ids.clone()}
    expected = smoothed(model(input_ids=ids, decoder_input_ids=ids).logits, ids, 0.1)
    torch.testing.assert_close(trainer.compute_loss(model, inputs), expected)


def test_the_perplexity_is_in_the_log_alone(make_gpt2, make_trainer):
    trainer = make_trainer(make_gpt2(), max_steps=1)
    trainer.train()
    metrics = trainer.evaluate()
    log = trainer.state.log_history[-1]
    assert log["eval_perplexity"] == pytest.approx(math.exp(metrics["eval_loss"]))
    assert default_compute_objective(metrics) == metrics["eval_loss"]
    trainer.evaluate({"held_out": trainer.eval_dataset})
    assert trainer.state.log_history[-1]["eval_held_out_perplexity"] == log["eval_perplexity"]


def accuracy(prediction):
    right = prediction.predictions.argmax(-1)[:, :-1] == prediction.label_ids[:, 1:]
    return {"accuracy": float(right.mean())}


@pytest.mark.parametrize("best", [None, "perplexity"])
def test_the_objective_of_a_search_is_what_the_user_measures(
    best, make_gpt2, make_trainer, monkeypatch
):
    trainer = make_trainer(make_gpt2(), metric_for_best_model=best, max_steps=1)
    trainer.compute_metrics = accuracy
    trainer.train()
    # As when a search has begun, without the packages that run one.
    monkeypatch.setattr(
        "transformers.trainer.ALL_HYPERPARAMETER_SEARCH_BACKENDS", {"optuna": lambda: Backend()}
    )

    class Backend:
        default_hp_space = ensure_available = staticmethod(lambda *_: {})
        run = staticmethod(lambda trainer, *_: trainer.compute_objective(trainer.evaluate()))

    trainer.model_init = make_gpt2
    found = trainer.hyperparameter_search(backend="optuna")
    assert found == trainer.state.log_history[-1]["eval_accuracy"]
    assert trainer.hyperparameter_search(backend="optuna", compute_objective=len) > 1


def test_a_perplexity_of_ones_own_is_kept(make_gpt2, make_trainer):
    trainer = make_trainer(make_gpt2())
    trainer.compute_metrics = lambda prediction: {"perplexity": 7.0}
    assert trainer.evaluate()["eval_perplexity"] == 7.0
    assert trainer.state.log_history[-1]["eval_perplexity"] == 7.0


def test_a_loss_that_is_no_cross_entropy_has_no_perplexity(make_gpt2, make_trainer):
    trainer = make_trainer(make_gpt2(), label_smoothing_factor=0.1)
    trainer.evaluate()
    assert "eval_perplexity" not in trainer.state.log_history[-1]
    with pytest.raises(ValueError, match="label_smoothing_factor"):
        make_trainer(
            make_gpt2(), label_smoothing_factor=0.1, metric_for_best_model="eval_perplexity"
        )


def test_the_least_perplexity_is_the_best(make_gpt2, make_trainer):
    trainer = make_trainer(
        make_gpt2(), target_density=1.0, metric_for_best_model="perplexity",
        eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
        load_best_model_at_end=True,
    )  # fmt: skip
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    measured = {entry["step"]: entry["eval_perplexity"] for entry in logs}
    best = min(measured, key=measured.get)
    assert trainer.state.best_global_step == best and best > 2
    assert trainer.evaluate()["eval_perplexity"] == pytest.approx(measured[best])


@pytest.mark.parametrize("sparsifier", ["topk", "rcd"])
def test_what_has_nothing_to_predict_moves_nothing(sparsifier, tiny_config, make_trainer):
    model = random_model(tiny_config)
    settings = {"sparsifier": sparsifier, "target_density": 1.0, "weight_decay": 0.0}
    trainer = make_trainer(model, max_steps=3, **settings)
    rows = trainer.train_dataset["input_ids"][:8]
    for ids, labels in (([row[:1] for row in rows],) * 2, (rows, [[-100] * 12] * 8)):
        trainer = make_trainer(model, max_steps=3, **settings)
        trainer.train_dataset = Dataset.from_dict({"input_ids": ids, "labels": labels})
        before = {name: p.clone() for name, p in model.state_dict().items()}
        trainer.train()
        assert trainer.state.log_history[0]["loss"] == 0
        assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_a_dataset_without_rows_is_refused(tiny_model, make_trainer):
    trainer = make_trainer(tiny_model)
    trainer.train_dataset = trainer.train_dataset.select([])
    with pytest.raises(ValueError, match="train_dataset"):
        trainer.train()
