"""Learning masks, and a circuit on its open nodes alone, against plain code.

An update of masks: "plain" computes every position of every layer with dense matrices, AbsTopK by
`torch.topk` and attention written out, with hooks that put each site's gates on; "ours" is what
`find_circuit` does. Both take the same prompts and compute logits at the answer alone.

The nodes are drawn at random, evenly over the sites. "hooks" is `circuit.apply`; "collapsed" is
what searches compute, with the same hooks on matrices that read open nodes only; the program
answers one prompt at a time, so its time is that of as many calls.
"""

import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from hf_circuit_sparsity.circuits.ablation import mean_activations, measuring, node_sites
from hf_circuit_sparsity.circuits.circuit import Circuit
from hf_circuit_sparsity.circuits.collapse import Collapse
from hf_circuit_sparsity.circuits.gating import frozen_weights
from hf_circuit_sparsity.circuits.pruning.config import PruningConfig
from hf_circuit_sparsity.circuits.pruning.masks import Gate, learn_masks
from hf_circuit_sparsity.circuits.task_scores import binary_loss
from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig
from hf_circuit_sparsity.modeling.fingerprint import model_fingerprint
from hf_circuit_sparsity.modeling.modeling_circuitgpt import CircuitGPTForCausalLM

from ..experiment import Experiment, table
from .plain import plainly, random_sparse_model
from .timing import interleaved, main, ratio, settings

TOKENS = 40


def run(experiment: Experiment) -> str:
    """The table."""
    device, dtype, quick = settings(experiment)
    rows = []
    for name, make, prompts, sizes in _models(quick):
        model = make().to(device, dtype).eval()
        for nodes in sizes:
            row = {"model": name, "nodes": str(nodes), "prompts": str(prompts)}
            rows.append(row | _measured(model, nodes, prompts, device, 2 if quick else 3))
    updates = [
        _update(width, layers, density, pairs, 2 if quick else 5)
        for width, layers, density, pairs in (
            [(32, 1, 0.1, 4)] if quick else [(128, 2, 0.05, 64), (512, 4, 1 / 64, 16)]
        )
    ]
    return f"{table(updates)}\n\n{table(rows)}"


def _update(width: int, layers: int, density: float, pairs: int, rounds: int) -> dict[str, str]:
    """One update of masks, plainly and ours."""
    times = interleaved(mask_updates(_sparse(width, layers, density), pairs), rounds, "cpu")
    return {
        "update of masks": f"CircuitGPT, d_model {width}, {layers} layers, density {density:.3g}",
        "sequences × tokens": f"{2 * pairs} × {TOKENS}",
        "plain, ms": str(times["plain"]),
        "ours, ms": str(times["ours"]),
        "plain / ours": ratio(times["plain"], times["ours"]),
    }


