"""The Hub's HTTP interface, one module per part of it. Importing it fills the routers."""

from tests.hub_server.routes import (
    accounts,
    collections,
    files,
    listings,
    repositories,
    storage,
    uploads,
)
from tests.hub_server.routes.paths import HUB, STORAGE

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
