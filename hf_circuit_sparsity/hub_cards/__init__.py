"""Cards of what is published: models, circuits, bridges and datasets of tasks."""

from ..modeling.card_slot import fill_card_slot
from .bridge_card import bridge_card
from .circuit_card import circuit_card
from .metric_space import push_metric
from .model_card import model_card
from .pushed_card import pushed_card
from .task_dataset_card import task_dataset_card

fill_card_slot(pushed_card)

__all__ = ["bridge_card", "circuit_card", "model_card", "push_metric", "task_dataset_card"]
