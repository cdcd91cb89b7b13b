import json
from xml.etree import ElementTree

import pytest

from hf_circuit_sparsity.trainer.training_curves import plot_training_curves, read_training_curves

LOGS = [
    {"step": 10, "loss": 5.0, "nonzero_fraction": 1.0},
    {"step": 20, "loss": 4.0, "nonzero_fraction": 0.1},
    {"step": 20, "eval_loss": 4.2},
    {"step": 20, "train_runtime": 3.0},
]


def write_state(folder, logs):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": logs}))


def test_curves_are_read_from_the_folder_or_its_last_checkpoint(tmp_path):
    write_state(tmp_path / "checkpoint-9", LOGS[:1])
    write_state(tmp_path / "checkpoint-20", LOGS)
    curves = read_training_curves(tmp_path)
    assert curves.loss == [(10, 5.0), (20, 4.0)]
    assert curves.evaluation == [(20, 4.2)]
    assert curves.density == [(10, 1.0), (20, 0.1)]
    write_state(tmp_path, LOGS[:1])
    assert read_training_curves(tmp_path).loss == [(10, 5.0)]


@pytest.mark.parametrize("width", [3.25, 6.75])
def test_the_picture_is_as_wide_as_asked_and_its_text_is_text(tmp_path, width):
    write_state(tmp_path, LOGS)
    path = plot_training_curves(tmp_path, tmp_path / "pictures" / "training.svg", width)
    assert [p.name for p in path.parent.iterdir()] == ["training.svg"]
    drawing = ElementTree.parse(path).getroot()
    assert drawing.get("width") == f"{72 * width:g}pt"
    text = "".join(drawing.itertext())
    for expected in ("loss (nats per token)", "density", "validation", "0.1"):
        assert expected in text


def test_a_dense_run_is_drawn_without_density(tmp_path):
    write_state(tmp_path, [{"step": 1, "loss": 5.0}, {"step": 2, "loss": 4.0}])
    path = plot_training_curves(tmp_path, tmp_path / "training.svg")
    assert "density" not in path.read_text()


def test_a_folder_without_logs_is_refused_before_anything_is_written(tmp_path):
    picture = tmp_path / "training.png"
    with pytest.raises(FileNotFoundError, match="trainer_state"):
        plot_training_curves(tmp_path / "nowhere", picture)
    write_state(tmp_path, LOGS[2:])
    with pytest.raises(ValueError, match="trainer_state"):
        plot_training_curves(tmp_path, picture)
    (tmp_path / "trainer_state.json").write_text("[")
    with pytest.raises(ValueError, match="trainer_state"):
        plot_training_curves(tmp_path, picture)
    assert not picture.exists()
