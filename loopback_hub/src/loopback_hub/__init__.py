"""A Hub on loopback that the real clients talk to: no function of theirs is replaced in tests.

It speaks what `huggingface_hub`, `transformers`, `datasets` and `evaluate` say to the Hub in these
tests: accounts, repositories of the three kinds, commits of regular and LFS files, pull requests,
downloads, listings, private and gated repositories, collections. All is in memory, and clients are
told by `HF_HUB_DISABLE_XET` not to speak Xet.
"""

from loopback_hub.server import HubServer

__all__ = ["HubServer"]
