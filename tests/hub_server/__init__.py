"""A Hub on loopback that the real clients talk to: no function of theirs is replaced in tests.

It speaks what `huggingface_hub`, `transformers`, `datasets` and `evaluate` say to the Hub:
accounts, repositories of the three kinds, commits of regular and LFS files, downloads with their
redirects, listings, references, private and gated repositories, collections. It does not speak Xet
(clients are told so by `HF_HUB_DISABLE_XET`), and it has no pull requests.
"""

from tests.hub_server.environment import client_environment
from tests.hub_server.errors import HubError
from tests.hub_server.server import HubServer

__all__ = ["HubError", "HubServer", "client_environment"]
