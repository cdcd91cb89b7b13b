"""Damaged task files: each is refused by its name, or read as it says; its text stays text."""

import csv
import io

import pytest

from hf_circuit_sparsity.circuits.circuit import Circuit
from hf_circuit_sparsity.circuits.viewer.report import render_page
from hf_circuit_sparsity.circuits.viewer.report_data import ReportConfig, report_data
from hf_circuit_sparsity.tasks.binary_task import BinaryTask
from hf_circuit_sparsity.tasks.text import COLUMNS, read_csv, read_task_text, text_of_table
from tests.circuits.planted import (
    on_off_task,
    planted_circuit,
    planted_model,
    reference_ids,
    word_tokenizer,
)
from tests.hostile.harness import fuzz, plain_json
from tests.tasks.own_tasks import rows, write_csv


def pairs_of(table):
    return [tuple(row[column] for column in COLUMNS) for row in table]


def flat(pairs):
    return [(*one, *other) for one, other in pairs]


def check_json(text, folder):
    content = plain_json(folder / "task.json")
    assert (text.name, text.description) == (content["name"], content["description"])
    for split in ("train", "test"):
        assert flat(getattr(text, split)) == pairs_of(content[split])


def test_fuzz_json(tmp_path):
    on_off_task().text.first(8, 4).save(tmp_path / "task")
    outcome = fuzz(
        tmp_path / "task", "task.json", read_task_text, check_json, tmp_path / "work",
        refusal=ValueError, mutations=300,
    )  # fmt: skip
    assert outcome["refused"] > 150 and outcome["loaded"] > 5, outcome


def load_csv(folder):
    return text_of_table("mine", {"all": read_csv(folder / "mine.csv")})


def check_csv(text, folder):
    data = (folder / "mine.csv").read_bytes().decode("utf-8-sig")
    table = [
        r for r in csv.DictReader(io.StringIO(data, newline=""), strict=True) if any(r.values())
    ]
    found = flat((*text.train, *text.test))
    assert len(found) == len(set(found)) and set(found) <= set(pairs_of(table))
    mirrored = {(p[2], p[3], p[0], p[1]) for p in found}
    assert set(pairs_of(table)) <= set(found) | mirrored


def test_fuzz_csv(tmp_path):
    (tmp_path / "task").mkdir()
    write_csv(tmp_path / "task" / "mine.csv")
    outcome = fuzz(
        tmp_path / "task", "mine.csv", load_csv, check_csv, tmp_path / "work",
        refusal=ValueError, mutations=300,
    )  # fmt: skip
    assert outcome["refused"] > 50 and outcome["loaded"] > 50, outcome


def test_fuzz_a_circuit_with_its_task(tmp_path):
    planted_circuit(planted_model(), own_task=on_off_task().text).save_pretrained(tmp_path / "c")

    def check(circuit, folder):
        check_json(circuit.own_task, folder)
        assert circuit.task == circuit.own_task.name

    outcome = fuzz(tmp_path / "c", "task.json", Circuit.from_pretrained, check, tmp_path / "work")
    assert outcome["refused"] > 60, outcome


@pytest.mark.parametrize(
    "text", ["<script>alert(1)</script>", "</script><img src=x onerror=alert(1)>", "`a` | [x](y)"]
)
def test_prompts_and_descriptions_are_text_on_the_page(text):
    table = [
        {**row, **{c: f"{row[c]} {text}" for c in ("prompt", "counterfactual_prompt")}}
        for row in rows()
    ]
    splits = {"all": [(str(i), row) for i, row in enumerate(table)]}
    own = text_of_table("mine", splits, description=text)
    model = planted_model()
    circuit = planted_circuit(model, task="mine", own_task=own)
    task = BinaryTask.from_text(own, word_tokenizer())
    data = report_data(
        circuit, model, word_tokenizer(), task=task, config=ReportConfig(8, 64, 1),
        reference=reference_ids(), progress=False,
    )  # fmt: skip
    page = render_page(data)
    assert data["description"] == text
    assert "<script>alert" not in page and "<img src=x" not in page
