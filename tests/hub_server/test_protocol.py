"""The server under the real clients: what goes up comes down, and each refusal is the right one."""

import io
import os
from pathlib import Path

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    HfFileSystem,
    ModelCard,
    hf_hub_download,
    snapshot_download,
)
from huggingface_hub.errors import (
    BadRequestError,
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub_server import HubServer

REPO = "ada/things"


@pytest.fixture
def api(hub_server: HubServer) -> HfApi:
    return HfApi()


def folder_of(tmp_path: Path, **files: bytes) -> Path:
    folder = tmp_path / "folder"
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_DOT_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def test_who_i_am(api, hub_server, monkeypatch):
    assert api.whoami()["name"] == "ada"
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    with pytest.raises(HfHubHTTPError):
        api.whoami()


@pytest.mark.parametrize("kind", ["model", "dataset", "space"])
def test_what_goes_up_comes_down(api, hub_server, tmp_path, kind):
    content = {"a_DOT_txt": b"regular", "deep__b_DOT_safetensors": os.urandom(300_000)}
    folder = folder_of(tmp_path, **content)
    api.create_repo(REPO, repo_type=kind, space_sdk="static" if kind == "space" else None)
    commit = api.upload_folder(repo_id=REPO, folder_path=folder, repo_type=kind)
    assert sorted(api.list_repo_files(REPO, repo_type=kind)) == [
        ".gitattributes", "a.txt", "deep/b.safetensors",
    ]  # fmt: skip
    down = Path(snapshot_download(REPO, repo_type=kind, revision=commit.oid))
    assert (down / "a.txt").read_bytes() == b"regular"
    assert (down / "deep/b.safetensors").read_bytes() == content["deep__b_DOT_safetensors"]
    assert down.name == commit.oid == api.repo_info(REPO, repo_type=kind).sha

    # The same again moves nothing.
    before = hub_server.uploaded()
    assert api.upload_folder(repo_id=REPO, folder_path=folder, repo_type=kind).oid == commit.oid
    assert hub_server.uploaded() == before


def test_large_files_go_up_in_parts(api, hub_server, tmp_path):
    hub_server.hub.multipart_threshold = 1000
    content = os.urandom(4500)
    api.create_repo(REPO)
    api.upload_file(path_or_fileobj=io.BytesIO(content), path_in_repo="w.bin", repo_id=REPO)
    assert len([e for e in hub_server.log if e.method == "PUT"]) == 5
    assert Path(hf_hub_download(REPO, "w.bin")).read_bytes() == content
    info = api.get_paths_info(REPO, "w.bin")[0]
    assert info.size == info.lfs.size == 4500


def test_branches_tags_and_commits(api):
    api.create_repo(REPO)
    first = api.upload_file(path_or_fileobj=b"one", path_in_repo="a.txt", repo_id=REPO)
    api.create_tag(REPO, tag="v1")
    api.create_branch(REPO, branch="feature/x")
    api.create_commit(
        REPO,
        operations=[
            CommitOperationAdd("a.txt", b"two"),
            CommitOperationAdd("sub/c.txt", b"c"),
        ],
        commit_message="second",
        parent_commit=first.oid,
    )
    with pytest.raises(HfHubHTTPError, match="412"):
        api.create_commit(
            REPO, operations=[CommitOperationAdd("a.txt", b"3")], commit_message="late",
            parent_commit=first.oid,
        )  # fmt: skip
    read = {
        revision: Path(hf_hub_download(REPO, "a.txt", revision=revision)).read_bytes()
        for revision in ("main", "v1", "feature/x", first.oid)
    }
    assert read == {"main": b"two", "v1": b"one", "feature/x": b"one", first.oid: b"one"}
    refs = api.list_repo_refs(REPO)
    assert [b.name for b in refs.branches] == ["main", "feature/x"]
    assert [t.name for t in refs.tags] == ["v1"]
    assert api.list_repo_commits(REPO)[0].title == "second"
    api.create_commit(
        REPO, operations=[CommitOperationDelete("sub/")], commit_message="without a folder"
    )
    assert "sub/c.txt" not in api.list_repo_files(REPO)
    api.delete_tag(REPO, tag="v1")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "a.txt", revision="v1")


def test_listing_in_pages_and_folders(api, hub_server):
    hub_server.hub.page_size = 3
    api.create_repo(REPO)
    names = [f"d/{i}.txt" for i in range(5)] + ["e.txt"]
    api.create_commit(
        REPO, operations=[CommitOperationAdd(n, b"x") for n in names], commit_message="all"
    )
    everything = list(api.list_repo_tree(REPO, recursive=True))
    assert [e.path for e in everything] == [".gitattributes", "d", *names]
    assert [e.path for e in api.list_repo_tree(REPO)] == [".gitattributes", "d", "e.txt"]
    assert len(list(api.list_repo_tree(REPO, "d", expand=True))) == 5
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(REPO, "nowhere"))


def test_reading_a_range(api):
    api.create_repo(REPO, repo_type="dataset")
    files = {"lfs.parquet": bytes(range(256)) * 40, "regular.txt": b"0123456789" * 100}
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    api.create_commit(REPO, operations=operations, commit_message="all", repo_type="dataset")
    for name, content in files.items():
        with HfFileSystem().open(f"datasets/{REPO}/{name}", "rb", block_size=64) as file:
            file.seek(500)
            assert file.read(30) == content[500:530]


