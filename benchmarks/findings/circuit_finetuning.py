"""Fine-tuning the weights of one circuit, against other small adapters: what else does it move?

A sparse model is taught to close strings with the *other* quote. Only the answer to that task
should change.
"""

import copy
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, TinyLoraConfig, get_peft_model
from torch.nn import functional as F

from hf_circuit_sparsity.adapters import CircuitPeftConfig
from hf_circuit_sparsity.bridge.losses import mean_kl
from hf_circuit_sparsity.circuits.circuit import Circuit
from hf_circuit_sparsity.circuits.pruning.config import PruningConfig
from hf_circuit_sparsity.circuits.task_scores import (
    all_pair_logits,
    binary_loss,
    pair_logits,
    trimmed,
)
from hf_circuit_sparsity.commands.console import say
from hf_circuit_sparsity.modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from hf_circuit_sparsity.tasks.encoding import TaskNotExpressibleError
from hf_circuit_sparsity.tasks.load import list_tasks, load_task

from ..experiment import Experiment, machine, mean, table
from .bridge_models import BLOCK_SIZE, circuit_of, sample_text, text_blocks
from .trained_models import FOLDER, load_trained

MODEL = "topk-128-seed0"
TASK = "single_double_quote"
BATCH_SIZE = 32
LINEAR = r"transformer\.h\.\d+\.(attn|mlp)\.(c_attn|c_proj|c_fc)"
# Adam's peak learning rates; of these, each method gets the one with which it learns best.
LEARNING_RATES = (0.01, 0.03, 0.1)


def opposite_loss(pairs: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of giving the other answer; guessing is 0.693."""
    return F.softplus(pairs[:, 0] - pairs[:, 1]).mean()


def follows(pairs: torch.Tensor) -> float:
    """Share of prompts that are given the other answer."""
    return (pairs[:, 1] > pairs[:, 0]).float().mean().item()


def teach(model: PeftModel, tensors: dict[str, torch.Tensor], rate: float, steps: int) -> float:
    """Train the adapter to give the other answer; returns the last steps' mean loss."""
    generator = torch.Generator().manual_seed(0)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trainable, lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    losses = []
    model.eval()
    for _ in range(steps):
        rows = torch.randint(len(tensors["target_ids"]), (BATCH_SIZE,), generator=generator)
        loss = opposite_loss(pair_logits(model, trimmed({k: v[rows] for k, v in tensors.items()})))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return mean(losses[-10:])


def adapters(model: CircuitGPTForCausalLM, circuit: Circuit, tokens: list[int]) -> dict[str, Any]:
    """The adapters compared, by name: their configs."""
    last = CircuitPeftConfig.from_circuit(circuit, model, tokens, into=["resid_delta"])
    count = sum(map(len, last.edges.values()))
    whole = {"target_modules": LINEAR, "r": 1}
    return {
        "the circuit's last edges": last,
        "all of the circuit's edges": CircuitPeftConfig.from_circuit(circuit, model, tokens),
        "TinyLoRA, as many parameters as the last edges": TinyLoraConfig(
            target_modules=LINEAR, r=2, u=count, weight_tying=1.0
        ),
        "LoRA, rank 1, the circuit's smallest layer": LoraConfig(
            r=1, lora_alpha=1, target_modules=["transformer.h.0.attn.c_proj"]
        ),
        "LoRA, rank 1, every layer": LoraConfig(lora_alpha=1, **whole),
    }


@torch.no_grad()
def side_effects(
    model: torch.nn.Module,
    before: dict[str, float],
    tasks: dict[str, Any],
    text: torch.Tensor,
    plain: torch.Tensor,
) -> tuple[float, float, float]:
    """Mean and largest change of the other tasks' losses, and KL on unrelated text."""
    changes = [
        abs(binary_loss(all_pair_logits(model, task)).item() - before[name])
        for name, task in tasks.items()
    ]
    kl = mean_kl(plain, model(text).logits).item()
    return mean(changes), max(changes), kl


def run(experiment: Experiment) -> str:
    """Teach every adapter, measure it and return the report."""
    folder, options = experiment.folder, experiment.options
    model, tokenizer = load_trained(MODEL, folder)
    _, blocks = text_blocks(folder)
    task = load_task(TASK, tokenizer, n_train=1000, n_test=256, max_length=BLOCK_SIZE)
    circuit = circuit_of(
        model, task, blocks, folder / "circuits" / f"{MODEL}-{TASK}",
        PruningConfig(max_steps=200),
    )  # fmt: skip
    others = {}
    for name in list_tasks("python"):
        if name == TASK or name.startswith("fstring"):
            continue
        with suppress(TaskNotExpressibleError):
            other = load_task(
                name, tokenizer, n_train=2, n_test=options.rows, max_length=BLOCK_SIZE
            )
            others[name] = other.tensors("test")
    text = sample_text(blocks["validation"], 32)
    with torch.no_grad():
        before = {n: binary_loss(all_pair_logits(model, t)).item() for n, t in others.items()}
        plain = model(text).logits
    train, test = task.tensors("train"), task.tensors("test")
    rows = []
    for name, config in adapters(model, circuit, sorted(set(task.train["target_id"]))).items():
        tried = []
        for rate in LEARNING_RATES:
            torch.manual_seed(0)
            adapted = get_peft_model(copy.deepcopy(model), copy.deepcopy(config))
            tried.append((teach(adapted, train, rate, options.steps), rate, adapted))
        _, rate, adapted = min(tried, key=lambda run: run[0])
        with tempfile.TemporaryDirectory() as saved:
            adapted.save_pretrained(saved)
            size = sum(path.stat().st_size for path in Path(saved).glob("adapter_*"))
        pairs = all_pair_logits(adapted, test)
        change, most, kl = side_effects(adapted, before, others, text, plain)
        count = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        rows.append(
            {
                "adapter": name,
                "parameters": f"{count:,}",
                "KiB": f"{size / 1024:.1f}",
                "learning rate": f"{rate:g}",
                "loss on the new rule": f"{opposite_loss(pairs).item():.3f}",
                "follows it": f"{follows(pairs):.0%}",
                "other tasks: mean change": f"{change:.3f}",
                "largest": f"{most:.3f}",
                "KL on text": f"{kl:.4f}",
            }
        )
        say(f"  {rows[-1]}")
    untouched = all_pair_logits(model, test)
    head = (
        f"{options.steps} Adam steps of {BATCH_SIZE} prompts on `{TASK}` with the two answers "
        "swapped, each method with the best of the learning rates "
        f"{', '.join(map(str, LEARNING_RATES))} by training loss. The circuit's last edges are "
        "those that write to the residual stream and the unembedding's of the two answers; trained "
        "with the earlier ones, these wear out before the last have turned round, and the answer "
        f"ends up a guess. Before: loss {opposite_loss(untouched).item():.3f}, "
        f"{follows(untouched):.0%} of held-out strings closed with the other quote. The other "
        f"tasks are {len(others)} of the twenty (without the quote and f-string ones), "
        f"{options.rows} prompts each; change is of the binary loss, in nats; KL is "
        "KL(before ‖ after) on unrelated validation text, nats per token."
    )
    return "\n\n".join(["# Fine-tuning one circuit", machine(), head, table(rows)])


if __name__ == "__main__":
    Experiment.main(run, __doc__, "circuit_finetuning", str(FOLDER), steps=60, rows=64)