def mask_updates(model: nn.Module, pairs: int) -> dict[str, Callable[[], object]]:
    """One update of masks on so many pairs of prompts, "plain" and "ours"."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, model.config.vocab_size, (2 * pairs, TOKENS), generator=generator)
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    rows |= {f"counterfactual_{name}": rows[name][torch.arange(2 * pairs) ^ 1] for name in rows}
    rows["target_ids"] = torch.arange(2 * pairs) % 2 + 1
    rows["counterfactual_target_ids"] = 3 - rows["target_ids"]
    means = mean_activations(model, ids[:4])
    config = PruningConfig(max_steps=1, batch_size=pairs)

    def ours() -> object:
        with measuring(model):
            return learn_masks(model, rows, means, config, [0], progress=False)

    def plain() -> object:
        with plainly(model):
            return _plain_update(model, rows, means, config)

    return {"plain": plain, "ours": ours}


def _plain_update(
    model: nn.Module, rows: dict[str, torch.Tensor], means: dict[str, torch.Tensor],
    config: PruningConfig,
) -> None:  # fmt: skip
    """As one writes it first."""
    sites = node_sites(model)
    taus = {
        name: torch.full((site.width,), 0.1, requires_grad=True) for name, site in sites.items()
    }
    optimizer = torch.optim.AdamW(taus.values(), lr=config.learning_rate)
    chosen = torch.randint(len(rows["target_ids"]), (2 * config.batch_size,))
    gates = {name: Gate.apply(tau, config.temperature) for name, tau in taus.items()}

    def put_on(name: str) -> Callable[..., torch.Tensor]:
        mean = means[name]
        return lambda module, args, x: mean + gates[name] * (x - mean)

    handles = [site.register_forward_hook(put_on(name)) for name, site in sites.items()]
    with frozen_weights(model):
        ids = rows["input_ids"][chosen]
        logits = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        answers = [rows[name][chosen, None] for name in ("target_ids", "counterfactual_target_ids")]
        loss = binary_loss(logits.gather(1, torch.cat(answers, 1)))
        (loss + config.node_penalty * sum(gate.sum() for gate in gates.values())).backward()
    torch.nn.utils.clip_grad_norm_(taus.values(), config.max_grad_norm)
    optimizer.step()
    for handle in handles:
        handle.remove()


def _models(quick: bool) -> list[tuple[str, Callable[[], nn.Module], int, tuple[int, ...]]]:
    shapes = [(32, 1, 0.1, 4, (8,))] if quick else [
        (128, 2, 0.05, 256, (20, 200)), (1024, 8, 1 / 64, 16, (50, 500)),
    ]  # fmt: skip
    models = [
        (
            f"CircuitGPT, d_model {width}, {layers} layers, density {density:.3g}",
            lambda width=width, layers=layers, density=density: _sparse(width, layers, density),
            prompts, sizes,
        )
        for width, layers, density, prompts, sizes in shapes
    ]  # fmt: skip
    if not quick:
        models.append(("Llama of SmolLM2's width, 8 layers, dense", _llama, 16, (200, 2000)))
    return models


def _sparse(width: int, layers: int, density: float) -> nn.Module:
    config = CircuitGPTConfig(d_model=width, n_layer=layers, vocab_size=2048, block_size=128)
    return random_sparse_model(config, density)


def _llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=8,
        num_attention_heads=9, num_key_value_heads=3,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@torch.no_grad()
def _measured(
    model: nn.Module, nodes: int, prompts: int, device: str, rounds: int
) -> dict[str, str]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (prompts, TOKENS), generator=generator)
    sites = node_sites(model)
    share = nodes / sum(site.width for site in sites.values())
    kept = {s: torch.rand(site.width, generator=generator) < share for s, site in sites.items()}
    circuit = Circuit(
        {site: mask.nonzero()[:, 0].tolist() for site, mask in kept.items()},
        {s: m.cpu() for s, m in mean_activations(model, ids[:4]).items()},
        "random", model_fingerprint(model),
    )  # fmt: skip
    ids = ids.to(device)

    def whole() -> torch.Tensor:
        return model(ids, use_cache=False, logits_to_keep=1).logits

    def hooks() -> torch.Tensor:
        with circuit.apply(model):
            return whole()

    def collapsed() -> torch.Tensor:
        with circuit.apply(model), Collapse(model, circuit.masks(), circuit.means).running():
            return whole()

    sides: dict[str, Callable[[], object]] = {"whole": whole, "hooks": hooks}
    sides["collapsed"] = collapsed
    torch.testing.assert_close(collapsed(), hooks(), rtol=1e-3, atol=1e-3)
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(model, CircuitGPTForCausalLM):
            answers = _program(circuit, model, Path(folder))
            sides["program"] = lambda: [answers(prompt) for prompt in ids.tolist()]
        times = interleaved(sides, rounds, device)
    line = {f"{name}, ms": str(time) for name, time in times.items()}
    line.setdefault("program, ms", "–")
    line["hooks / collapsed"] = ratio(times["hooks"], times["collapsed"])
    made = "program" in times
    line["hooks / program"] = ratio(times["hooks"], times["program"]) if made else "–"
    return line


def _program(
    circuit: Circuit, model: nn.Module, folder: Path
) -> Callable[[list[int]], dict[int, float]]:
    path = circuit.to_program(folder / "circuit.py", model, answers=[1, 2])
    spec = importlib.util.spec_from_file_location("circuit", path)
    assert spec is not None and spec.loader is not None
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    return program.answers


if __name__ == "__main__":
    main(run, __doc__, "circuits")
