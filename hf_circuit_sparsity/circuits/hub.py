"""Circuits on the Hub: where in a repository they lie, and how to get them from there.

A repository may hold one circuit at its root and any number in folders; each is a `circuit.json`
beside a `circuit.safetensors`.
"""

from dataclasses import dataclass
from typing import Any

from huggingface_hub import HfApi, ModelInfo

from .circuit import Circuit
from .circuit_file import circuit_folders

TAG = "circuit"


@dataclass(frozen=True)
class CircuitOnHub:
    """Where a circuit lies on the Hub.

    Attributes:
        repo_id: `user/name`.
        subfolder: its folder in there; "" at the root.
        revision: commit hash.
    """

    repo_id: str
    subfolder: str
    revision: str

    def load(self, **options: Any) -> Circuit:
        """The circuit, at this very commit; options as of [`Circuit.from_pretrained`]."""
        return Circuit.from_pretrained(
            self.repo_id, subfolder=self.subfolder, revision=self.revision, **options
        )


def list_circuits(
    repo_id: str, *, revision: str | None = None, token: str | bool | None = None
) -> list[CircuitOnHub]:
    """The circuits in a repository, then those of other repositories that name it as base model.

    Args:
        repo_id: `user/name` of a model, or of a repository of circuits.
        revision: branch, tag or commit hash of that repository; the others are read at their head.
        token: access token; the saved one if not given, none if False.

    Raises:
        HfHubHTTPError: (an `OSError`) the repository is missing or cannot be read.
    """
    api = HfApi(token=token)
    info = api.model_info(repo_id, revision=revision)
    circuits = _circuits_in(info)
    # The Hub makes such a tag of every card that names a base model.
    tags = [f"base_model:{repo_id}", TAG]
    for other in api.list_models(filter=tags, full=True):
        if other.id != repo_id:
            circuits += _circuits_in(other)
    return circuits


def _circuits_in(info: ModelInfo) -> list[CircuitOnHub]:
    return [CircuitOnHub(info.id, folder, info.sha) for folder in circuit_folders(info)]
