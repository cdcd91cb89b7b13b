"""Metrics on the Hub, where `evaluate.load("user/task_loss")` finds them: a Space for each."""

from pathlib import Path

from huggingface_hub import CommitInfo, HfApi

from . import metric_path


def push_metric(
    name: str,
    repo_id: str,
    *,
    private: bool = True,
    revision: str | None = None,
    token: str | bool | None = None,
) -> CommitInfo:
    """Upload one of our metrics as a Space, with its card.

    Args:
        name: one of `hf_circuit_sparsity.metrics.METRICS`.
        repo_id: `user/name`; `evaluate` asks for it to be named as the metric.
        private: whether a new Space is private.
        revision: branch to write to.
        token: access token; the saved one if not given.

    Raises:
        ValueError: there is no such metric, or the repository has another name.
        HfHubHTTPError: (an `OSError`) nobody is signed in, or there is no right to write.
    """
    folder = Path(metric_path(name))
    if repo_id.rsplit("/", 1)[-1] != name:
        raise ValueError(
            f"repo_id is {repo_id!r}, but evaluate looks in a repository for the module of the "
            f"same name; call it {repo_id.rsplit('/', 1)[0]}/{name}."
        )
    api = HfApi(token=token)
    repo_id = api.create_repo(
        repo_id, repo_type="space", space_sdk="static", private=private, exist_ok=True
    ).repo_id
    return api.upload_folder(
        repo_id=repo_id,
        repo_type="space",
        folder_path=folder,
        allow_patterns=["*.py", "README.md"],
        ignore_patterns=["__init__.py", "__pycache__/*"],
        commit_message=f"Upload the metric {name}",
        revision=revision,
    )
