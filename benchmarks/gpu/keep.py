"""Make a trained model small enough to be kept in the repository, and measure what that costs.

Weights in bfloat16, and of the bigram table only the entries that lie farthest from their row's
median, which is subtracted: a constant added to a row of logits changes no probability.

    python -m benchmarks.gpu.keep --work FOLDER_OF_A_RUN --device cpu --output models/python-1024
"""

from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from hf_circuit_sparsity.circuits.task_scores import evaluate_tasks
from hf_circuit_sparsity.files import write_json
from hf_circuit_sparsity.modeling.modeling_circuitgpt import CircuitGPTForCausalLM

from ..experiment import mean, table
from .sizes import SIZES, TokenBlocks, stage_arguments

TABLE_DENSITY = 0.2


@torch.no_grad()
def save_small(
    model: CircuitGPTForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    table_density: float = TABLE_DENSITY,
) -> None:
    """Save a model's nonzeros in bfloat16, with a thinned bigram table, and its tokenizer.

    Without its code, which would be a second copy where the package is, and without where it lay.
    """
    thin_bigram_table_(model, table_density)
    model.to(torch.bfloat16).save_pretrained(folder, sparse=True)
    tokenizer.save_pretrained(folder)
    for path in folder.glob("*.py"):
        path.unlink()
    left_out = ("auto_map", "_name_or_path")
    config = {n: v for n, v in model.config.to_diff_dict().items() if n not in left_out}
    write_json(folder / "config.json", dict(sorted({**config, "use_cache": True}.items())))


@torch.no_grad()
def thin_bigram_table_(model: CircuitGPTForCausalLM, density: float) -> None:
    """Set all but a share of the table to zero, in place."""
    difference = model.bigram_table - model.bigram_table.median(1, keepdim=True).values
    dropped = int((1 - density) * difference.numel())
    threshold = difference.abs().flatten().kthvalue(dropped).values
    model.bigram_table.copy_(difference * (difference.abs() > threshold))


@torch.no_grad()
def held_out_loss(model: CircuitGPTForCausalLM, blocks: torch.Tensor) -> float:
    """Nats per token on blocks `(n, length)` of token ids."""
    return mean([model(part, labels=part).loss.item() for part in blocks.split(8)])


def main() -> None:
    parser = stage_arguments(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for the small model")
    parser.add_argument("--blocks", type=int, default=64, help="held-out blocks for the loss")
    parser.add_argument("--prompts", type=int, default=256, help="per task")
    args = parser.parse_args()
    blocks = TokenBlocks(args.data / "validation.bin", SIZES[args.size].block_size)
    blocks = blocks.spread(args.blocks).to(args.device)
    tokenizer = AutoTokenizer.from_pretrained(args.work / "model")

    def load(folder: Path) -> tuple[CircuitGPTForCausalLM, float]:
        model = CircuitGPTForCausalLM.from_pretrained(folder, dtype=torch.float32, sparse=True)
        model.eval().to(args.device)
        return model, held_out_loss(model, blocks)

    _, before = load(args.work / "model")
    model = CircuitGPTForCausalLM.from_pretrained(args.work / "model")
    save_small(model, tokenizer, args.output)
    model, after = load(args.output)
    print(f"held-out loss, {len(blocks)} blocks: {before:.4f} as trained, {after:.4f} as kept")
    n = args.prompts
    scores = evaluate_tasks(model, tokenizer, n_train=n, n_test=n, progress=False)
    print(table([{"task": s.task, "accuracy": f"{s.accuracy or 0:.1%}"} for s in scores]))


if __name__ == "__main__":
    main()
