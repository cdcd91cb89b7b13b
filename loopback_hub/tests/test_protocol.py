"""The server under the real clients: what goes up comes down, and each refusal is the right one."""

import os
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationAdd, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

REPO = "ada/things"


@pytest.fixture
def api(hub_server) -> HfApi:
    return HfApi()


@pytest.mark.parametrize("kind", ["model", "dataset", "space"])
def test_what_goes_up_comes_down(api, hub_server, tmp_path, kind):
    content = {"a.txt": b"regular", "b.safetensors": os.urandom(300_000)}
    for name, data in content.items():
        (tmp_path / name).write_bytes(data)
    api.create_repo(REPO, repo_type=kind, space_sdk="static" if kind == "space" else None)
    commit = api.upload_folder(repo_id=REPO, folder_path=tmp_path, repo_type=kind)
    down = Path(snapshot_download(REPO, repo_type=kind, revision=commit.oid))
    assert {name: (down / name).read_bytes() for name in content} == content
    # The same again moves nothing.
    before = hub_server.uploaded()
    assert api.upload_folder(repo_id=REPO, folder_path=tmp_path, repo_type=kind).oid == commit.oid
    assert hub_server.uploaded() == before
    add = [CommitOperationAdd("a.txt", b"proposed")]
    proposed = api.create_commit(
        REPO, add, commit_message="x", repo_type=kind, create_pr=True
    ).pr_revision
    path = hf_hub_download(REPO, "a.txt", repo_type=kind, revision=proposed)
    assert Path(path).read_bytes() == b"proposed"
    assert api.repo_info(REPO, repo_type=kind).sha == commit.oid


def test_refusals(api, hub_server):
    api.create_repo(REPO, private=True)
    bob, reader = hub_server.add_user("bob"), hub_server.add_user("ada", role="read")
    for error, name, options in (
        (RepositoryNotFoundError, "ada/nothing", {}),
        (RepositoryNotFoundError, REPO, {"token": bob}),
        (RepositoryNotFoundError, REPO, {"repo_type": "dataset"}),
        (RevisionNotFoundError, REPO, {"revision": "v9"}),
        (EntryNotFoundError, REPO, {}),
    ):
        with pytest.raises(error):
            hf_hub_download(name, "a.txt", **options)
    api.update_repo_settings(REPO, private=False, gated="manual")
    for token in (False, bob):
        with pytest.raises(GatedRepoError):
            hf_hub_download(REPO, "a.txt", token=token)
    for token, status in ((bob, "403"), (reader, "403"), (False, "401")):
        with pytest.raises(HfHubHTTPError, match=status):
            api.upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id=REPO, token=token)
