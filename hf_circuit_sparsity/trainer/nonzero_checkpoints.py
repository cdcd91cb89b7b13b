"""Checkpoints of models that hold nonzeros alone, and of one sparsifier."""

import shutil
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer import OPTIMIZER_NAME
from transformers.trainer_utils import HubStrategy

from ..modeling.causal_lm import NONZEROS_NAME, saving_nonzeros, weights_file
from ..modeling.csr import CSR
from ..modeling.sparse_checkpoint import named_weights, read_weights
from ..modeling.sparse_layers import sparse_layers
from .checkpoints import reading
from .sharded_training import ShardingTrainer
from .sparse_config import SparseTrainingArguments


class NonzeroCheckpointTrainer(ShardingTrainer):
    """`Trainer` that saves a model as it holds it, and resumes only what its sparsifier trained.

    What is held as nonzeros is written as such and read into the parameters that are there, so that
    no matrix is ever made dense.
    """

    args: SparseTrainingArguments

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # What is held as nonzeros is also written as such: it would not fit into memory otherwise.
        if state_dict is not None or not self._holds_nonzeros():
            return super()._save(output_dir, state_dict)
        with saving_nonzeros(self.model):
            return super()._save(output_dir)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        self._check_sparsifier_of(resume_from_checkpoint)
        if model is None and self._holds_nonzeros():
            self._load_nonzeros(resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _check_sparsifier_of(self, checkpoint: str) -> None:
        """Raise ValueError if it was trained with another sparsifier, before anything is loaded."""
        path = Path(checkpoint) / OPTIMIZER_NAME
        if self.optimizer is not None or self.optimizer_cls_and_kwargs or not path.is_file():
            return
        with reading(checkpoint):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        is_rcd, asked = "block_fraction" in state["param_groups"][0], self.args.sparsifier
        if is_rcd != (asked == "rcd"):
            raise ValueError(
                f"{checkpoint} was trained {'with' if is_rcd else 'without'} sparsifier='rcd', this"
                f" run asks for {asked!r}: resume with that of the checkpoint, or start a run from "
                "its weights."
            )

    def _load_best_model(self) -> None:
        if self._holds_nonzeros():
            self._load_nonzeros(self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    @torch.no_grad()
    def _load_nonzeros(self, folder: str) -> None:
        # In place: parameters stay the objects they are, and no matrix is made dense.
        weights = read_weights(weights_file(folder), self.model)
        for name, target in named_weights(self.model):
            weight = weights[name]
            stored_sparse = isinstance(weight, CSR)
            if isinstance(target, CSR):
                layer = self.model.get_submodule(name.removesuffix(".weight"))
                layer.assign(weight if stored_sparse else CSR.from_dense(weight))
            else:
                target.copy_(weight.to_dense() if stored_sparse else weight)

    def _holds_nonzeros(self) -> bool:
        return isinstance(self.model, PreTrainedModel) and bool(sparse_layers(self.model))

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The process that uploads copies, and no other: what is on its way must not change. Trainer
        # skips this push where one is, and with `hub_always_push` would copy over what that reads.
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.push_in_progress is not None and not self.push_in_progress.is_done():
            if not self.args.hub_always_push:
                return
            self._finish_current_push()
        # Trainer copies what it knows of a checkpoint to where it pushes from; the model's code,
        # without which nobody loads it, and the nonzeros of another's are not among that.
        folder = Path(checkpoint_folder)
        for path in (*folder.glob("*.py"), *folder.glob(NONZEROS_NAME)):
            shutil.copy(path, Path(self.args.output_dir) / path.name)
        super()._push_from_checkpoint(checkpoint_folder)
