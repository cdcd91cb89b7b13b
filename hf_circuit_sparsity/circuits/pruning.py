"""Finding a circuit: learn which nodes a behaviour needs (METHOD section 2, Gao et al. 2025 A.5).

One mask parameter τ per node is trained so that the model, with every node of τ ≤ 0 fixed at its
mean, still solves the task with as few nodes as possible. Then nodes are ranked by τ, the smallest
number of them that reaches the target loss is found by bisection, and nodes that turn out not to be
needed are dropped one by one.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..modeling.fingerprint import model_fingerprint
from .ablation import hooked_sites, mean_ablated, mean_activations, node_sites
from .circuit import Circuit
from .edges import site_weights
from .faithfulness import evaluate_circuit
from .reference_tokens import ReferenceTokens, reference_input_ids
from .task_loss import (
    Calibration,
    TaskTensors,
    all_pair_logits,
    binary_loss,
    fit_calibration,
    pair_logits,
    trimmed,
)

Masks = dict[str, torch.Tensor]


class TaskNotLearnedError(ValueError):
    """The model itself does not reach the loss that a circuit of it was asked to reach."""


@dataclass(frozen=True)
class PruningConfig:
    """How [`find_circuit`] looks. The defaults are the centres of the paper's search (A.5)."""

    target_loss: float = 0.15
    """Task loss, in nats, that the circuit must reach; ln 2 ≈ 0.69 is guessing."""
    steps: int = 400
    """Mask updates; 0 ranks nodes by their initial noise only."""
    batch_size: int = 64
    """Prompt pairs per update; each brings two sequences."""
    k_coef: float = 1e-4
    """Price of one open node, in nats."""
    init_mean: float = 0.1
    """Mean of the initial mask parameters."""
    init_std: float = 0.01
    """Standard deviation of the initial mask parameters."""
    temperature: float = 1.0
    """Of the sigmoid whose derivative stands in for the step function's."""
    learning_rate: float = 3e-3
    """Initial; decays linearly to zero."""
    beta2: float = 0.95
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
    reference_tokens: int = 65536
    """Tokens of the pretraining distribution over which means are taken."""
    seed: int = 0
    """Of the initial noise and of the batches."""

    def __post_init__(self) -> None:
        for name in ("target_loss", "temperature", "learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} was passed, but it must be > 0.")
        for name in ("batch_size", "selection_prompts", "reference_tokens", "calibration_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} was passed, but it must be ≥ 1.")
        if not 0 < self.selection_margin <= 1:
            raise ValueError(
                f"selection_margin={self.selection_margin} was passed, but it must be in (0, 1]."
            )


class _Gate(torch.autograd.Function):
    """Heaviside forward; the derivative of a sigmoid with a temperature backward."""

    @staticmethod
    def forward(ctx: Any, tau: torch.Tensor, temperature: float) -> torch.Tensor:
        ctx.save_for_backward(tau)
        ctx.temperature = temperature
        return (tau > 0).to(tau.dtype)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        (tau,) = ctx.saved_tensors
        s = torch.sigmoid(tau / ctx.temperature)
        return grad * s * (1 - s) / ctx.temperature, None


