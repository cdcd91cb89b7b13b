"""The door for files that others made: every JSON value and tensor is checked before it is used.

Whatever is wrong with a file becomes one [`ArtifactError`] that names the file and the field. This
file does not travel to the Hub: models are read by `sparse_checkpoint.py`.
"""

import json
import os
import re
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from safetensors import safe_open

from .configuration_circuitgpt import ArtifactError
from .sparse_checkpoint import TENSOR_ERRORS

MAX_JSON_BYTES = 64 << 20
_DAMAGED = "copy or download it again"


class Field:
    """A value out of a JSON file that knows where it stands; its methods return it checked.

    Every method raises an [`ArtifactError`] that names the file, the field, what was expected and
    what is there.
    """

    def __init__(self, value: Any, path: str | os.PathLike, name: str = "") -> None:
        self.value = value
        self.path = path
        self.name = name

    def fail(self, expected: str) -> NoReturn:
        """Refuse the value: the field "must be …"."""
        shown = repr(self.value)
        shown = shown if len(shown) <= 60 else f"{shown[:57]}…"
        kind = type(self.value).__name__
        raise ArtifactError(
            self.path, f": {self.name or 'it'} must be {expected}, but it is {shown} ({kind})."
        )

    def has(self, name: str) -> bool:
        """Whether this object has a field of that name."""
        return name in self._object()

    def __getitem__(self, name: str) -> "Field":
        if name not in self._object():
            raise ArtifactError(self.path, f": {self._inner(name)} is missing; {_DAMAGED}.")
        return Field(self.value[name], self.path, self._inner(name))

    def items(self) -> Iterator[tuple[str, "Field"]]:
        """The names and values of an object; names are lines of text."""
        for name, value in self._object().items():
            Field(name, self.path, f"a name in {self.name or 'it'}").line(200)
            yield name, Field(value, self.path, f"{self.name}[{name!r}]")

    def elements(self) -> Iterator["Field"]:
        """The elements of a list."""
        if not isinstance(self.value, list):
            self.fail("a list")
        for i, value in enumerate(self.value):
            yield Field(value, self.path, f"{self.name}[{i}]")

    def text(self, longest: int = 1 << 20) -> str:
        """A string that can be written as UTF-8."""
        if not isinstance(self.value, str):
            self.fail("a string")
        if len(self.value) > longest:
            self.fail(f"at most {longest:,} characters long")
        if any("\ud800" <= c <= "\udfff" for c in self.value):
            self.fail("valid Unicode")
        return self.value

    def line(self, longest: int = 4096) -> str:
        """A string of printable characters, without line ends."""
        if not self.text(longest).isprintable():
            self.fail("one line of printable characters")
        return self.value

    def name_of_folder(self, longest: int = 200) -> str:
        """A line that, used as a relative path, stays inside the folder it starts in."""
        parts = re.split(r"[/\\]", self.line(longest))
        if not all(parts) or {".", ".."} & set(parts) or re.match("~|[A-Za-z]:", parts[0]):
            self.fail("a name, and no path that leads out of its folder")
        return self.value

    def matching(self, pattern: str, expected: str) -> str:
        """A string that `pattern` matches in full."""
        if not isinstance(self.value, str) or not re.fullmatch(pattern, self.value):
            self.fail(expected)
        return self.value

    def number(self) -> float:
        """A finite number."""
        if isinstance(self.value, bool) or not isinstance(self.value, (int, float)):
            self.fail("a number")
        if not abs(self.value) <= sys.float_info.max:  # so is an integer that no float can hold
            self.fail("a finite number")
        return self.value

    def integer(self, low: int, high: int) -> int:
        """An integer from `low` to `high`."""
        if type(self.value) is not int or not low <= self.value <= high:
            self.fail(f"an integer from {low} to {high}")
        return self.value

    def boolean(self) -> bool:
        """True or false."""
        if not isinstance(self.value, bool):
            self.fail("true or false")
        return self.value

    def integers(self, low: int, high: int) -> list[int]:
        """A list of such integers."""
        return [element.integer(low, high) for element in self.elements()]

    def plain(self, depth: int = 20) -> Any:
        """Any JSON value whose numbers are finite, nested at most `depth` deep."""
        if depth < 0:
            self.fail("nested less deeply")
        if isinstance(self.value, dict):
            for _, inner in self.items():
                inner.plain(depth - 1)
        elif isinstance(self.value, list):
            for inner in self.elements():
                inner.plain(depth - 1)
        elif isinstance(self.value, str):
            self.text()
        elif not isinstance(self.value, bool) and self.value is not None:
            self.number()
        return self.value

    def _object(self) -> dict[str, Any]:
        if not isinstance(self.value, dict):
            self.fail("an object")
        return self.value

    def _inner(self, name: str) -> str:
        return f"{self.name}[{name!r}]" if self.name else name


def read_json(path: str | os.PathLike) -> Field:
    """The object that a JSON file holds.

    Raises:
        ArtifactError: the file is too large, not JSON, no object, or names a field twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ArtifactError(path, f" has the field {twice[:80]!r} twice; {_DAMAGED}.")
        return content

    try:
        with open(path, "rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise ArtifactError(path, f" is larger than {MAX_JSON_BYTES >> 20} MiB; make it anew.")
        content = json.loads(data.decode("utf-8"), object_pairs_hook=unique)
    except ArtifactError:
        raise
    except (ValueError, RecursionError, OSError) as error:
        raise ArtifactError(path, f" is not valid JSON ({error}); {_DAMAGED}.") from error
    if not isinstance(content, dict):
        raise ArtifactError(
            path, f" holds {type(content).__name__}, expected an object; {_DAMAGED}."
        )
    return Field(content, path)


def tensor_shapes(path: str | os.PathLike) -> dict[str, tuple[int, ...]]:
    """Names and shapes in a safetensors file, from its header alone.

    Raises:
        ArtifactError: the header is damaged or does not fit the file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except TENSOR_ERRORS as error:
        raise ArtifactError(path, f" is damaged ({error}); {_DAMAGED}.") from error


def check_vector(path: str | os.PathLike, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, if it is a finite float32 vector.

    Raises:
        ArtifactError: it is not.
    """
    if tensor.dim() != 1 or tensor.dtype != torch.float32:
        raise ArtifactError(
            path,
            f": {name} must be a vector of float32, but it has dtype "
            f"{str(tensor.dtype).removeprefix('torch.')} and shape {tuple(tensor.shape)}.",
        )
    if not tensor.isfinite().all():
        wrong = int((~tensor.isfinite()).nonzero()[0])
        raise ArtifactError(
            path, f": {name}[{wrong}] must be a finite number, but it is {tensor[wrong].item()}."
        )
    return tensor
