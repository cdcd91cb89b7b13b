"""The Hugging Face Trainer for weight-sparse models."""

from .bigram_init import initialize_bigram_table_
from .callbacks import InterruptCallback
from .sparse_config import SparseTrainingArguments
from .sparse_trainer import SparseTrainer
from .sparsity_monitor import SparsityMonitor
from .training_curves import plot_training_curves

__all__ = [
    "InterruptCallback",
    "SparseTrainer",
    "SparseTrainingArguments",
    "SparsityMonitor",
    "initialize_bigram_table_",
    "plot_training_curves",
]
