"""Coordinate descent as it was first sketched: an L1 penalty and a zero-clip, and no budget.

The model begins dense. In every step every coordinate moves, is drawn towards zero by the penalty
and becomes zero where it is below the threshold; zeros whose gradient is stronger than the penalty
move again. Nothing bounds the density: the penalty is searched, by halving on a logarithmic scale,
until the run ends within a tenth of 1/20, for every learning rate, a factor of two apart, until the
best lies between two worse ones; all on the first seed. Top-k at as many steps stands beside it.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from hf_circuit_sparsity.circuits.ablation import reference_means
from hf_circuit_sparsity.circuits.evaluation.verification import verify_circuit
from hf_circuit_sparsity.circuits.pruning.config import PruningConfig
from hf_circuit_sparsity.circuits.pruning.find import TaskNotLearnedError, find_circuit
from hf_circuit_sparsity.commands.console import say
from hf_circuit_sparsity.commands.quickstart import QUICK_CHECKS
from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig
from hf_circuit_sparsity.modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from hf_circuit_sparsity.tasks.corpus import build_corpus
from hf_circuit_sparsity.tasks.load import load_task
from hf_circuit_sparsity.tasks.tokenizer import train_tokenizer

from ..experiment import Experiment, machine, mean, spread, stored, table
from .rcd_peers import CONTEXT, HELD_OUT, UNIT, best_exponent
from .rcd_race import Run, Training, bigram_loss, builders, tokens
from .rcd_race import spread as spread_rows

DENSITY = 1 / 20
CLIP = 1e-3
FIRST_PENALTY = 0.3
TASK = "single_double_quote"
SEARCH = PruningConfig(
    target_loss=0.3, node_penalty=1e-3, learning_rate=2e-2, max_steps=150, batch_size=16,
    selection_prompts=256,
)  # fmt: skip


def run(experiment: Experiment) -> str:
    """Train what is not there yet; returns the report."""
    o = experiment.options
    torch.set_num_threads(o.threads)
    data = tokens(experiment.folder, o.vocabulary, CONTEXT)
    held_out = spread_rows(data["validation"], HELD_OUT)
    config = CircuitGPTConfig(
        n_layer=2, d_model=o.d_model, d_head=16, block_size=CONTEXT, vocab_size=o.vocabulary
    )
    size = experiment.folder / f"{o.steps}x{o.batch}"
    size.mkdir(parents=True, exist_ok=True)

    def trained(method: str, exponent: int, seed: int, penalty: float = 0.0) -> dict[str, Any]:
        name = f"{method} {exponent} {seed} {penalty:.4g}"
        settings: dict[str, Any] = {}
        if method == "rcd":
            settings = {
                "target_density": None, "block_fraction": 1.0, "l1": penalty, "clip_threshold": CLIP
            }  # fmt: skip

        def measure() -> dict[str, Any]:
            build, _ = builders(config, data["train"], seed)
            plan = Run(method, o.steps, UNIT * 2.0**exponent, o.batch, settings, seed)
            density = 1.0 if method == "rcd" else DENSITY
            training = Training(build, plan, density, data["train"], held_out)
            curve = []
            for _ in range(8):
                training.run(-(-o.steps // 8))
                nonzeros, entries = training.nonzeros()
                curve.append(nonzeros / entries)
            loss = training.evaluate()
            training.close()
            say(f"{name}: density {curve[-1]:.4f}, loss {loss:.4f}")
            training.model.save_pretrained(size / name)
            return {"loss": loss, "densities": curve, "penalty": penalty, "name": name}

        return stored(size / f"{name}.json", measure)

    def at_density(exponent: int) -> dict[str, Any]:
        """The run of this rate whose density is nearest to the one asked for."""
        low, high, penalty = 0.0, math.inf, FIRST_PENALTY
        tried = []
        while len(tried) < o.trials:
            found = trained("rcd", exponent, 0, penalty)
            tried.append(found)
            ended = found["densities"][-1]
            if abs(ended / DENSITY - 1) <= 0.1:
                break
            low, high = (penalty, high) if ended > DENSITY else (low, penalty)
            penalty = 2 * low if math.isinf(high) else high / 2 if not low else (low * high) ** 0.5
        return min(tried, key=lambda t: abs(math.log(max(t["densities"][-1], 1e-9) / DENSITY)))

    sides = {}
    for name, of in (("L1 and zero-clip", at_density), ("top-k", partial(trained, "topk", seed=0))):
        best, losses = best_exponent(of)
        penalty = of(best)["penalty"]
        method = "rcd" if penalty else "topk"
        found = [trained(method, best, seed, penalty) for seed in range(o.seeds)]
        sides[name] = {"rate": UNIT * 2.0**best, "tried": losses, "found": found}
    tokenizer = train_tokenizer(build_corpus()["train"], vocab_size=o.vocabulary)
    circuits = []
    for side, row in sides.items():
        for seed, found in enumerate(row["found"]):
            name = found["name"]
            of = partial(circuit_of, size / name, tokenizer, data["train"])
            circuits.append(
                {"side": side, "seed": seed, **stored(size / f"{name} circuit.json", of)}
            )
    base = bigram_loss(data["train"], held_out, o.vocabulary)[0]
    return report(experiment, sides, circuits, base)


def circuit_of(
    folder: Path, tokenizer: PreTrainedTokenizerBase, blocks: torch.Tensor
) -> dict[str, Any]:
    """The circuit of the quotes in one of the models, and how many checks it passes."""
    model = CircuitGPTForCausalLM.from_pretrained(folder).eval()
    task = load_task(TASK, tokenizer, n_train=512, n_test=512, max_length=CONTEXT)
    means = reference_means(model, spread_rows(blocks, 256))
    try:
        circuit = find_circuit(model, task, SEARCH, reference=means, progress=False)
    except TaskNotLearnedError as error:
        return {"problem": str(error)}
    checks = verify_circuit(circuit, model, task, others=[], progress=False, **QUICK_CHECKS).checks
    bounded = [check for check in checks if check.threshold is not None]
    return {**circuit.metrics, "passed": sum(c.passed for c in bounded), "checks": len(bounded)}


def report(
    experiment: Experiment,
    sides: dict[str, dict[str, Any]],
    circuits: list[dict[str, Any]],
    base: float,
) -> str:
    """The tables."""
    o, lines = experiment.options, []
    for side, row in sides.items():
        ended = [found["densities"][-1] for found in row["found"]]
        lines.append({
            "side": side,
            "rate": f"{row['rate']:g}",
            "penalty": f"{row['found'][0]['penalty']:.3g}" if row["found"][0]["penalty"] else "–",
            "density at the end": ", ".join(f"1/{1 / density:.1f}" for density in ended),
            "validation loss": spread([found["loss"] for found in row["found"]], 3),
            "rates tried: loss": ", ".join(
                f"{UNIT * 2.0**e:g}: {loss:.3f}" for e, loss in sorted(row["tried"].items())
            ),
        })  # fmt: skip
    densities = [found["densities"] for found in sides["L1 and zero-clip"]["found"]]
    way = [f"{mean(at):.3f}" for at in zip(*densities, strict=True)]
    found = [
        {
            "side": c["side"],
            "seed": c["seed"],
            "nodes": c.get("nodes", "–"),
            "edges": c.get("edges", "–"),
            "loss alone": f"{c['circuit_loss']:.3f}" if "nodes" in c else "not learned",
            "right alone": f"{c['circuit_accuracy']:.1%}" if "nodes" in c else "–",
            "the model's": f"{c['calibrated_model_loss']:.3f}" if "nodes" in c else "–",
            "checks passed": f"{c['passed']} of {c['checks']}" if "nodes" in c else "–",
        }
        for c in circuits
    ]
    return "\n\n".join([
        "# L1 and a zero-clip alone", *__doc__.strip().split("\n\n"),
        f"CircuitGPT, d_model {o.d_model}, 2 layers, vocabulary {o.vocabulary}, {o.steps} steps of "
        f"{o.batch} × {CONTEXT} tokens; all begin with the bigram counts, which alone, smoothed, "
        f"have {base:.3f}. {HELD_OUT} validation sequences; the clip is {CLIP:g}. After ± is the "
        "standard deviation over seeds.",
        f"Measured on: {machine()}.", table(lines),
        f"The density after each eighth of the steps: {', '.join(way)}.",
        f"Circuits of `{TASK}`, target {SEARCH.target_loss:g}, one search each:", table(found),
    ])  # fmt: skip


if __name__ == "__main__":
    Experiment.main(
        run, __doc__, "rcd_zero_clip", "runs/rcd_zero_clip", d_model=128, vocabulary=2048,
        steps=2400, batch=8, seeds=3, trials=6, threads=2,
    )  # fmt: skip
