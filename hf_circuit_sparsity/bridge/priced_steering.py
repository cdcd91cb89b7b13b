"""Steering at a fixed price: how far an answer moves where all other text changes by no more.

Any direction turns an answer if it is followed far enough, and breaks the model on the way. So
directions are compared at the same price, the KL divergence on text that has nothing to do with the
task: channels of a sparse model, the difference of means on the model's own stream (which needs no
sparse model and no bridge), and channels that nobody ranked.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..decoders.decoder import decoder_of
from ..decoders.hooks import temporary_hooks
from ..tasks.binary_task import BinaryTask
from .losses import mean_kl
from .modeling_bridge import BridgedCausalLM
from .steering import SteeringCandidate, answer_probabilities, answer_rows, stream_difference

# Halvings of the interval that holds the scale, after it was found by doublings or larger steps.
_HALVINGS = 8
_DOUBLINGS = 30
_LARGEST_GROWTH = 16.0


class StreamShift(NamedTuple):
    """A direction in which every token's residual stream is moved.

    Attributes:
        location: of the residual stream; see `decoders/decoder.py`.
        vector: float `(width,)`, the move at scale 1.
        channel: of the sparse model, where it is one's.
    """

    location: int
    vector: Tensor
    channel: int | None = None


@dataclass(frozen=True)
class PricedSteering:
    """The best of some directions, as far as the price allowed.

    Attributes:
        shift: the direction that was best on training prompts.
        scale: how far it was followed.
        text_kl: KL(unsteered ‖ steered) on unrelated text, nats per token; at most the price.
        answer_probability: of the answer that is right without steering, mean over held-out
            prompts.
        other_probability: of the other answer.
        unsteered_probability: of the other answer without steering.
    """

    shift: StreamShift
    scale: float
    text_kl: float
    answer_probability: float
    other_probability: float
    unsteered_probability: float


@torch.no_grad()
def channel_shifts(
    bridged: BridgedCausalLM, candidates: Sequence[SteeringCandidate]
) -> list[StreamShift]:
    """The dense stream's moves where sparse channels move by their difference between answers."""
    width = bridged.sparse.config.d_model
    unit = torch.eye(width, device=bridged.sparse.device)
    return [
        StreamShift(
            c.location,
            c.difference * bridged.bridges[c.location].decode_change(unit[c.channel]),
            c.channel,
        )
        for c in candidates
    ]


@torch.no_grad()
def mean_difference_shifts(
    model: PreTrainedModel, task: BinaryTask, target_id: int, rows: int = 128
) -> list[StreamShift]:
    """At every location the difference of a model's stream's means between a task's two answers.

    The usual steering vector without a sparse model (Marks and Tegmark 2023): the mean at the
    answer's position where the other answer is right, minus that where `target_id` is, over
    training prompts.
    """
    first = answer_rows(task, "train", target_id, rows)
    return [
        StreamShift(location, difference)
        for location, difference in enumerate(stream_difference(decoder_of(model), first))
    ]


@contextmanager
def shifted(model: PreTrainedModel, shift: StreamShift, scale: float) -> Iterator[None]:
    """Within the block every token's stream is moved by `scale` times the shift's vector."""

    def edit(x: Tensor) -> Tensor:
        return x + (scale * shift.vector).to(x)

    with temporary_hooks(decoder_of(model).add_edit(shift.location, edit)):
        yield


@torch.no_grad()
def best_at_price(
    model: PreTrainedModel,
    task: BinaryTask,
    target_id: int,
    shifts: Sequence[StreamShift],
    text: Tensor,
    price: float = 0.1,
    *,
    rows: int = 128,
    same: Mapping[int, Tensor] | None = None,
) -> PricedSteering:
    """Of some directions the one that brings the other answer most, each followed up to the price.

    Args:
        model: the one to steer, of any architecture with a [`Decoder`].
        task: the direction is chosen on its training prompts, what is returned is of its held-out
            ones.
        target_id: token id of the answer to steer away from.
        shifts: the directions; where several are compared, let each have as many.
        text: token ids `(n, T)` that have nothing to do with the task.
        price: KL(unsteered ‖ steered) on `text`, nats per token, at most.
        rows: prompts of each split.
        same: as for [`answer_probabilities`].

    Raises:
        ValueError: no shifts, a price that is not above 0, or an answer that the task does not
            have.
    """
    if not shifts:
        raise ValueError("No shifts were passed, expected at least one direction to steer in.")
    if not price > 0:
        raise ValueError(f"price={price} was passed, but it must be above 0 nats per token.")
    train, test = (answer_rows(task, split, target_id, rows) for split in ("train", "test"))
    plain = model(text).logits

    def text_kl(shift: StreamShift, scale: float) -> float:
        with shifted(model, shift, scale):
            return mean_kl(plain, model(text).logits).item()

    def other(shift: StreamShift, scale: float) -> float:
        with shifted(model, shift, scale):
            return answer_probabilities(model, train, same)[1]

    scales = [_scale_at(price, lambda scale, s=shift: text_kl(s, scale)) for shift in shifts]
    best = max(range(len(shifts)), key=lambda i: other(shifts[i], scales[i]))
    shift, scale = shifts[best], scales[best]
    unsteered = answer_probabilities(model, test, same)[1]
    with shifted(model, shift, scale):
        answer, turned = answer_probabilities(model, test, same)
    return PricedSteering(shift, scale, text_kl(shift, scale), answer, turned, unsteered)


def _scale_at(price: float, cost: Callable[[float], float]) -> float:
    """The largest scale found that costs at most the price; 0 if nothing does.

    It begins small, since a direction followed too far can end where it costs less again.
    """
    low, high = 0.0, 2.0**-10
    for _ in range(_DOUBLINGS):
        paid = cost(high)
        if not paid <= price:
            break
        # A small move costs its square.
        growth = (price / paid) ** 0.5 if paid > 0 else _LARGEST_GROWTH
        low, high = high, high * min(max(growth, 2.0), _LARGEST_GROWTH)
    else:  # it changes nothing, however far it is followed
        return low
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if cost(middle) <= price:
            low = middle
        else:
            high = middle
    return low
