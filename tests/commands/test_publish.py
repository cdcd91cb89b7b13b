"""`publish` against the Hub on loopback: what it makes, and that nothing is sent twice."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from datasets import load_dataset
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from transformers import AutoModelForCausalLM

from hf_circuit_sparsity import (
    Circuit,
    CircuitGPTConfig,
    CircuitGPTForCausalLM,
    PruningConfig,
    find_circuit,
    list_circuits,
    load_task,
    tokenizer_from_openai,
)
from hf_circuit_sparsity.circuits.task_scores import TaskScore
from hf_circuit_sparsity.circuits.viewer.report_data import ReportConfig
from hf_circuit_sparsity.cli import main
from hf_circuit_sparsity.commands import publication
from hf_circuit_sparsity.modeling.fingerprint import model_fingerprint
from tests.conftest import FIXTURES, random_model, sparsify

TASKS = ("single_double_quote", "while_return_true")
REPO = "ada/tiny"
PARTS = [
    ("model", REPO), ("model", f"{REPO}-circuits"), ("dataset", f"{REPO}-tasks"),
    ("space", f"{REPO}-viewer"),
]  # fmt: skip
ROWS = {"n_train": 32, "n_test": 16}
REPORT = {"prompts": 8, "text_tokens": 256, "examples": 1}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(publication, "ROWS", ROWS)
    monkeypatch.setattr(publication, "REPORT", ReportConfig(**REPORT))


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory) -> Path:
    """A folder as `train` and `prune` leave it: a model and two circuits (of guessing)."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    tokenizer = tokenizer_from_openai(FIXTURES / "tokenizer")
    config = CircuitGPTConfig(
        n_layer=1, n_head=2, d_head=8, d_model=16, d_mlp=32, block_size=64,
        vocab_size=len(tokenizer), enable_bigram_table=False,
    )  # fmt: skip
    sparsify(random_model(config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    model = CircuitGPTForCausalLM.from_pretrained(folder)
    config = PruningConfig(
        target_loss=9.0, selection_margin=1.0, max_steps=4, batch_size=8, selection_prompts=16,
        cleanup=False,
    )  # fmt: skip
    reference = torch.randint(0, len(tokenizer), (8, 64), generator=torch.manual_seed(0))
    for name in TASKS:
        task = load_task(name, tokenizer, **ROWS)
        circuit = find_circuit(model, task, config, reference=reference)
        # What a model that knows nothing needs is nothing; a page needs something to show.
        nodes = {site: [1, 4] for site in circuit.means}
        replace(circuit, nodes=nodes).save_pretrained(folder / "circuits" / name)
    score = TaskScore(TASKS[0], 0.75, 0.51, 0.5, 16)
    (folder / "task_evaluation.json").write_text(
        json.dumps({"model_fingerprint": model_fingerprint(model), "tasks": [asdict(score)]})
    )
    (folder / "checkpoint-4").mkdir()
    (folder / "checkpoint-4" / "circuit.json").write_text("{not one of ours")
    return folder


def publish(run_dir, corpus, *more: str) -> int:
    arguments = ["publish", str(run_dir), "--repo", REPO, "--corpus", str(corpus)]
    return main([*arguments, *more])


def publishing(run_dir: Path, corpus: Path) -> list[str]:
    """The command line of a process that publishes, at the size of a test."""
    arguments = ["publish", str(run_dir), "--repo", REPO, "--corpus", str(corpus)]
    code = f"""
import sys
from hf_circuit_sparsity.circuits.viewer.report_data import ReportConfig
from hf_circuit_sparsity.cli import main
from hf_circuit_sparsity.commands import publication
publication.ROWS, publication.REPORT = {ROWS}, ReportConfig(**{REPORT})
sys.exit(main({arguments}))
"""
    return [sys.executable, "-c", code]


def stored_bytes(api: HfApi) -> dict[str, int]:
    """Bytes of everything that was published, by repository."""
    sizes = {}
    for kind, name in PARTS:
        files = api.list_repo_tree(name, repo_type=kind, recursive=True)
        sizes[name] = sum(
            f.size for f in files if hasattr(f, "blob_id") and f.path != ".gitattributes"
        )
    return sizes


def test_a_dry_run_says_what_would_go_where_and_sends_nothing(hub_server, run_dir, corpus, capsys):
    assert publish(run_dir, corpus, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert not hub_server.log
    for expected in (
        "model → model ada/tiny,", "circuits → model ada/tiny-circuits,",
        "tasks → dataset ada/tiny-tasks,", "viewer → space ada/tiny-viewer,",
        "single_double_quote/circuit.safetensors", "while_return_true/test-00000-of-00001.parquet",
        "modeling_circuitgpt.py", "Nothing was sent.",
    ):  # fmt: skip
        assert expected in printed
    assert "checkpoint-4" not in printed and "training_args.bin" not in printed

    assert publish(run_dir, corpus) == 0
    total = sum(stored_bytes(HfApi()).values())
    assert f"\n{total:,} bytes in all" in printed


def test_everything_is_there_private_and_tied_together(hub_server, run_dir, corpus, capsys):
    assert publish(run_dir, corpus) == 0
    printed = capsys.readouterr().out
    api = HfApi()
    for kind, name in PARTS:
        assert api.repo_info(name, repo_type=kind).private
    collection = next(api.list_collections(owner="ada"))
    assert collection.private
    items = api.get_collection(collection.slug).items
    assert [(item.item_type, item.item_id) for item in items] == PARTS
    assert f"{api.endpoint}/collections/{collection.slug}" in printed

    model = AutoModelForCausalLM.from_pretrained(REPO)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = CircuitGPTForCausalLM.from_pretrained(run_dir)(ids).logits
        torch.testing.assert_close(model(ids).logits, expected)
    found = list_circuits(REPO)
    assert [(c.repo_id, c.subfolder) for c in found] == [(f"{REPO}-circuits", t) for t in TASKS]
    for place in found:
        circuit = place.load()
        circuit.check_model(model)
        assert (circuit.model_name, circuit.model_revision) == (REPO, api.model_info(REPO).sha)
        local = Circuit.from_pretrained(run_dir / "circuits" / place.subfolder)
        assert circuit.nodes == local.nodes
    rows = load_dataset(f"{REPO}-tasks", TASKS[0])
    assert set(rows) == {"train", "test"} and len(rows["train"]) == ROWS["n_train"]
    space = api.space_info(f"{REPO}-viewer")
    assert space.sdk == "static"
    pages = [s.rfilename for s in space.siblings if s.rfilename.endswith(".html")]
    assert pages == ["index.html", *(f"{task}.html" for task in TASKS)]
    index = Path(hf_hub_download(f"{REPO}-viewer", "index.html", repo_type="space")).read_text()
    assert all(f'<a href="{task}.html">' in index for task in TASKS)
    assert "75.0%" in ModelCard.load(REPO).text  # what `evaluate` measured


def test_the_same_again_sends_nothing(hub_server, run_dir, corpus, capsys):
    assert publish(run_dir, corpus) == 0
    before, log = hub_server.uploaded(), len(hub_server.log)
    commits = {n: len(r.commits) for n, r in hub_server.hub.repositories.items()}
    capsys.readouterr()
    assert publish(run_dir, corpus) == 0
    assert hub_server.uploaded() == before
    assert not [e for e in hub_server.log[log:] if "/commit/" in e.path]
    assert commits == {n: len(r.commits) for n, r in hub_server.hub.repositories.items()}
    assert capsys.readouterr().out.count("all there already") == len(commits)
    assert len(list(HfApi().list_collections(owner="ada"))) == 1


def sent_content(hub_server) -> tuple[list[str], int]:
    """The LFS objects received, with repetitions, and bytes of commits that were answered."""
    objects = [e.path for e in hub_server.log if e.method == "PUT" and e.status == 200]
    return objects, sum(e.received for e in hub_server.log if "/commit/" in e.path)


@pytest.fixture
def ctrl_c_works() -> Iterator[None]:
    """A shell starts what runs in the background with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_works")
@pytest.mark.parametrize(
    "point",
    [
        "ada/tiny/commit/", "ada/tiny-circuits/preupload/", "ada/tiny-tasks/commit/",
        "/api/collections",
    ],
)  # fmt: skip
def test_ctrl_c_and_the_same_command_sends_the_rest_and_no_more(
    hub_server, run_dir, corpus, capsys, point
):
    interrupted = []

    def interrupt(request):
        if not interrupted and request.method == "POST" and point in request.path:
            interrupted.append(request.path)
            os.kill(os.getpid(), signal.SIGINT)
            raise ConnectionAbortedError

    hub_server.before = interrupt
    assert publish(run_dir, corpus) == 130
    assert "Stopped" in capsys.readouterr().out
    assert interrupted
    assert publish(run_dir, corpus) == 0
    objects, _ = sent_content(hub_server)
    assert len(objects) == len(set(objects)), "an object was sent twice"
    answered = [e.path for e in hub_server.log if "/commit/" in e.path]
    assert len(answered) == len(set(answered)) == len(hub_server.hub.repositories)


def test_killed_within_an_upload_and_started_again(hub_server, run_dir, corpus):
    """The process is killed while a file of the second repository is on its way."""
    puts = []
    running: list[subprocess.Popen] = []

    def kill(request):
        if request.method == "PUT":
            puts.append(request.path)
            if "ada/tiny-circuits" in {r.id for r in hub_server.hub.repositories.values()}:
                running[0].kill()
                raise ConnectionAbortedError

    hub_server.before = kill
    process = subprocess.Popen(
        publishing(run_dir, corpus), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    running.append(process)
    _, error = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, error.decode()
    assert len(puts) > 1
    hub_server.before = None
    api = HfApi()
    first = api.model_info(REPO).sha
    assert publish(run_dir, corpus) == 0
    assert api.model_info(REPO).sha == first
    objects, in_commits = sent_content(hub_server)
    assert len(objects) == len(set(objects))
    # A commit carries regular files as base64 between some JSON.
    assert hub_server.uploaded() - in_commits + in_commits * 3 / 4 < 1.1 * sum(
        stored_bytes(api).values()
    )


def test_what_cannot_be_published_is_said_before_anything_is_sent(
    hub_server, run_dir, tmp_path, capsys, monkeypatch
):
    def refused(*arguments: str) -> str:
        assert main(["publish", *arguments]) == 2
        return capsys.readouterr().err

    assert str(tmp_path) in refused(str(tmp_path), "--repo", REPO)
    assert "'tiny'" in refused(str(run_dir), "--repo", "tiny")
    other = tmp_path / "other"
    random_model(CircuitGPTForCausalLM.from_pretrained(run_dir).config, 3).save_pretrained(other)
    tokenizer_from_openai(FIXTURES / "tokenizer").save_pretrained(other)
    circuit = Circuit.from_pretrained(run_dir / "circuits" / TASKS[0])
    circuit.save_pretrained(other / "circuits" / "stray")
    assert "stray" in refused(str(other), "--repo", REPO)
    assert not hub_server.log
    monkeypatch.setenv("HF_TOKEN", "")
    assert "hf auth login" in refused(str(run_dir), "--repo", REPO)
    monkeypatch.setenv("HF_TOKEN", hub_server.add_user("bob"))
    assert "right to write" in refused(str(run_dir), "--repo", REPO)
    assert not hub_server.hub.repositories
