"""The Hugging Face Trainer for weight-sparse models."""

from .bigram_init import initialize_bigram_table_
from .callbacks import InterruptCallback, ProgressTableCallback, SparsityMonitor
from .sparse_config import SparseTrainingArguments
from .sparse_trainer import SparseTrainer
from .training_curves import plot_training_curves

__all__ = [
    "InterruptCallback",
    "ProgressTableCallback",
    "SparseTrainer",
    "SparseTrainingArguments",
    "SparsityMonitor",
    "initialize_bigram_table_",
    "plot_training_curves",
]
