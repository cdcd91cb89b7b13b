"""Trying on a dense model what its sparse model says: which channel to move, and what that does.

Gao et al. 2025 (bridges): move one sparse channel, decode the difference, add it to the dense
stream, and watch the dense model's answer, against no steering and against random channels.
"""

import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..circuits.circuit import Circuit
from ..circuits.task_scores import TaskTensors, trimmed
from ..decoders.decoder import Decoder, position_ids
from ..files import save_figure
from ..tasks.binary_task import BinaryTask
from .intervention import RESIDUAL_SITES, steering_point
from .losses import mean_kl
from .modeling_bridge import BridgedCausalLM


class SteeringCandidate(NamedTuple):
    """A sparse channel that tells a task's two answers apart.

    Attributes:
        location: of the residual stream; see `decoders/decoder.py`.
        channel: its index there.
        difference: its mean value, at the answer's position, where the other answer is right minus
            where the first one is. Moving the channel by it should turn the one answer into the
            other.
        effect: what that should add to the dense model's logit of the other answer minus that of
            the first, to first order.
    """

    location: int
    channel: int
    difference: float
    effect: float


def answer_rows(task: BinaryTask, split: str, target_id: int, rows: int) -> dict[str, torch.Tensor]:
    """The first `rows` prompts of a split whose right answer is `target_id`, as tensors.

    Raises:
        ValueError: there are none.
    """
    tensors = task.tensors(split)
    chosen = (tensors["target_ids"] == target_id).nonzero().flatten()[:rows]
    if not len(chosen):
        answers = sorted(tensors["target_ids"].unique().tolist())
        raise ValueError(
            f"No {split} prompt of {task.name!r} has the answer {target_id}; its answers are the "
            f"tokens {answers[:10]}{'…' if len(answers) > 10 else ''}."
        )
    return trimmed({name: tensor[chosen] for name, tensor in tensors.items()})


def steering_candidates(
    bridged: BridgedCausalLM,
    task: BinaryTask,
    target_id: int,
    *,
    circuit: Circuit | None = None,
    rows: int = 128,
) -> list[SteeringCandidate]:
    """Channels to steer from one answer of a task to the other, the largest effect first.

    Args:
        bridged: with trained bridges.
        task: its training prompts are used.
        target_id: token id of the answer to steer away from.
        circuit: of the sparse model; only channels it reads from or writes to the residual stream
            are candidates.
        rows: prompts per answer.
    """
    first = answer_rows(task, "train", target_id, rows)
    differences = stream_difference(bridged.sparse_stream, first)
    gradients = margin_gradients(bridged.dense_stream, first)
    places = None if circuit is None else {
        (steering_point(bridged.sparse, site, node).location, node)
        for site, nodes in circuit.nodes.items() if site.rpartition(".")[2] in RESIDUAL_SITES
        for node in nodes if node < bridged.sparse.config.d_model
    }  # fmt: skip
    candidates = []
    for location, bridge in enumerate(bridged.bridges):
        difference = differences[location]
        with torch.no_grad():
            identity = torch.eye(len(difference), device=difference.device)
            effect = difference * (bridge.decode_change(identity).float() @ gradients[location])
        for channel, values in enumerate(zip(difference.tolist(), effect.tolist(), strict=True)):
            if places is None or (location, channel) in places:
                candidates.append(SteeringCandidate(location, channel, *values))
    return sorted(candidates, key=lambda candidate: -candidate.effect)


def margin_gradients(stream: Decoder, rows: TaskTensors) -> list[torch.Tensor]:
    """Location by location, what moving every token's stream by one vector adds to the logit of the
    other answer minus that of the right one, to first order: the gradient, float32 `(width,)`.

    Args:
        stream: of a model.
        rows: prompt pairs; the mean over them.
    """
    right, other = rows["target_ids"][:, None], rows["counterfactual_target_ids"][:, None]
    with torch.no_grad():
        x, context = stream.embed(rows["input_ids"], rows["attention_mask"])
    with torch.enable_grad():
        streams = stream.run(x.detach().requires_grad_(), context)
        logits = stream.logits(streams[-1], context)[:, -1].float()
        margin = (logits.gather(1, other) - logits.gather(1, right)).mean()
        gradients = torch.autograd.grad(margin, streams)
    return [gradient.sum((0, 1)).float() for gradient in gradients]


