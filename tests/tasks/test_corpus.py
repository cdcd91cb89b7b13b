import os
import sysconfig
from pathlib import Path

import pytest

from hf_circuit_sparsity.tasks.corpus import build_corpus


@pytest.fixture
def folder(tmp_path):
    for i in range(20):
        file = tmp_path / "pkg" / f"sub{i % 3}" / f"m{i}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"x = {i}\n")
    return tmp_path


def paths(corpus):
    return sorted(path for split in corpus.values() for path in split["path"])


def test_the_standard_library_without_its_tests(stdlib):
    root = Path(sysconfig.get_path("stdlib"))
    assert {"argparse.py", "json/decoder.py"} <= set(paths(stdlib))
    for path in paths(stdlib):
        assert not {"test", "tests", "idle_test", "site-packages"} & set(Path(path).parts)
        assert (root / path).is_file()
    n_characters = sum(len(text) for split in stdlib.values() for text in split["text"])
    assert n_characters > 5_000_000


def test_every_file_is_one_row_with_its_text_and_in_one_split(folder):
    corpus = build_corpus(folder, validation_fraction=0.2)
    assert paths(corpus) == sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*.py"))
    assert corpus["train"].num_rows == 16 and corpus["validation"].num_rows == 4
    for split in corpus.values():
        assert split["path"][:] == sorted(split["path"])
        for row in split:
            assert row["text"] == (folder / row["path"]).read_text()


def test_the_same_seed_gives_the_same_split_and_another_seed_another(folder):
    first, second, other = (build_corpus(folder, seed=seed) for seed in (0, 0, 1))
    for split in first:
        assert first[split].to_dict() == second[split].to_dict()
    assert first["validation"]["path"][:] != other["validation"]["path"][:]


def test_both_splits_have_files_at_every_fraction(folder):
    for fraction in (1e-6, 0.5, 1 - 1e-6):
        corpus = build_corpus(folder, validation_fraction=fraction)
        assert corpus["train"].num_rows >= 1 and corpus["validation"].num_rows >= 1


def test_what_is_left_out_of_ones_own_folder(folder):
    kept = paths(build_corpus(folder))
    for name in ("__pycache__/c.py", ".venv/d.py", ".hidden.py", "site-packages/e.py", "notes.txt"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x = 1\n")
    (folder / "empty.py").write_text("\n  \n")
    assert paths(build_corpus(folder)) == kept
    (folder / "tests").mkdir()
    (folder / "tests" / "t.py").write_text("x = 1\n")
    assert paths(build_corpus(folder)) == sorted([*kept, "tests/t.py"])
    assert "tests/t.py" not in paths(build_corpus(folder, exclude=["tests"]))


def test_line_ends_and_byte_order_marks_are_those_of_python(folder):
    (folder / "win.py").write_bytes(b"\xef\xbb\xbfx = 1\r\ny = 2\rz = 3\n")
    rows = [row for split in build_corpus(folder).values() for row in split]
    assert {"text": "x = 1\ny = 2\nz = 3\n", "path": "win.py"} in rows


def test_a_file_that_is_not_utf8_is_named_or_skipped(folder):
    kept = paths(build_corpus(folder))
    (folder / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\ns = '\xe9'\n")
    with pytest.raises(ValueError, match=r"latin\.py.* 31 .*on_bad_encoding"):
        build_corpus(folder)
    with pytest.warns(UserWarning, match=r"1 file.*latin\.py"):
        assert paths(build_corpus(folder, on_bad_encoding="skip")) == kept


def test_names_that_are_no_text_and_what_is_no_file(folder):
    kept = paths(build_corpus(folder))
    with open(os.fsencode(folder) + b"/caf\xe9.py", "w") as file:
        file.write("y = 1\n")
    os.mkfifo(folder / "pipe.py")
    (folder / "link.py").symlink_to("nothing")
    assert paths(build_corpus(folder)) == sorted([*kept, "caf\\xe9.py"])


def test_bad_folders_and_arguments(tmp_path, folder):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.py").write_text("x = 1\n")
    for path, options, error, message in (
        ("nowhere", {}, FileNotFoundError, "nowhere"),
        ("pkg/sub0/m0.py", {}, NotADirectoryError, "m0.py"),
        ("one", {}, ValueError, "holds 1"),
        *(("", {"validation_fraction": f}, ValueError, "validation_fraction") for f in (0, 1, -1)),
        ("", {"on_bad_encoding": "ignore"}, ValueError, "on_bad_encoding"),
    ):
        with pytest.raises(error, match=message):
            build_corpus(tmp_path / path, **options)
