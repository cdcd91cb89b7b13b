"""Cards of what is published: models, circuits, bridges and datasets of tasks."""

from ..hub.errors import hub_errors
from ..modeling.hub_slot import fill_hub_slot
from .bridge_card import bridge_card
from .circuit_card import circuit_card
from .metric_space import push_metric
from .model_card import model_card
from .pushed_card import pushed_card
from .task_dataset_card import task_dataset_card

fill_hub_slot(pushed_card, hub_errors)

__all__ = ["bridge_card", "circuit_card", "model_card", "push_metric", "task_dataset_card"]
