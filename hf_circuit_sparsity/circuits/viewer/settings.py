"""How much a report measures."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ReportConfig:
    """Sizes of the samples behind a page, and of what it shows of them."""

    prompts: int = 512
    """Held-out prompts on which losses, ablation effects and activations are measured; all of a
    built-in task's, so that the losses are those that `find_circuit` reports."""
    calibration_prompts: int = 256
    """Training prompts on which the logits of every smaller or larger circuit are calibrated."""
    text_tokens: int = 16384
    """Tokens of pretraining text over which activations are taken."""
    examples: int = 5
    """Examples shown at either end of a node's activations."""
    seed: int = 0
    """Of the choice of prompts; and of the task, where none is passed and the circuit names no
    seed of its own."""

    def __post_init__(self) -> None:
        for name in ("prompts", "calibration_prompts", "text_tokens", "examples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} was passed, but it must be ≥ 1.")
