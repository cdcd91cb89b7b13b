"""Make the model and the circuit that the package carries, from a quickstart.

    python -m benchmarks.example_model --quickstart runs/quickstart

The model is made as small as `benchmarks.gpu.keep` makes one; its circuit is searched and checked
anew, as the quickstart does, for a circuit belongs to the weights it was found in.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoTokenizer

from hf_circuit_sparsity.circuits.evaluation.verification import verify_circuit
from hf_circuit_sparsity.circuits.pruning.config import PruningConfig
from hf_circuit_sparsity.circuits.pruning.find import find_circuit
from hf_circuit_sparsity.commands.quickstart import (
    DISTRACTOR_FRACTION,
    QUICK_CHECKS,
    SEARCH,
    TARGETS,
)
from hf_circuit_sparsity.modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from hf_circuit_sparsity.tasks.corpus import build_corpus
from hf_circuit_sparsity.tasks.load import load_task
from hf_circuit_sparsity.tasks.packing import pack_dataset, spread_sample

from .gpu.keep import held_out_loss, save_small

TABLE_DENSITY = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quickstart", type=Path, required=True, help="folder of a finished one")
    parser.add_argument("--output", type=Path, default=Path("hf_circuit_sparsity/example"))
    parser.add_argument("--circuit-only", action="store_true", help="of the model that is there")
    args = parser.parse_args()
    settings = json.loads((args.quickstart / "quickstart.json").read_text(encoding="utf-8"))
    trained, kept = args.quickstart / "model", args.output / "model"
    tokenizer = AutoTokenizer.from_pretrained(trained)
    if not args.circuit_only:
        save_small(CircuitGPTForCausalLM.from_pretrained(trained), tokenizer, kept, TABLE_DENSITY)
    corpus = build_corpus()
    size = CircuitGPTForCausalLM.config_class.from_pretrained(kept).block_size
    held_out = pack_dataset(corpus["validation"], tokenizer, size)
    ids = torch.tensor(spread_sample(held_out, 256)["input_ids"])
    for name, folder in (("as trained", trained), ("as kept", kept)):
        model = CircuitGPTForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        print(f"held-out loss {name}: {held_out_loss(model, ids):.4f} nats per token")
    task = load_task(settings["task"], tokenizer, seed=settings["seed"], max_length=size)
    config = PruningConfig(
        seed=settings["seed"],
        target_loss=TARGETS[0],
        distractor_fraction=DISTRACTOR_FRACTION,
        **SEARCH,
    )
    reference = pack_dataset(corpus["train"], tokenizer, size)
    circuit = find_circuit(model, task, config, reference=reference)
    checks = verify_circuit(circuit, model, task, others=[], **QUICK_CHECKS)
    circuit.save_pretrained(args.output / "circuit")
    print(circuit, circuit.metrics, checks.verdict(), sep="\n")
    for path in sorted(args.output.rglob("*.*")):
        print(f"{path.stat().st_size:>9,} {path.relative_to(args.output)}")


if __name__ == "__main__":
    main()
