"""Training in which each process holds a part of every weight: FSDP2, by Accelerate."""

from accelerate.state import PartialState
from accelerate.utils import (
    DistributedType,
    FullyShardedDataParallelPlugin,
    parse_flag_from_env,
)
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule

from .language_model_trainer import LanguageModelTrainer


class ShardingTrainer(LanguageModelTrainer):
    """`Trainer` that shards by FSDP2, also on the CPU, and refuses other ways of sharding.

    Raises:
        ValueError: training is to be sharded in a way that the sparsifier, or the model, cannot.
    """

    # Whether each forward pass goes through the model's own `forward`, where FSDP gathers weights.
    can_be_sharded = True

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator; see `Trainer`. What it cannot train by is refused here."""
        super().create_accelerator_and_postprocess()
        self._shard_on_cpu()
        self._check_sharding()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model so that `from_pretrained` loads it; see `Trainer`."""
        sharded = self.is_fsdp_enabled and "SHARDED_STATE_DICT" in str(
            self.accelerator.state.fsdp_plugin.state_dict_type
        )
        if sharded and not _internal_call:  # Trainer leaves the parts to be put together later
            weights = self.accelerator.get_state_dict(self.model)
            self._save(output_dir, state_dict=weights)
        super().save_model(output_dir, _internal_call)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        own = type(self.model)
        if isinstance(self.model, FSDPModule):
            # Or else FSDP's code would be saved as the model's, since it makes a class of its own.
            self.model.__class__ = next(c for c in own.__mro__ if not issubclass(c, FSDPModule))
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.model.__class__ = own

    def _shard_on_cpu(self) -> None:
        """Let Accelerate shard on the CPU too, where it would train by DDP without a word.

        Up to 1.15 its state takes notice of FSDP for accelerators alone, though all that it then
        does works on the CPU: a run can be tried, and tested, before it goes to GPUs.
        """
        state, plugin_args = self.accelerator.state, self.args.fsdp_plugin_args
        asked = plugin_args is not None or parse_flag_from_env("ACCELERATE_USE_FSDP")
        if not asked or state.distributed_type != DistributedType.MULTI_CPU:
            return
        plugin = FullyShardedDataParallelPlugin(**(plugin_args or {}))
        if state.mixed_precision != "no":
            plugin.set_mixed_precision(state.mixed_precision)
        # As AcceleratorState does it on GPUs; the last is what later states begin with.
        state.fsdp_plugin, state.distributed_type = plugin, DistributedType.FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.is_fsdp_enabled = True

    def _check_sharding(self) -> None:
        if self.is_deepspeed_enabled:
            raise ValueError(
                "training is sharded by DeepSpeed, expected FSDP2 or DDP: the largest weights of a "
                "matrix cannot be found in DeepSpeed's flat parameters."
            )
        if not self.is_fsdp_enabled:
            return
        plugin = self.accelerator.state.fsdp_plugin
        if self.args.sparsifier == "rcd":
            raise ValueError(
                "training is sharded (FSDP), but sparsifier='rcd' has its own way of many "
                "processes, in which each computes the gradients of its own coordinates: start it "
                "without FSDP (`accelerate launch --multi_gpu`)."
            )
        if not self.can_be_sharded:
            raise ValueError(
                f"training is sharded (FSDP), but the {type(self).__name__} runs parts of its "
                "models alone, which needs whole weights: start it without FSDP "
                "(`accelerate launch --multi_gpu`)."
            )
        version = getattr(plugin, "fsdp_version", 1)
        if version != 2:
            raise ValueError(
                f"fsdp_version={version} was passed, expected 2: version 1 flattens "
                "parameters, and the largest weights of a matrix cannot be found in those."
            )
        if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
            raise ValueError(
                "parameters are to be offloaded to the CPU (fsdp_offload_params, cpu_offload), "
                "expected them to stay on their device: turn that off."
            )
