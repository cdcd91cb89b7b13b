"""Files of one artifact: a save that is stopped leaves none that are read with older ones."""

import json
import os
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import CONFIG_NAME as ADAPTER_CONFIG_NAME

from hf_circuit_sparsity.adapters import CircuitPeftConfig
from hf_circuit_sparsity.bridge.modeling_bridge import BridgedCausalLM
from hf_circuit_sparsity.circuits.circuit import Circuit
from hf_circuit_sparsity.files import replacing_together
from hf_circuit_sparsity.modeling.causal_lm import load_causal_lm, save_nonzeros
from hf_circuit_sparsity.modeling.configuration_circuitgpt import CircuitGPTConfig
from tests.circuits.planted import planted_circuit, planted_model, reference_ids
from tests.conftest import random_model, sparsify

IDS = reference_ids()[:2, :8]


def circuitgpt(afrac):
    config = CircuitGPTConfig(
        n_layer=1, n_head=2, d_head=8, d_model=16, d_mlp=16, block_size=16, vocab_size=16,
        afrac=afrac, enable_bigram_table=False,
    )  # fmt: skip
    return sparsify(random_model(config, seed=int(8 * afrac)))


def logits(model):
    with torch.no_grad():
        return model.eval()(IDS).logits


class Models:
    """A CircuitGPT, by its nonzeros."""

    def made(self, other, make_gpt2):
        return circuitgpt(0.5 if other else 0.25)

    def save(self, model, folder):
        model.save_pretrained(folder, sparse=True)

    def load(self, folder, model):
        return logits(load_causal_lm(folder))


class OtherModels(Models):
    """A GPT-2, by its nonzeros."""

    def made(self, other, make_gpt2):
        activation = "relu" if other else "gelu_new"
        return sparsify(make_gpt2(seed=int(other), activation_function=activation))

    def save(self, model, folder):
        save_nonzeros(model, folder)


class Bridges(Models):
    def made(self, other, make_gpt2):
        torch.manual_seed(int(other))
        sparse = CircuitGPTConfig(
            n_layer=2, n_head=2, d_head=8, d_model=16, d_mlp=16, block_size=16, vocab_size=61,
            afrac=0.5 if other else 0.25,
        )  # fmt: skip
        return BridgedCausalLM.from_models(make_gpt2(), sparse).eval()

    def save(self, model, folder):
        model.save_pretrained(folder)

    def load(self, folder, model):
        return logits(BridgedCausalLM.from_pretrained(folder, dense=model.dense).sparse)


class Circuits(Models):
    def made(self, other, make_gpt2):
        model = planted_model()
        circuit = planted_circuit(model)
        if other:
            circuit.nodes["h.1.mlp.post_act"] = [3]
            circuit.means = {site: mean + 1 for site, mean in circuit.means.items()}
        return circuit

    def save(self, circuit, folder):
        circuit.save_pretrained(folder)

    def load(self, folder, circuit):
        with Circuit.from_pretrained(folder).apply(planted_model()) as model:
            return logits(model)


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("kind", [Models, OtherModels, Bridges, Circuits])
def test_a_save_that_is_stopped_is_old_or_new_or_not_read(kind, make_gpt2, tmp_path, monkeypatch):
    old, new = (kind().made(other, make_gpt2) for other in (False, True))
    expected = []
    for made in (old, new):
        kind().save(made, tmp_path / "whole")
        expected.append(kind().load(tmp_path / "whole", made))
    assert not torch.equal(*expected)
    replace, read, moves, last = os.replace, [], 0, 0
    while last == moves:  # until a save was not stopped
        folder, moves, last = tmp_path / str(moves), 0, moves + 1

        def move(source, target, stop=last):
            nonlocal moves
            moves += 1
            if moves == stop:
                raise Stopped
            replace(source, target)

        kind().save(old, folder)
        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", move)
            with suppress(Stopped):
                kind().save(new, folder)
        try:
            found = kind().load(folder, new)
        except (OSError, ValueError):
            read.append("refused")
        else:
            (which,) = (i for i in range(2) if torch.equal(found, expected[i]))
            read.append(("old", "new")[which])
    assert read[-1] == "new" and read == sorted(read, key=["old", "refused", "new"].index)
    assert len(read) >= 3


@pytest.mark.parametrize("stopped", [False, True])
def test_an_adapter_is_not_read_with_the_weights_of_another_save(stopped, tmp_path, monkeypatch):
    base = planted_model()
    circuit = planted_circuit(base)
    for into in (["post_act"], ["v"]):  # one edge each
        config = CircuitPeftConfig.from_circuit(circuit, base, into=into)
        adapter = get_peft_model(planted_model(), config)
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(1.0) if p.requires_grad else None
        if stopped and into == ["v"]:  # after the weights, before the config
            monkeypatch.setattr(PeftConfig, "save_pretrained", lambda *args, **kwargs: None)
        adapter.save_pretrained(tmp_path)
    if stopped:
        with pytest.raises(ValueError, match="adapter_model"):
            PeftModel.from_pretrained(planted_model(), str(tmp_path))
    else:
        again = PeftModel.from_pretrained(planted_model(), str(tmp_path))
        assert torch.equal(logits(again), logits(adapter))
    content = json.loads((tmp_path / ADAPTER_CONFIG_NAME).read_text())
    (tmp_path / ADAPTER_CONFIG_NAME).write_text(json.dumps({**content, "weights_sha256": ""}))
    PeftModel.from_pretrained(planted_model(), str(tmp_path))  # as saved before there were hashes


def test_files_that_are_replaced_together(tmp_path):
    (tmp_path / "kept").write_text("kept")
    (tmp_path / ".saving").mkdir()
    (tmp_path / ".saving" / "of a process that was killed").write_text("")
    for text in ("old", "new"):
        with replacing_together(tmp_path, "switch") as folder:
            assert not any(folder.iterdir())
            for name in ("switch", "part"):
                (folder / name).write_text(text)
    with pytest.raises(Stopped), replacing_together(tmp_path, "switch") as folder:
        (folder / "part").write_text("newer")
        raise Stopped
    found = {path.name: path.read_text() for path in Path(tmp_path).iterdir()}
    assert found == {"kept": "kept", "switch": "new", "part": "new"}
