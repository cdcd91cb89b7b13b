"""Cards of what is published: models, circuits, bridges and datasets of tasks."""

from .bridge_card import bridge_card
from .circuit_card import circuit_card
from .model_card import model_card
from .task_dataset_card import task_dataset_card

__all__ = ["bridge_card", "circuit_card", "model_card", "task_dataset_card"]