def test_what_is_not_there(api):
    api.create_repo(REPO)
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("ada/nothing", "a.txt")
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("nothing")
    with pytest.raises(RepositoryNotFoundError):
        api.repo_info(REPO, repo_type="dataset")
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download(REPO, "a.txt", revision="v9")
    with pytest.raises(EntryNotFoundError):
        hf_hub_download(REPO, "a.txt")
    assert not api.repo_exists("ada/nothing") and api.repo_exists(REPO)
    assert not api.file_exists(REPO, "a.txt") and not api.revision_exists(REPO, "v9")


def test_private_and_gated_repositories(api, hub_server):
    api.create_repo(REPO, private=True)
    api.upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id=REPO)
    bob = hub_server.add_user("bob")
    for token in (False, bob):
        with pytest.raises(RepositoryNotFoundError):
            hf_hub_download(REPO, "a.txt", token=token)
    api.update_repo_settings(REPO, private=False, gated="manual")
    for token in (False, bob):
        with pytest.raises(GatedRepoError):
            hf_hub_download(REPO, "a.txt", token=token)
    assert api.model_info(REPO, token=False).gated == "manual"
    hub_server.hub.repositories["model", REPO].granted.add("bob")
    assert Path(hf_hub_download(REPO, "a.txt", token=bob)).read_bytes() == b"x"


def test_no_right_to_write(api, hub_server):
    api.create_repo(REPO)
    reader = hub_server.add_user("ada", role="read")
    for token in (hub_server.add_user("bob"), reader):
        with pytest.raises(HfHubHTTPError, match="403"):
            api.upload_file(path_or_fileobj=b"x", path_in_repo="a.txt", repo_id=REPO, token=token)
    with pytest.raises(HfHubHTTPError, match="401"):
        api.create_repo("ada/more", token=False)
    with pytest.raises(HfHubHTTPError, match="403"):
        api.create_repo("eve/more")
    member = hub_server.add_user("carol", organizations=("lab",))
    assert api.create_repo("lab/shared", token=member).repo_id == "lab/shared"


def test_repositories_are_made_once_moved_and_deleted(api):
    url = api.create_repo("things")
    assert url.repo_id == REPO
    with pytest.raises(HfHubHTTPError, match="409"):
        api.create_repo(REPO)
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    api.move_repo(REPO, "ada/moved")
    assert api.repo_exists("ada/moved") and not api.repo_exists(REPO)
    api.delete_repo("ada/moved")
    assert not api.repo_exists("ada/moved")


def test_cards_are_checked_and_found_by(api):
    api.create_repo(REPO)
    # Not by the card's own push_to_hub: in huggingface_hub 1.x it knows only huggingface.co.
    card = b"---\nlicense: mit\nbase_model: ada/big\ntags: [circuit]\n---\n# x"
    api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=REPO)
    assert ModelCard.load(REPO).data.license == "mit"
    assert [m.id for m in api.list_models(filter=["circuit", "base_model:ada/big"])] == [REPO]
    assert not list(api.list_models(filter="other"))
    with pytest.raises(ValueError, match="Invalid metadata"):
        api.upload_file(
            path_or_fileobj=b"---\nlicense: [mit\n---\n", path_in_repo="README.md", repo_id=REPO
        )


def test_a_lying_upload_is_refused(api, hub_server):
    api.create_repo(REPO)
    with pytest.raises(BadRequestError, match="does not exist"):
        operation = CommitOperationAdd("w.bin", b"weights")
        operation._is_uploaded = True  # says so, but is not
        operation._upload_mode, operation._should_ignore = "lfs", False
        api.create_commit(REPO, operations=[operation], commit_message="lie")


def test_collections(api, hub_server):
    api.create_repo(REPO)
    api.create_repo("ada/data", repo_type="dataset")
    made = api.create_collection("A title", private=True, exists_ok=True)
    again = api.create_collection("A title", private=True, exists_ok=True)
    assert made.slug == again.slug
    api.add_collection_item(made.slug, REPO, "model", note="the model")
    api.add_collection_item(made.slug, "ada/data", "dataset")
    api.add_collection_item(made.slug, REPO, "model", exists_ok=True)
    items = api.get_collection(made.slug).items
    assert [(i.item_id, i.item_type, i.note) for i in items] == [
        (REPO, "model", "the model"), ("ada/data", "dataset", None),
    ]  # fmt: skip
    assert [c.slug for c in api.list_collections(owner="ada")] == [made.slug]
    with pytest.raises(HfHubHTTPError, match="404"):
        api.get_collection(made.slug, token=hub_server.add_user("bob"))


def test_a_server_on_the_same_folder_remembers(tmp_path):
    with HubServer(tmp_path) as server:
        api = HfApi(endpoint=server.url, token=server.add_user("ada"))
        api.create_repo(REPO, private=True)
        api.upload_file(path_or_fileobj=b"x" * 9, path_in_repo="w.bin", repo_id=REPO)
        api.create_collection("c")
    with HubServer(tmp_path) as server:
        api = HfApi(endpoint=server.url, token=server.add_user("ada"))
        assert api.repo_info(REPO).private
        path = api.hf_hub_download(REPO, "w.bin", cache_dir=tmp_path / "cache")
        assert Path(path).read_bytes() == b"x" * 9
        assert len(list(api.list_collections(owner="ada"))) == 1
