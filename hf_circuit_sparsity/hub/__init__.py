"""Talking to the Hub: what can go wrong said in one sentence, and uploads that can be resumed."""

from .errors import HubAccessError, hub_errors
from .repository import is_hub_id

__all__ = ["HubAccessError", "hub_errors", "is_hub_id"]
