"""Training in which each process holds a part of every weight: FSDP2, by Accelerate."""

from accelerate.state import PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    parse_flag_from_env,
)
from torch.distributed.fsdp import CPUOffloadPolicy
from transformers import Trainer


def shard_on_cpu(trainer: Trainer) -> None:
    """Let Accelerate shard on the CPU too, where it would train by DDP without a word.

    Up to 1.15 its state takes notice of FSDP for accelerators alone, though all that it then does
    works on the CPU: a run can be tried, and tested, before it goes to GPUs.
    """
    state, plugin_args = trainer.accelerator.state, trainer.args.fsdp_plugin_args
    asked = plugin_args is not None or parse_flag_from_env("ACCELERATE_USE_FSDP")
    if not asked or state.distributed_type != DistributedType.MULTI_CPU:
        return
    plugin = FullyShardedDataParallelPlugin(**(plugin_args or {}))
    if state.mixed_precision != "no":
        plugin.set_mixed_precision(state.mixed_precision)
    # The last is what new states begin with; AcceleratorState sets it likewise on GPUs.
    state.fsdp_plugin, state.distributed_type = plugin, DistributedType.FSDP
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    trainer.is_fsdp_enabled = True


def check_sharded(trainer: Trainer) -> None:
    """Raise ValueError if training is to be sharded in a way that no sparsifier can do."""
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "training is sharded by DeepSpeed, expected FSDP2 or DDP: the largest weights of a "
            "matrix cannot be found in DeepSpeed's flat parameters."
        )
    if not trainer.is_fsdp_enabled:
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    if trainer.args.sparsifier == "rcd":
        raise ValueError(
            "training is sharded (FSDP), but sparsifier='rcd' has its own way of many processes, "
            "in which each computes the gradients of its own coordinates: start it without FSDP "
            "(`accelerate launch --multi_gpu`)."
        )
    if plugin.fsdp_version != 2:
        raise ValueError(
            f"fsdp_version={plugin.fsdp_version} was passed, expected 2: version 1 flattens "
            "parameters, and the largest weights of a matrix cannot be found in those."
        )
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise ValueError(
            "parameters are to be offloaded to the CPU (fsdp_offload_params, cpu_offload), "
            "expected them to stay on their device: turn that off."
        )
