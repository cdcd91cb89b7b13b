"""The one server of a test run. Importing this starts it and points all clients to it.

`huggingface_hub` reads its environment once, when it is imported; so this comes before.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

from tests.hub_server.server import HubServer

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