def find_circuit(
    model: nn.Module,
    tokenizer: Any,
    task: Any,
    config: PruningConfig | None = None,
    *,
    reference: ReferenceTokens = None,
    progress: bool = True,
) -> Circuit:
    """Find the smallest circuit of `model` that solves `task`.

    Args:
        model: a `CircuitGPTForCausalLM`; its weights are left as they are.
        tokenizer: the model's.
        task: a `BinaryTask` made with that tokenizer.
        config: how to look.
        reference: sample of the pretraining distribution for the nodes' means: a
            `datasets.Dataset` with an `input_ids` column, or token ids `(n, length)`. If not given,
            the Python standard library, tokenized.
        progress: show a progress bar.

    Returns:
        The circuit, with losses on training and held-out prompts in `.metrics`.

    Raises:
        TaskNotLearnedError: the model itself does not reach `config.target_loss`; says what it
            reaches.
    """
    config = config or PruningConfig()
    node_sites(model)  # fails early on models that have none
    was_training = model.training
    model.eval()
    try:
        train = _sample_rows(task.tensors("train"), config)
        selection = {k: v[: config.selection_prompts] for k, v in train.items()}
        target = config.target_loss * config.selection_margin
        _check_learned(model, task, selection, target, config)

        input_ids = reference_input_ids(model, tokenizer, reference, config.reference_tokens)
        means = mean_activations(model, input_ids)
        scores = _learn_masks(model, train, means, config, progress)
        loss_of = _selector(model, selection, means, config)
        keep = _bisect(scores, target, loss_of)
        keep = _drop_unconnected(model, keep, target, loss_of)
        if config.cleanup:
            keep = _drop_unneeded(keep, scores, target, loss_of, progress)
        _, calibration = loss_of(keep)

        circuit = Circuit(
            nodes={site: mask.nonzero()[:, 0].tolist() for site, mask in keep.items()},
            means={site: mean.cpu() for site, mean in means.items()},
            scores={site: score.cpu() for site, score in scores.items()},
            calibration=calibration,
            task=task.name,
            model_fingerprint=model_fingerprint(model),
            model_name=getattr(getattr(model, "config", None), "_name_or_path", "") or "",
            config=asdict(config),
            example=_example(task),
        )
        circuit.metrics = evaluate_circuit(circuit, model, task)
        return circuit
    finally:
        model.train(was_training)


def _sample_rows(tensors: TaskTensors, config: PruningConfig) -> dict[str, torch.Tensor]:
    """The split's rows in a seeded order, so that any prefix of them is a fair sample."""
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(tensors["target_ids"]), generator=generator)
    return {k: v[order] for k, v in tensors.items()}


def _check_learned(
    model: nn.Module, task: Any, tensors: TaskTensors, target: float, config: PruningConfig
) -> None:
    pairs = all_pair_logits(model, tensors)
    loss = binary_loss(
        fit_calibration(pairs, tensors, config.calibration_steps).pairs(pairs, tensors)
    )
    if not loss <= target:
        raise TaskNotLearnedError(
            f"The whole model reaches a loss of {loss:.3f} on the task {task.name!r}, so no "
            f"circuit of it can reach target_loss={config.target_loss:g} (selected at {target:.3g} "
            "on training prompts); train the model longer, or set target_loss above "
            f"{loss / config.selection_margin:.2f}."
        )


