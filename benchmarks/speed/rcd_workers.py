"""What workers that share the coordinates tell each other.

What it costs to wait less for them is measured by `benchmarks.findings.rcd_ranks`.
"""

import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig
from hf_circuit_sparsity.modeling.modeling_circuitgpt import CircuitGPTForCausalLM
from hf_circuit_sparsity.optim.param_groups import sparse_param_groups as groups_of
from hf_circuit_sparsity.optim.rcd.distributed import RCDProcessGroup
from hf_circuit_sparsity.optim.rcd.optimizer import RCDSparseOptimizer
from hf_circuit_sparsity.optim.rcd.partial_gradients import PartialGradients
from hf_circuit_sparsity.optim.sparse_init import sparse_from_config

from ..experiment import Experiment, machine, table

RANKS = 2


def _config(width: int, layers: int, vocabulary: int) -> CircuitGPTConfig:
    return CircuitGPTConfig(
        n_layer=layers, d_model=width, d_head=16, block_size=64, vocab_size=vocabulary
    )


def _rank(rank: int, folder: str, width: int, layers: int, steps: int) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS)
    config = _config(width, layers, 2048)
    generator = torch.Generator().manual_seed(rank)
    batches = [torch.randint(2048, (2, 64), generator=generator) for _ in range(steps)]

    model = sparse_from_config(config, 1 / 64)
    process_group = RCDProcessGroup()
    optimizer = RCDSparseOptimizer(
        groups_of(model),
        lr=1e-2,
        target_density=1 / 64,
        normalize_gradients="always",
        process_group=process_group,
        selection="gradient",
    )
    with PartialGradients(model, optimizer):
        for batch in batches:
            model(batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    held = [g for g in groups_of(model) if not g["sparse"]]
    dense = 4 * sum(p.numel() for g in held for _, p in g["params"])

    sent = []

    def count(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        sent.append(bucket.buffer().numel() * bucket.buffer().element_size())
        future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
        return future.then(lambda done: done.value()[0])

    ddp = DistributedDataParallel(CircuitGPTForCausalLM(config))
    ddp.register_comm_hook(None, count)
    ddp(batches[0], labels=batches[0]).loss.backward()
    if rank == 0:
        torch.save([process_group.bytes_sent / steps, dense, sum(sent)], f"{folder}/bytes.pt")
    dist.destroy_process_group()


def bytes_per_step(width: int, layers: int, steps: int) -> str:
    """What a rank hands over in a step, counted, against DDP's all-reduce."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_rank, (folder, width, layers, steps), nprocs=RANKS)
        ours, dense, ddp = torch.load(Path(folder, "bytes.pt"), weights_only=True)
    rows = [
        ("DDP, all gradients", ddp, ""),
        ("of them, of dense parameters", dense, ""),
        ("RCD, sparse parameters", ours, f"{(ddp - dense) / ours:.0f} ×"),
        ("RCD, in all", ours + dense, f"{ddp / (ours + dense):.1f} ×"),
    ]
    lines = [
        {"what a rank hands over per step": what, "bytes": f"{count:,.0f}", "DDP / this": share}
        for what, count, share in rows
    ]
    return (
        f"{RANKS} ranks, CircuitGPT, d_model {width}, {layers} layers, density 1/64, mean over "
        f"{steps} steps. The dense parameters are the bigram table, norms and sinks.\n\n"
        + table(lines)
    )


def run(experiment: Experiment) -> str:
    """The table."""
    options = experiment.options
    counted = bytes_per_step(options.width, options.layers, options.steps)
    return f"# Workers that share the coordinates\n\n{machine()}\n\n{counted}"


if __name__ == "__main__":
    Experiment.main(run, __doc__, "rcd_workers", "runs/rcd", width=512, layers=4, steps=4)
