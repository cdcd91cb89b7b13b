"""The settings of [`find_circuit`]."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

_OLD_NAMES = {
    "steps": "max_steps",
    "k_coef": "node_penalty",
    "beta2": "adam_beta2",
    "seeds": "num_seeds",
}
_POSITIVE = (
    "target_loss", "temperature", "learning_rate", "max_grad_norm", "memory_gb", "adversary_rate",
)  # fmt: skip
_AT_LEAST_ONE = (
    "batch_size", "selection_prompts", "reference_tokens", "calibration_steps", "num_seeds",
    "adversary_steps", "selection_supersets", "interchange_depths",
)  # fmt: skip
_NOT_NEGATIVE = (
    "max_steps", "screen_prompts", "node_penalty", "weight_decay", "init_std", "adversary_restart",
    "adversary_nodes", "interchange",
)  # fmt: skip


Outside = Literal["off", "random", "adversarial"]
AblationKind = Literal["mean", "task_mean", "zero", "resample"]
Objective = Literal["candidates", "kl"]


@dataclass(frozen=True)
class PruningConfig:
    """How [`find_circuit`] looks. The defaults are the centres of the paper's search (A.5)."""

    target_loss: float = 0.15
    """Task loss, in nats, that the circuit must reach; ln 2 ≈ 0.69 is guessing."""
    max_steps: int = 400
    """Mask updates; 0 ranks nodes by their initial noise only."""
    batch_size: int = 64
    """Prompt pairs per update; each brings two sequences."""
    node_penalty: float = 1e-4
    """Price of one open node, in nats."""
    init_mean: float = 0.1
    """Mean of the initial mask parameters."""
    init_std: float = 0.01
    """Standard deviation of the initial mask parameters."""
    temperature: float = 1.0
    """Of the sigmoid whose derivative stands in for the step function's."""
    learning_rate: float = 3e-3
    """Initial; decays linearly to zero."""
    adam_beta2: float = 0.95
    """AdamW's second moment decay."""
    weight_decay: float = 1e-3
    """AdamW's, pulls mask parameters to the threshold."""
    max_grad_norm: float = 1.0
    """Gradient norm above which the gradient is scaled down."""
    calibration_steps: int = 16
    """L-BFGS steps for the scale and shift of the logits."""
    selection_margin: float = 0.8
    """Circuits are selected at this fraction of the target loss on training prompts, so that
    held-out prompts, which may be harder, stay within the target."""
    selection_prompts: int = 1024
    """Training prompts on which candidate circuits are compared."""
    cleanup: bool = True
    """Drop, one by one, kept nodes without which the circuit still reaches the target."""
    screen_prompts: int = 128
    """Prompts on which the clean-up first tries what it may drop; what looks hopeless there is not
    tried on all. 0 tries everything on all of them."""
    prune_edges: bool = False
    """Also drop single weights between kept nodes, as long as the target is reached."""
    token_nodes: bool = False
    """Also ask which tokens' embeddings are needed; the others are fixed at the mean embedding."""
    reference_tokens: int = 65536
    """Tokens of the pretraining distribution over which means are taken."""
    seed: int = 0
    """Of the initial noise and of the batches."""
    num_seeds: int = 1
    """Masks are learned from this many seeds, `seed` onwards; the smallest circuit wins."""
    distractor_fraction: float = 0.0
    """Share of the training prompts before which a finished example of the other answer is put, so
    that a circuit that looks for a cue anywhere does not do; for the built-in tasks that have such
    prompts. Held-out prompts stay as they are."""
    outside: Outside = "off"
    """What else is on while the circuit must answer, beside nothing: nothing ever, a random part of
    the rest, one draw per batch, or the part that an adversary picks for the whole batch."""
    adversary_steps: int = 2
    """Ascent steps of the adversary before every mask update; it goes on from its last choice."""
    adversary_restart: int = 20
    """Mask updates after which it starts anew, from a random part; 0 for never."""
    adversary_rate: float = 0.25
    """How far a gate moves in one of its steps."""
    adversary_nodes: int = 0
    """How many nodes of the rest it may switch on; 0 for as many as it likes."""
    selection_supersets: int = 8
    """Where candidate circuits are compared: random parts, or ascent steps of the adversary."""
    interchange: float = 0.0
    """Weight of a second loss: with some of the circuit's nodes swapped from the counterfactual
    prompt, the circuit alone must answer as the whole model does, which a part that only goes with
    the answer mostly does not bring about. Then candidates must be as close as the target, in nats,
    under every swap tried. Needs prompts as long as their counterfactuals. 0 does not ask."""
    interchange_depths: int = 4
    """Candidates are compared with nodes up to so many depths swapped, evenly spaced: all of them,
    a random half, and the other half. Learning masks draws from all depths."""
    ablation: AblationKind = "mean"
    """What a closed node is: its mean over the reference or over the task's prompts, zero, or what
    it is in the counterfactual prompt. A circuit found by the last one runs at reference means."""
    freeze_norms: bool = False
    """Norms divide by what they divide by in the whole model, so that they do not make up for what
    is gone."""
    objective: Objective = "candidates"
    """What masks minimize: the loss on the two candidates, or KL(model ‖ circuit) over the
    vocabulary. Circuits are selected by the former."""
    memory_gb: float = 4.0
    """Activations that learning masks may hold, in GB, roughly; the masks of as many seeds as fit
    are learned together in one forward pass."""

    @classmethod
    def from_stored(cls, values: Mapping[str, Any], **changes: Any) -> "PruningConfig":
        """The settings in a circuit's `config`, also where an earlier version named them.

        Args:
            values: settings by name; what is none is left out.
            changes: settings to set in place of those.
        """
        known = {field.name for field in fields(cls)}
        named = {_OLD_NAMES.get(name, name): value for name, value in values.items()}
        return cls(**{**{n: v for n, v in named.items() if n in known}, **changes})

    def __post_init__(self) -> None:
        for names, fits, bound in (
            (_POSITIVE, lambda value: value > 0, "> 0"),
            (_AT_LEAST_ONE, lambda value: value >= 1, "≥ 1"),
            (_NOT_NEGATIVE, lambda value: value >= 0, "≥ 0"),
            (("selection_margin",), lambda value: 0 < value <= 1, "in (0, 1]"),
            (("distractor_fraction",), lambda value: 0 <= value <= 1, "in [0, 1]"),
        ):
            for name in names:
                value = getattr(self, name)
                if not fits(value):
                    raise ValueError(f"{name}={value} was passed, but it must be {bound}.")
        for name, choices in (
            ("outside", get_args(Outside)),
            ("ablation", get_args(AblationKind)),
            ("objective", get_args(Objective)),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} was passed, but it must be one of "
                    f"{', '.join(choices)}."
                )
