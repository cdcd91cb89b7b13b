"""A token file of real Python, from permissively licensed packages that pip can install.

Writes into `--folder`: `train.bin` and `validation.bin` (uint16 tokens, documents ended by the
end-of-text token), `tokenizer/`, and `manifest.json` with every package's version, licence and
share. No file is in twice, and no package is in both splits.
"""

import argparse
import hashlib
import random
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from email.parser import HeaderParser
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from hf_circuit_sparsity.files import replacing, write_json
from hf_circuit_sparsity.tasks.tokenizer import train_tokenizer

# Those for validation are of several kinds: the web, numbers, tools, text.
VALIDATION = ("tornado", "networkx", "sqlglot", "pytest", "jinja2", "nltk")
TRAIN = (
    "django", "numpy", "scipy", "sympy", "sqlalchemy", "twisted", "pandas", "scikit-learn",
    "transformers", "matplotlib", "statsmodels", "astropy", "ipython", "aiohttp", "pydantic",
    "celery", "botocore", "keras", "jax", "dask", "distributed", "xarray", "bokeh", "mypy", "pip",
    "setuptools", "sphinx", "docutils", "pygments", "spacy", "scikit-image", "wagtail", "nova",
    "neutron", "cinder", "keystone", "glance", "ironic", "biopython", "rdflib", "scrapy",
    "streamlit", "mlflow", "diffusers", "peft", "accelerate", "datasets", "timm", "gradio",
    "ibis-framework", "mne", "nilearn", "music21", "pymc", "qiskit", "cirq-core", "pennylane",
    "sktime", "prefect", "dagster", "apache-airflow-core", "moto", "conan", "mitmproxy", "angr",
    "manim", "pyglet", "textual", "rich", "homeassistant", "salt", "trimesh", "pyvista", "flask",
    "werkzeug", "requests", "urllib3", "fastapi", "starlette", "httpx", "black", "tox", "poetry",
    "kombu", "boto3", "sentence-transformers", "lightning", "ray", "langchain-core", "openai",
    "nibabel", "sunpy", "plasmapy", "zope-interface", "pyramid", "tensorflow-probability", "flax",
    "optax", "gluonts", "torchvision", "torchmetrics", "ansible-runner", "cfn-lint", "checkov",
)  # fmt: skip
PERMISSIVE = re.compile(r"MIT|BSD|Apache|PSF|Python Software|ISC|Public Domain|HPND|0BSD", re.I)
COPYLEFT = re.compile(r"GPL|Lesser|Affero|MPL|Mozilla|EUPL|Commercial|Proprietary", re.I)
LEFT_OUT = re.compile(r"(^|/)(tests?|testing|migrations|locale|_?vendor(ed)?|conftest\.py)(/|$)")
LARGEST_FILE = 200_000  # bytes; what is larger is mostly data
TOKENIZER_SAMPLE = 16_000_000  # characters the tokenizer is trained on


@dataclass
class Package:
    """One line of the manifest: a package, and how much of it the token files hold."""

    name: str
    version: str
    license: str
    split: str
    files: int = 0
    characters: int = 0
    tokens: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("gpu_data"))
    parser.add_argument("--wheels", type=Path, default=Path("runs/gpu_corpus_wheels"))
    parser.add_argument("--names", nargs="+", default=[*VALIDATION, *TRAIN], help="packages")
    parser.add_argument("--vocab-size", type=int, default=2048)
    parser.add_argument("--characters-per-package", type=int, default=4_000_000)
    parser.add_argument("--tokens", type=int, default=21_900_000, help="most of `train.bin`")
    parser.add_argument("--validation-tokens", type=int, default=700_000)
    build(parser.parse_args())


