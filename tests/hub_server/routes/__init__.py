"""The Hub's HTTP interface, one module per part of it. Importing it fills the routers."""

from . import accounts, collections, files, listings, repositories, storage, uploads
from .paths import HUB, STORAGE

__all__ = [
    "HUB",
    "STORAGE",
    "accounts",
    "collections",
    "files",
    "listings",
    "repositories",
    "storage",
    "uploads",
]