@torch.no_grad()
def stream_difference(stream: Decoder, rows: TaskTensors) -> list[torch.Tensor]:
    """Location by location, the mean residual stream at the answer's position of the counterfactual
    prompts minus that of the prompts, float32 `(width,)`.

    Args:
        stream: of a model.
        rows: prompt pairs, all of one answer.
    """
    means = []
    for side in ("", "counterfactual_"):  # the same pairs, seen from the other side
        start = stream.embed(rows[f"{side}input_ids"], rows[f"{side}attention_mask"])
        means.append([x[:, -1].float().mean(0) for x in stream.run(*start)])
    return [other - first for first, other in zip(*means, strict=True)]


@dataclass(frozen=True)
class SteeringSweep:
    """What steering did to the dense model, by strength; probabilities are means over prompts.

    Attributes:
        task: its name.
        where, channel, mode: what was steered.
        answer, other: the two answers, as text.
        strengths: as in the sparse model.
        other_probability: of the answer that is wrong without steering.
        answer_probability: of the answer that is right without steering.
        random_probability: of the other answer, for every random channel.
        text_kl: KL(unsteered ‖ steered) on unrelated text, nats per token; empty without text.
        random_text_kl: the same for every random channel.
    """

    task: str
    where: int | str
    channel: int
    mode: str
    answer: str
    other: str
    strengths: list[float]
    other_probability: list[float]
    answer_probability: list[float]
    random_probability: list[list[float]]
    text_kl: list[float]
    random_text_kl: list[list[float]]

    @property
    def unsteered_probability(self) -> float:
        """Probability of the other answer without steering."""
        return self.other_probability[self.strengths.index(0.0)]

    def plot(self, path: str | os.PathLike, title: str | None = None) -> Path:
        """Draw the probabilities against strength, with both controls, into a PNG, SVG or PDF file.

        Raises:
            ImportError: matplotlib is not installed.
        """

        def draw(figure_class: type) -> Any:
            figure = figure_class(figsize=(5.2, 3.4), layout="constrained")
            self.draw(figure.subplots(), title)
            return figure

        return save_figure(path, draw, dpi=150)

    def draw(self, axes: Any, title: str | None = None) -> None:
        """[`plot`] into axes of matplotlib."""
        # Not as repr: quotes around quotes cannot be told apart in a picture.
        answer, other = (f"‹{text}›".replace("\n", "\\n") for text in (self.answer, self.other))
        for i, line in enumerate(self.random_probability):
            label = None if i else f"{other}, random channels"
            axes.plot(self.strengths, line, "#9a9a9a", linewidth=0.8, zorder=1, label=label)
        axes.axhline(
            self.unsteered_probability, color="#1b1b1b", linestyle=":", linewidth=1,
            label=f"{other}, unsteered",
        )  # fmt: skip
        axes.plot(self.strengths, self.answer_probability, "#0067a5", label=answer)
        axes.plot(self.strengths, self.other_probability, "#c65300", linewidth=2, label=other)
        where = f"location {self.where}" if isinstance(self.where, int) else self.where
        axes.set_xlabel(f"strength at {where}, channel {self.channel} (as in the sparse model)")
        axes.set_ylabel("dense model's probability")
        axes.set_ylim(-0.02, 1.02)
        axes.set_title(title or f"{self.task}: steering {answer} to {other}")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)