def _learn_masks(
    model: nn.Module, train: TaskTensors, means: Masks, config: PruningConfig, progress: bool
) -> Masks:
    """Train one mask parameter per node and return them, site → `(width,)`."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(config.seed)
    taus = {
        site: (config.init_mean + config.init_std * torch.randn(len(mean), generator=generator))
        .clamp(-1, 1)
        .to(device)
        .requires_grad_()
        for site, mean in means.items()
    }
    parameters = list(taus.values())
    optimizer = torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(0.9, config.beta2),
        weight_decay=config.weight_decay,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 1 - step / max(1, config.steps)
    )
    gates: Masks = {}

    def gate_hook(site: str) -> Callable:
        def hook(module, args, output):
            gate, mean = gates[site].to(output.dtype), means[site].to(output)
            return mean + gate * (output - mean)

        return hook

    weights_need_grad = [p for p in model.parameters() if p.requires_grad]
    bar = tqdm(total=config.steps, desc="learning masks", disable=not progress, leave=False)
    n = len(train["target_ids"])
    try:
        for p in weights_need_grad:
            p.requires_grad_(False)
        with hooked_sites(model, {site: gate_hook(site) for site in taus}):
            for _ in range(config.steps):
                rows = torch.randint(n, (2 * config.batch_size,), generator=generator)
                batch = trimmed({k: v[rows] for k, v in train.items()})
                for site, tau in taus.items():
                    gates[site] = _Gate.apply(tau, config.temperature)
                loss = binary_loss(pair_logits(model, batch))
                open_nodes = sum(gate.sum() for gate in gates.values())
                optimizer.zero_grad()
                (loss + config.k_coef * open_nodes).backward()
                torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
                optimizer.step()
                schedule.step()
                with torch.no_grad():
                    for tau in parameters:
                        tau.clamp_(-1, 1)
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}", nodes=int(open_nodes), refresh=False)
    finally:
        bar.close()
        for p in weights_need_grad:
            p.requires_grad_(True)
    return {site: tau.detach() for site, tau in taus.items()}


LossOf = Callable[[Masks], tuple[float, Calibration]]


def _selector(
    model: nn.Module, selection: TaskTensors, means: Masks, config: PruningConfig
) -> LossOf:
    """Loss, after calibration, of the model cut down to the given nodes."""

    def loss_of(keep: Masks) -> tuple[float, Calibration]:
        with mean_ablated(model, keep, means):
            pairs = all_pair_logits(model, selection)
        calibration = fit_calibration(pairs, selection, config.calibration_steps)
        return binary_loss(calibration.pairs(pairs, selection)).item(), calibration

    return loss_of


def _bisect(scores: Masks, target: float, loss_of: LossOf) -> Masks:
    """The fewest nodes, in order of their scores, that reach the target loss."""
    flat = torch.cat(list(scores.values()))
    order = flat.argsort(descending=True, stable=True)

    def best(k: int) -> Masks:
        kept = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
        kept[order[:k]] = True
        parts = kept.split([len(score) for score in scores.values()])
        return dict(zip(scores, parts, strict=True))

    low, high = 0, len(flat)  # the target is reached at high, not at low
    while high - low > 1:
        middle = (low + high) // 2
        if loss_of(best(middle))[0] <= target:
            high = middle
        else:
            low = middle
    return best(high)


def _drop_unconnected(model: nn.Module, keep: Masks, target: float, loss_of: LossOf) -> Masks:
    """Drop kept nodes that no kept node reads or writes, where that does not cost the target.

    Queries and keys need no reader: the attention scores read them.
    """
    connected = {site: mask.clone() for site, mask in keep.items()}
    changed = True
    while changed:
        changed = False
        reads = {site: torch.zeros_like(mask) for site, mask in connected.items()}
        writes = {site: torch.zeros_like(mask) for site, mask in connected.items()}
        for source, destination, weight in site_weights(model):
            live = weight != 0
            live = live & connected[destination][:, None] & connected[source][None, :]
            reads[source] |= live.any(0)
            writes[destination] |= live.any(1)
        for site, mask in connected.items():
            needed = mask.clone()
            if not site.endswith((".q", ".k", ".resid_delta")):
                needed &= reads[site]
            if not site.endswith(".act_in"):
                needed &= writes[site]
            if not torch.equal(needed, mask):
                connected[site], changed = needed, True
    return connected if loss_of(connected)[0] <= target else keep


def _drop_unneeded(
    keep: Masks, scores: Masks, target: float, loss_of: LossOf, progress: bool
) -> Masks:
    """Drop nodes one by one, cheapest first, as long as the target loss is still reached."""
    keep = {site: mask.clone() for site, mask in keep.items()}
    while True:
        nodes = [(site, i) for site, mask in keep.items() for i in mask.nonzero()[:, 0].tolist()]
        losses = {}
        for site, i in tqdm(nodes, desc="dropping nodes", disable=not progress, leave=False):
            keep[site][i] = False
            losses[site, i] = loss_of(keep)[0]
            keep[site][i] = True
        droppable = sorted((n for n in nodes if losses[n] <= target), key=losses.__getitem__)
        if not droppable:
            return keep
        # In order of what each costs alone; what it costs beside the others is measured again.
        for site, i in droppable:
            keep[site][i] = False
            if loss_of(keep)[0] > target:
                keep[site][i] = True


def _example(task: Any) -> dict[str, Any]:
    """The first held-out prompt, for pictures."""
    row = task.test[0]
    return {
        "prompt": row["prompt"],
        "target": row["target"],
        "counterfactual_target": row["counterfactual_target"],
        "counterfactual_prompt": row["counterfactual_prompt"],
        "token_ids": list(row["input_ids"]),
        "counterfactual_token_ids": list(row["counterfactual_input_ids"]),
        "target_id": int(row["target_id"]),
        "counterfactual_target_id": int(row["counterfactual_target_id"]),
    }
