"""The environment in which clients find the server and nothing else."""

from pathlib import Path


def client_environment(url: str, home: Path, token: str | None = None) -> dict[str, str]:
    """Variables for clients: they must be set before `huggingface_hub` is imported.

    Args:
        url: the server's.
        home: their caches and tokens go here.
        token: the access token of who they are; empty if nobody.
    """
    return {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_CACHE": str(Path(home) / "hub"),
        "HF_DATASETS_CACHE": str(Path(home) / "datasets"),
        "HF_MODULES_CACHE": str(Path(home) / "modules"),
        "HF_TOKEN": token or "",
        "HF_HUB_OFFLINE": "0",
        "TRANSFORMERS_OFFLINE": "0",
        "HF_DATASETS_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # which evaluate would report elsewhere
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_UPDATE_CHECK": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
    }
