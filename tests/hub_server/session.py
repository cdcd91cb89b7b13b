"""The one server of a test run. Importing this starts it and points all clients to it.

`huggingface_hub` reads its environment once, when it is imported; so this comes before.
"""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

from tests.hub_server.environment import client_environment
from tests.hub_server.server import HubServer

_FOLDER = Path(tempfile.mkdtemp(prefix="hub-of-tests-"))
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)

CLIENT_HOME = _FOLDER / "home"
SERVER = HubServer(_FOLDER / "server")
os.environ.update(client_environment(SERVER.url, CLIENT_HOME))
