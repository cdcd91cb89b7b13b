"""Circuits go to the Hub and come back; what stands in the way is said in one sentence each."""

from dataclasses import replace

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from hf_circuit_sparsity import Circuit, CircuitGPTForCausalLM, list_circuits, plot_circuit
from hf_circuit_sparsity.circuits.circuit_file import model_source
from hf_circuit_sparsity.commands.hub_advice import hub_advice
from tests.circuits.planted import planted_circuit, planted_model, word_tokenizer
from tests.hub.outside import run_outside

MODEL, CIRCUITS = "ada/switch", "ada/switch-circuits"


@pytest.fixture
def api(hub_server) -> HfApi:
    return HfApi()


@pytest.fixture
def model(api) -> CircuitGPTForCausalLM:
    """A model as one has it from the Hub: it knows its name and its commit."""
    planted_model().push_to_hub(MODEL)
    return CircuitGPTForCausalLM.from_pretrained(MODEL)


def circuit_of(model, task="on_off") -> Circuit:
    name, revision = model_source(model)
    return planted_circuit(
        model, task=task, model_name=name, model_revision=revision, metrics={"nodes": 6}
    )


def test_a_circuit_comes_back_with_its_model_and_commit(api, model, tmp_path):
    pytest.importorskip("matplotlib")
    circuit = circuit_of(model)
    picture = plot_circuit(circuit, tmp_path / "drawn.png", model, word_tokenizer())
    first = circuit.push_to_hub(CIRCUITS, picture=picture)
    back = Circuit.from_pretrained(CIRCUITS)
    assert back.nodes == circuit.nodes and back.metrics == circuit.metrics
    assert all(torch.equal(back.means[site], mean) for site, mean in circuit.means.items())
    assert (back.model_name, back.model_revision) == (MODEL, api.model_info(MODEL).sha)
    back.check_model(model)
    assert "circuit.png" in api.list_repo_files(CIRCUITS)
    api.create_tag(CIRCUITS, tag="v1")
    replace(circuit, metrics={"nodes": 7}).push_to_hub(CIRCUITS)
    for revision, nodes in ((None, 7), ("v1", 6), (first.oid, 6)):
        assert Circuit.from_pretrained(CIRCUITS, revision=revision).metrics["nodes"] == nodes


def test_several_circuits_in_one_repository(api, model):
    for task in ("on_off", "off_on"):
        circuit_of(model, task).push_to_hub(CIRCUITS, subfolder=task)
    found = list_circuits(CIRCUITS)
    assert [(c.repo_id, c.subfolder) for c in found] == [(CIRCUITS, "off_on"), (CIRCUITS, "on_off")]
    assert {c.load().task for c in found} == {"on_off", "off_on"}
    assert Circuit.from_pretrained(CIRCUITS, subfolder="off_on").task == "off_on"
    with pytest.raises(FileNotFoundError, match="subfolder= one of 'off_on', 'on_off'"):
        Circuit.from_pretrained(CIRCUITS)
    with pytest.raises(ValueError, match="subfolder='third'"):
        circuit_of(model, "third").push_to_hub(CIRCUITS, subfolder="on_off")


def test_circuits_of_a_model_are_found_in_its_repository_and_by_base_model(api, model):
    circuit_of(model).push_to_hub(MODEL, subfolder="circuits/on_off")
    circuit_of(model).push_to_hub(CIRCUITS)
    card = f"---\nbase_model: {MODEL}\ntags: [circuit]\n---\n"
    api.upload_file(path_or_fileobj=card.encode(), path_in_repo="README.md", repo_id=CIRCUITS)
    places = [(c.repo_id, c.subfolder) for c in list_circuits(MODEL)]
    assert places == [(MODEL, "circuits/on_off"), (CIRCUITS, "")]


def test_another_model_is_said_with_both_names_and_commits(api, model):
    circuit = circuit_of(model)
    planted_model(seed=1).push_to_hub(MODEL, sparse=False)
    newer = CircuitGPTForCausalLM.from_pretrained(MODEL)
    old, new = circuit.model_revision[:12], api.model_info(MODEL).sha[:12]
    with pytest.raises(ValueError, match=rf"{MODEL} at {old}.*{MODEL} at {new}"):
        circuit.check_model(newer)
    with pytest.raises(ValueError, match="picture="):
        circuit.push_to_hub(CIRCUITS, picture="nowhere.png")
    assert not api.repo_exists(CIRCUITS)