@torch.no_grad()
def steering_sweep(
    bridged: BridgedCausalLM,
    task: BinaryTask,
    target_id: int,
    where: int | str,
    channel: int,
    strengths: Sequence[float],
    *,
    mode: str = "add",
    text: torch.Tensor | None = None,
    random_channels: int = 8,
    rows: int = 128,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> SteeringSweep:
    """Steer a dense model with growing strength and measure its answer, with two controls.

    The controls are no steering (strength 0 is added if missing), and other channels at `where`,
    drawn at random and scaled so that the dense stream moves by a vector of the same length.

    Args:
        bridged: with trained bridges.
        task: its held-out prompts with the answer `target_id` are used.
        target_id: token id of the answer to steer away from.
        where, channel, mode: as for [`BridgedCausalLM.steer`]; every token is steered.
        strengths: as in the sparse model.
        text: token ids `(n, T)` of unrelated text, to measure how much else changes.
        random_channels: how many.
        rows: prompts.
        seed: of the random channels.
        tokenizer: if given, the probability of an answer is that of all tokens whose text begins
            with it: a quote may end a string alone or together with the bracket behind it.

    Raises:
        ValueError: there is no such site, channel or answer.
    """

    def length(c: int) -> float:
        point = steering_point(bridged.sparse, where, c)
        return bridged.bridges[point.location].decode_change(point.direction).norm().item()

    width = bridged.sparse.config.d_model
    if not steering_point(bridged.sparse, where, channel).is_residual:
        width = bridged.sparse.node_sites()[where].width
    tensors = answer_rows(task, "test", target_id, rows)
    row = next(r for r in task.test if r["target_id"] == target_id)
    strengths = sorted({0.0, *map(float, strengths)})
    others = [c for c in range(width) if c != channel]
    others = random.Random(seed).sample(others, min(random_channels, len(others)))
    controls = [(c, length(channel) / length(c)) for c in others if length(c) > 0]
    plain_text = None if text is None else bridged.dense(text).logits
    same = None if tokenizer is None else tokens_beginning_alike(tokenizer, tensors)

    def measure(c: int, scale: float = 1.0) -> tuple[list[float], list[float], list[float]]:
        answers, others, kls = [], [], []
        for strength in strengths:
            with bridged.steer(where, c, strength * scale, mode=mode):
                answer, other = answer_probabilities(bridged.dense, tensors, same)
                if plain_text is not None:
                    kls.append(mean_kl(plain_text, bridged.dense(text).logits).item())
            answers.append(answer)
            others.append(other)
        return answers, others, kls

    answer_probability, other_probability, text_kl = measure(channel)
    controlled = [measure(c, scale) for c, scale in controls]
    return SteeringSweep(
        task.name, where, channel, mode, row["target"], row["counterfactual_target"], strengths,
        other_probability=other_probability, answer_probability=answer_probability,
        random_probability=[others for _, others, _ in controlled],
        text_kl=text_kl, random_text_kl=[kls for *_, kls in controlled],
    )  # fmt: skip


def answer_probabilities(
    model: PreTrainedModel, tensors: TaskTensors, same: Mapping[int, torch.Tensor] | None = None
) -> tuple[float, float]:
    """A model's mean probability of the right and of the other answer.

    Args:
        model: any causal language model.
        tensors: of the prompts.
        same: for each answer the tokens that count as it; see [`tokens_beginning_alike`].
    """
    ids, mask = tensors["input_ids"], tensors["attention_mask"]
    # Not every architecture counts positions from the mask.
    output = model(
        input_ids=ids, attention_mask=mask, position_ids=position_ids(ids, mask), use_cache=False
    )
    p = F.softmax(output.logits[:, -1].float(), dim=-1)

    def mean_of(answers: torch.Tensor) -> float:
        if same is None:
            return p.gather(1, answers[:, None]).mean().item()
        rows = [line[same[answer]].sum() for line, answer in zip(p, answers.tolist(), strict=True)]
        return torch.stack(rows).mean().item()

    return mean_of(tensors["target_ids"]), mean_of(tensors["counterfactual_target_ids"])


def tokens_beginning_alike(
    tokenizer: PreTrainedTokenizerBase, tensors: TaskTensors
) -> dict[int, torch.Tensor]:
    """For every answer of some prompts, the ids of the tokens whose text begins with its text."""
    answers = torch.cat([tensors["target_ids"], tensors["counterfactual_target_ids"]])
    texts = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    return {
        answer: torch.tensor([i for i, text in enumerate(texts) if text.startswith(texts[answer])])
        for answer in answers.unique().tolist()
    }