def build(args: argparse.Namespace) -> None:
    """Download, read, train the tokenizer and write; see the module."""
    packages: list[Package] = []
    documents: dict[str, list[tuple[Package, str]]] = {"train": [], "validation": []}
    seen: set[bytes] = set()
    # Validation first: what a package of the other split repeats, it does not get.
    for name in args.names:
        wheel = download(name, args.wheels)
        if wheel is None:
            continue
        package = read_metadata(wheel, "validation" if name in VALIDATION else "train")
        if not PERMISSIVE.search(package.license) or COPYLEFT.search(package.license):
            print(f"{name}: left out, its licence is {package.license!r}", flush=True)
            continue
        texts = list(python_files(wheel, seen, args.characters_per_package))
        documents[package.split] += [(package, text) for text in texts]
        packages.append(package)
        print(f"{name} {package.version}: {sum(map(len, texts)):,} characters", flush=True)

    # Shuffled, so that the file may end anywhere and still holds something of each.
    for rows in documents.values():
        random.Random(0).shuffle(rows)
    texts = [text for _, text in documents["train"]]
    sample = texts[: max(1, TOKENIZER_SAMPLE * len(texts) // sum(map(len, texts)))]
    tokenizer = train_tokenizer(sample, args.vocab_size)
    args.folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.folder / "tokenizer")
    counts = {}
    for split, most in (("train", args.tokens), ("validation", args.validation_tokens)):
        tokens = tokenize(documents[split], tokenizer, most)
        counts[split] = len(tokens)
        with replacing(args.folder / f"{split}.bin") as temporary:
            tokens.tofile(temporary)
        print(f"{split}: {len(tokens):,} tokens", flush=True)
    manifest = {"tokens": counts, "packages": [asdict(package) for package in packages]}
    write_json(args.folder / "manifest.json", manifest)


def download(name: str, folder: Path) -> Path | None:
    """The package's wheel, downloaded once; None if there is none."""
    folder = folder / name
    if not list(folder.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", str(folder), name]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            print(f"{name}: {result.stderr.strip().splitlines()[-1]}", flush=True)
    return next(folder.glob("*.whl"), None)


def read_metadata(wheel: Path, split: str) -> Package:
    """Name, version and licence, as the wheel states them."""
    with zipfile.ZipFile(wheel) as archive:
        path = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        fields = HeaderParser().parsestr(archive.read(path).decode("utf-8", "replace"))
    classifiers = [c.split(" :: ")[-1] for c in fields.get_all("Classifier", []) if "Licens" in c]
    line = (fields["License"] or "").strip().split("\n")[0]
    license = fields["License-Expression"] or ", ".join(classifiers) or line or "not stated"
    return Package(fields["Name"], fields["Version"], license, split)


def python_files(wheel: Path, seen: set[bytes], most: int) -> Iterator[str]:
    """The texts of a wheel's Python files that were not seen before, in an order drawn by name."""
    with zipfile.ZipFile(wheel) as archive:
        paths = [i.filename for i in archive.infolist() if i.file_size <= LARGEST_FILE]
        paths = [p for p in paths if p.endswith(".py") and not LEFT_OUT.search(p)]
        for path in sorted(paths, key=lambda p: hashlib.sha256(p.encode()).digest()):
            if most <= 0:
                return
            try:
                text = archive.read(path).decode("utf-8-sig").replace("\r\n", "\n")
            except UnicodeDecodeError:
                continue
            digest = hashlib.sha256(re.sub(r"\s+", " ", text).encode()).digest()
            lines = text.count("\n") + 1
            # Tables of data have long lines; a package's marker has next to nothing in it.
            if digest in seen or len(text) < 200 or len(text) / lines > 100:
                continue
            seen.add(digest)
            most -= len(text)
            yield text


def tokenize(
    rows: list[tuple[Package, str]], tokenizer: PreTrainedTokenizerFast, most: int
) -> np.ndarray:
    """Texts as one stream of at most so many uint16, each ended by the end-of-text token."""
    stream, length = [], 0
    for first in range(0, len(rows), 64):
        if length >= most:
            break
        batch = rows[first : first + 64]
        encoded = tokenizer(
            [text for _, text in batch], add_special_tokens=False, split_special_tokens=True,
            return_attention_mask=False, return_token_type_ids=False, verbose=False,
        )["input_ids"]  # fmt: skip
        for (package, text), ids in zip(batch, encoded, strict=True):
            stream.append(np.array([*ids, tokenizer.eos_token_id], np.uint16))
            length += len(stream[-1])
            package.files += 1
            package.characters += len(text)
            package.tokens += len(stream[-1])
    return np.concatenate(stream)[:most]


if __name__ == "__main__":
    main()