def test_paths_of_this_machine_stay_here(api, tmp_path):
    local = planted_model()
    local.save_pretrained(tmp_path / "model")
    circuit = circuit_of(CircuitGPTForCausalLM.from_pretrained(tmp_path / "model"))
    assert str(tmp_path) in circuit.model_name
    with pytest.warns(UserWarning, match="by the fingerprint"):
        circuit.push_to_hub(CIRCUITS)
    assert Circuit.from_pretrained(CIRCUITS).model_name == ""
    local.push_to_hub(MODEL)
    circuit.push_to_hub(CIRCUITS, base_model=MODEL)
    back = Circuit.from_pretrained(CIRCUITS)
    assert (back.model_name, back.model_revision) == (MODEL, api.model_info(MODEL).sha)


def test_what_stands_in_the_way_of_loading(api, hub_server, model):
    circuit_of(model).push_to_hub(CIRCUITS)
    api.create_repo("ada/data", repo_type="dataset")
    bob = hub_server.add_user("bob")
    for error, name, options in (
        (RepositoryNotFoundError, "ada/nothing", {}),
        (RepositoryNotFoundError, CIRCUITS, {"token": False}),  # private as pushed
        (RepositoryNotFoundError, CIRCUITS, {"token": bob}),
        (RepositoryNotFoundError, "ada/data", {}),
        (RevisionNotFoundError, CIRCUITS, {"revision": "v9"}),
        (HfHubHTTPError, CIRCUITS, {"token": "hf_stale"}),
        (FileNotFoundError, MODEL, {}),
        (FileNotFoundError, "no-such-folder", {}),
    ):
        with pytest.raises(error):
            Circuit.from_pretrained(name, **options)
    api.update_repo_settings(CIRCUITS, private=False, gated="manual")
    with pytest.raises(GatedRepoError):
        Circuit.from_pretrained(CIRCUITS, token=bob)


def test_what_stands_in_the_way_of_writing(api, hub_server, model):
    circuit = circuit_of(model)
    reader = hub_server.add_user("ada", role="read")
    api.create_repo(CIRCUITS)
    for error, name, options in (
        (HfHubHTTPError, CIRCUITS, {"token": hub_server.add_user("bob")}),
        (HfHubHTTPError, CIRCUITS, {"token": reader}),
        (OSError, CIRCUITS, {"token": False}),
        (HFValidationError, "a/b/c", {}),
        (ValueError, CIRCUITS, {"subfolder": "../up"}),
        (ValueError, CIRCUITS, {"picture": "no-such.png"}),
        (RepositoryNotFoundError, CIRCUITS, {"base_model": "ada/none"}),
    ):
        with pytest.raises(error):
            circuit.push_to_hub(name, **options)
    assert api.list_repo_files(CIRCUITS) == [".gitattributes"]


def test_a_pull_request_leaves_the_branch_as_it_is(api, model):
    before = api.create_repo(CIRCUITS) and api.model_info(CIRCUITS).sha
    proposed = circuit_of(model).push_to_hub(CIRCUITS, create_pr=True)
    assert api.model_info(CIRCUITS).sha == before
    assert Circuit.from_pretrained(CIRCUITS, revision=proposed.pr_revision).task == "on_off"


def test_offline_the_cache_serves_and_else_says_so(api, hub_server, model, tmp_path):
    circuit_of(model).push_to_hub(CIRCUITS)
    commit = api.model_info(CIRCUITS).sha
    Circuit.from_pretrained(CIRCUITS)
    hub_server.log.clear()
    printed = run_outside(
        f"""
        from hf_circuit_sparsity import Circuit, CircuitGPTForCausalLM, list_circuits
        circuit = Circuit.from_pretrained("{CIRCUITS}")
        circuit.check_model(CircuitGPTForCausalLM.from_pretrained(circuit.model_name))
        print(len(circuit), len(Circuit.from_pretrained("{CIRCUITS}", revision="{commit}")))
        for call in (
            lambda: Circuit.from_pretrained("{CIRCUITS}", revision="v2"),
            lambda: Circuit.from_pretrained("ada/other"),
            lambda: list_circuits("{MODEL}"),
        ):
            try:
                call()
            except OSError as error:
                print(type(error).__name__)
        """,
        tmp_path,
        forbid=False,
        HF_HUB_OFFLINE="1",
    )
    assert printed.splitlines() == [
        "6 6", LocalEntryNotFoundError.__name__, LocalEntryNotFoundError.__name__,
        OfflineModeIsEnabled.__name__,
    ]  # fmt: skip
    assert not hub_server.log


def test_a_hub_that_does_not_answer(hub_server):
    def hang_up(request):
        raise ConnectionAbortedError

    hub_server.before = hang_up
    with pytest.raises(Exception) as caught:
        list_circuits(MODEL)
    assert "connection" in hub_advice(caught.value)
