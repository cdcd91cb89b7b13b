"""A minute on a device, before it is used for long: everything that the long run calls, small."""

import argparse
import copy
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM, set_seed

from hf_circuit_sparsity.circuits.evaluation.verification import verify_circuit
from hf_circuit_sparsity.circuits.pruning.find import find_circuits
from hf_circuit_sparsity.trainer.sparse_config import SparseTrainingArguments
from hf_circuit_sparsity.trainer.sparse_trainer import SparseTrainer

from ..findings.planted.mechanisms import plant
from ..findings.planted.searches import METHODS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=32)
    args = parser.parse_args()
    for task in (search, train):
        started = time.perf_counter()
        print(f"{task.__name__}: {task(args)}, {time.perf_counter() - started:.1f} s", flush=True)


def search(args: argparse.Namespace) -> str:
    """A planted circuit of a Llama, found and checked on the device and on the CPU."""
    found = {}
    for device in dict.fromkeys(("cpu", args.device)):
        planted = plant("induction", "llama", 0.01, 0)
        model = planted.model.to(device)
        (circuit,) = find_circuits(
            model, planted.task, METHODS["rest off"], reference=planted.reference, progress=False
        )
        checks = verify_circuit(
            circuit, model, planted.task, prompts=64, random_circuits=4, subsets=2, supersets=4,
            adversary_steps=4, stability_seeds=0, others=[], adversarial={}, progress=False,
        )  # fmt: skip
        failed = [check.name for check in checks.checks if check.passed is False]
        found[device] = (
            f"{sum(map(len, circuit.nodes.values()))} nodes on {device}, failed {failed}"
        )
    return "; ".join(found.values())


def train(args: argparse.Namespace) -> str:
    """Steps of a Llama of SmolLM2's size with random weights, distilled from itself."""
    set_seed(0)
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=args.layers,
        num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    rows = torch.randint(0, 49152, (24 * args.batch_size, 256))
    data = [{"input_ids": row, "labels": row} for row in rows]
    seconds = []
    for steps in (4, 24):
        arguments = SparseTrainingArguments(
            output_dir="runs/smoke", max_steps=steps, per_device_train_batch_size=args.batch_size,
            target_density=1 / 8, sparse_embeddings=False, distillation_weight=0.5, bf16=True,
            use_cpu=args.device == "cpu", compute_on_nonzeros=False, logging_steps=10,
            save_strategy="no", report_to="none", disable_tqdm=True,
        )  # fmt: skip
        trainer = SparseTrainer(copy.deepcopy(model), arguments, train_dataset=data)
        started = time.perf_counter()
        trainer.train()
        seconds.append(time.perf_counter() - started)
    step = (seconds[1] - seconds[0]) / 20
    peak = torch.cuda.max_memory_allocated() / 1e9 if args.device == "cuda" else float("nan")
    return f"{1e3 * step:.0f} ms per step, {peak:.1f} GB at most"


if __name__ == "__main__":
    main()
