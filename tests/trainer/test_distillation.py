"""The dense original as a teacher of the model that becomes sparse."""

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F

from hf_circuit_sparsity.trainer.distillation import kl_to_teacher


def test_the_divergence_is_that_of_the_next_tokens():
    torch.manual_seed(0)
    ours, teachers = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    labels = torch.randint(0, 7, (2, 5))
    labels[0, 2:] = -100
    expected = []
    for row in range(2):
        for position in range(4):
            if labels[row, position + 1] != -100:
                q, p = ours[row, position].softmax(-1), teachers[row, position].softmax(-1)
                expected.append((p * (p / q).log()).sum())
    assert len(expected) == 5
    total = torch.stack(expected).sum()
    torch.testing.assert_close(kl_to_teacher(ours, teachers, labels), total / 5)
    torch.testing.assert_close(kl_to_teacher(ours, teachers, labels, 20), total / 20)


def test_the_loss_is_a_share_of_each(make_gpt2, make_trainer, dataset):
    model, teacher = make_gpt2(seed=0), make_gpt2(seed=1)
    ids = torch.tensor(dataset["input_ids"][:4])
    batch = {"input_ids": ids, "labels": ids}
    p, q = (m(ids).logits[:, :-1].log_softmax(-1) for m in (teacher.eval(), model))
    kl = (p.exp() * (p - q)).sum(-1).mean()
    entropy = F.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    trainer = make_trainer(model, distillation_weight=0.75)
    trainer.teacher = teacher
    torch.testing.assert_close(
        trainer.compute_loss(model.train(), dict(batch)), 0.25 * entropy + 0.75 * kl
    )
    torch.testing.assert_close(trainer.compute_loss(model.eval(), dict(batch)), entropy)


@pytest.mark.parametrize("sparsifier", ["topk", "rcd"])
def test_a_pretrained_model_stays_nearer_to_what_it_was(sparsifier, make_llama, make_trainer):
    pretrained = make_llama()
    make_trainer(pretrained, name="first", max_steps=60, sparsifier="none").train()
    before = pretrained.state_dict()
    ids = torch.randint(0, 61, (64, 12), generator=torch.Generator().manual_seed(1))
    other = Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.tolist()})

    def divergence(weight):
        model = make_llama(seed=1)
        model.load_state_dict(before)
        trainer = make_trainer(
            model, name=f"{sparsifier}{weight}", max_steps=30, distillation_weight=weight,
            sparsifier=sparsifier, target_density=0.5, learning_rate=1e-3,
        )  # fmt: skip
        trainer.train_dataset = other
        trainer.train()
        if weight:  # the copy is of the dense model, and nobody trained it
            for name, tensor in trainer.teacher.state_dict().items():
                assert torch.equal(tensor, before[name])
        with torch.no_grad():
            logits = pretrained.eval()(ids).logits
            return float(kl_to_teacher(model.eval()(ids).logits, logits, ids))

    assert divergence(1.0) < 0.75 * divergence(0.0)


def test_what_cannot_be_taught_is_refused(make_gpt2, make_trainer):
    with pytest.raises(ValueError, match="distillation_weight"):
        make_trainer(make_gpt2(), distillation_weight=1.5)
    trainer = make_trainer(make_gpt2())
    with pytest.raises(ValueError, match="distillation_weight"):
        type(trainer)(make_gpt2(), trainer.args, teacher=make_gpt2())


def test_the_teacher_computes_in_the_precision_of_training(make_llama, make_trainer, dataset):
    trainer = make_trainer(make_llama(), max_steps=1, distillation_weight=0.5, bf16=True)
    seen = set()
    layer = trainer.teacher.model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda module, args, output: seen.add(output.dtype))
    trainer.train()
    assert seen == {torch.bfloat16}
