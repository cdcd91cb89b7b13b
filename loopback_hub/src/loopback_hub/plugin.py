"""The one server of a test run, and the fixture `hub_server`.

Importing this starts the server and points all clients to it. `huggingface_hub` reads its
environment once, when it is imported; so a `conftest.py` imports this before all else.
"""

import atexit
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from loopback_hub.server import HubServer

CLIENT_HOME = Path(tempfile.mkdtemp(prefix="hub-of-tests-"))
atexit.register(shutil.rmtree, CLIENT_HOME, ignore_errors=True)

SERVER = HubServer()
os.environ.update(
    HF_ENDPOINT=SERVER.url,
    HF_HOME=str(CLIENT_HOME),
    HF_HUB_CACHE=str(CLIENT_HOME / "hub"),
    HF_DATASETS_CACHE=str(CLIENT_HOME / "datasets"),
    HF_MODULES_CACHE=str(CLIENT_HOME / "modules"),
    HF_TOKEN="",
    HF_HUB_OFFLINE="0",
    TRANSFORMERS_OFFLINE="0",
    HF_DATASETS_OFFLINE="0",
    HF_HUB_DISABLE_XET="1",
    HF_UPDATE_DOWNLOAD_COUNTS="0",  # which evaluate would report elsewhere
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_UPDATE_CHECK="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    NO_PROXY="127.0.0.1,localhost",
    no_proxy="127.0.0.1,localhost",
)


@pytest.fixture
def hub_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """An empty Hub, and clients with empty caches that are signed in as `ada`.

    In this process the clients find it by themselves. For a process of its own, pass
    `env=os.environ`, which has all that it needs; `HF_TOKEN` says who it is.
    """
    from huggingface_hub import HfFileSystem  # after the environment is set

    with SERVER.emptied():
        shutil.rmtree(CLIENT_HOME, ignore_errors=True)
        HfFileSystem.clear_instance_cache()
        monkeypatch.setenv("HF_TOKEN", SERVER.add_user("ada"))
        yield SERVER
        assert not SERVER.unknown_paths(), "a client asked for what the server does not know"
