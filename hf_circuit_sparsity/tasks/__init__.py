"""Data: the corpus, its tokenizer, packing into blocks, and the binary tasks."""

from .adversarial import load_adversarial_tasks
from .binary_task import BinaryTask, TaskTooLongError
from .corpus import build_corpus
from .documents import load_documents
from .encoding import TaskNotExpressibleError
from .load import build_task_datasets, list_tasks, load_task
from .packing import pack_dataset, spread_sample
from .tokenizer import decode_bytes, encode_bytes, tokenizer_from_openai, train_tokenizer

__all__ = [
    "BinaryTask",
    "TaskNotExpressibleError",
    "TaskTooLongError",
    "build_corpus",
    "build_task_datasets",
    "decode_bytes",
    "encode_bytes",
    "list_tasks",
    "load_adversarial_tasks",
    "load_documents",
    "load_task",
    "pack_dataset",
    "spread_sample",
    "tokenizer_from_openai",
    "train_tokenizer",
]
