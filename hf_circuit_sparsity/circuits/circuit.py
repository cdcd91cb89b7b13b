"""A circuit: which nodes of a model carry a behaviour, and how to run the model on them alone."""

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import CommitInfo
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..modeling.configuration_circuitgpt import ArtifactError
from ..modeling.fingerprint import model_fingerprint
from ..tasks.binary_task import BinaryTask
from ..tasks.load import list_tasks, load_task
from ..tasks.text import TaskText
from .ablation import (
    ReferenceTokens,
    mean_activations,
    node_sites,
    reference_input_ids,
    unwrapped,
)
from .circuit_file import (
    JSON_NAME,
    PICTURE_NAME,
    download_circuit,
    is_hub_id,
    model_source,
    read_circuit,
    read_own_task,
    write_circuit,
)
from .exports import Exports
from .html import circuit_html
from .node_effects import Interventions
from .openai_circuit import read_openai_masks
from .push import model_on_hub, upload_circuit
from .task_scores import Calibration


@dataclass(eq=False)
class Circuit(Interventions, Exports):
    """Nodes of one model that carry one behaviour.

    Attributes:
        nodes: site → sorted indices of the kept nodes; sites without any are left out.
        means: site → float32 `(width,)`, the values the other nodes are fixed at; every site of
            the model.
        calibration: scale and shift of the logits that belong to the circuit.
        task: name of the task it was found for.
        own_task: that task as text, where it is not a built-in one; see [`Circuit.load_task`].
        names: node, as `h.0.mlp.post_act.7` → what a person calls it, in a few words.
        notes: node → what a person has to say of it.
        model_fingerprint: of the model it was cut out of (see `model_fingerprint`).
        model_name: that model's path or Hub id, for people to find it.
        model_revision: commit hash of that model on the Hub; "" if it is not there.
        metrics: numbers about it, by name (losses in nats).
        config: how it was found, as plain values.
        example: a prompt of the task, its counterfactual and the answers, for pictures: `prompt`,
            `target`, `token_ids`, `target_id`, and the same names with `counterfactual_`.
        scores: site → float32 `(width,)`, the learned mask parameters; empty if it was not learned.
        kept_edges: source site, index, target site, index of the weights that are left between the
            nodes, where edges were pruned too; None where all of them are.
        edge_offsets: target site → index → what the pruned edges add to it on average.
        tokens: ids of the tokens whose embeddings are kept, where those were pruned too; None where
            all of them are.
        token_mean: float32 `(d_model,)`, the embedding that stands in for the other tokens'.
        verification: what [`verify_circuit`] measured, check by check; empty before.
    """

    nodes: dict[str, list[int]]
    means: dict[str, torch.Tensor]
    task: str
    model_fingerprint: str
    calibration: Calibration = field(default_factory=Calibration)
    model_name: str = ""
    model_revision: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    example: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, torch.Tensor] = field(default_factory=dict)
    kept_edges: list[tuple[str, int, str, int]] | None = None
    edge_offsets: dict[str, dict[int, float]] = field(default_factory=dict)
    tokens: list[int] | None = None
    token_mean: torch.Tensor | None = None
    verification: dict[str, dict[str, float]] = field(default_factory=dict)
    own_task: TaskText | None = field(default=None, repr=False)
    names: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.nodes = {site: sorted(ids) for site, ids in self.nodes.items() if ids}
        for site, ids in self.nodes.items():
            if site not in self.means:
                raise ValueError(f"nodes names the site {site!r}, which means does not have.")
            width = len(self.means[site])
            if len(set(ids)) != len(ids) or ids[0] < 0 or ids[-1] >= width:
                raise ValueError(
                    f"nodes[{site!r}] must be distinct indices from 0 to {width - 1}, but it is "
                    f"{ids[:5]}{'…' if len(ids) > 5 else ''}."
                )
        named = [("kept_edges", *end) for e in self.kept_edges or () for end in (e[:2], e[2:])]
        named += [
            ("edge_offsets", site.removesuffix(".gate"), index)
            for site, sums in self.edge_offsets.items()
            for index in sums
        ]
        for name, site, index in named:
            if index not in self.nodes.get(site, ()):
                raise ValueError(f"{name} names {site}.{index}, which is not in nodes.")
        for name in ("names", "notes"):
            for node in getattr(self, name):
                if node not in self:
                    raise ValueError(f"{name} has {node!r:.80}, which is no node of the circuit.")
        if (self.tokens is None) != (self.token_mean is None):
            raise ValueError("tokens and token_mean belong together, but one of them is missing.")
        if self.own_task is not None and self.own_task.name != self.task:
            raise ValueError(f"own_task is {self.own_task.name!r}, but task is {self.task!r}.")

    def __repr__(self) -> str:
        parts = [f"{self.task!r}: {len(self)} nodes"]
        if self.kept_edges is not None:
            parts.append(f"{len(self.kept_edges)} edges")
        if "circuit_loss" in self.metrics:
            parts.append(f"loss {self.metrics['circuit_loss']:.3f} alone")
        parts.append(f"of {self.model_name or self.model_fingerprint}")
        return f"Circuit({', '.join(parts)})"

    def _repr_html_(self) -> str:
        return circuit_html(self)

    def __eq__(self, other: object) -> bool:
        """Whether both compute the same: nodes, edges, tokens, means and calibration of one model.

        What was measured of them, and what they are called, does not count.
        """
        if not isinstance(other, Circuit):
            return NotImplemented
        plain = ("model_fingerprint", "nodes", "tokens", "edge_offsets", "calibration", "task")
        return (
            all(getattr(self, name) == getattr(other, name) for name in plain)
            and _as_set(self.kept_edges) == _as_set(other.kept_edges)
            and _equal(self.means, other.means)
            and _equal({"": self.token_mean}, {"": other.token_mean})
        )

    __hash__ = None  # type: ignore[assignment]  # its fields may change

    def load_task(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seed: int = 0,
        max_length: int | None = None,
    ) -> BinaryTask:
        """The task it was found for, with the prompts that it was found and checked with.

        A built-in task is generated anew, one of one's own is stored beside the circuit.

        Args:
            tokenizer: the model's.
            seed: of a built-in task, where the circuit does not name its own.
            max_length: the longest prompt that the model can take, in tokens.

        Raises:
            ValueError: the task is neither, or the tokenizer cannot express it.
        """
        if self.own_task is not None:
            return BinaryTask.from_text(self.own_task, tokenizer, max_length=max_length)
        if self.task not in list_tasks():
            raise ValueError(
                f"The circuit is for {self.task!r:.80}, which is neither a built-in task nor "
                "stored beside it; pass the one it was found with as task=."
            )
        stored = self.config.get("seed")
        seed = stored if type(stored) is int else seed
        return load_task(self.task, tokenizer, seed=seed, max_length=max_length)

    @classmethod
    def from_openai(
        cls,
        file: str | os.PathLike,
        model: nn.Module,
        reference: ReferenceTokens,
        *,
        task: str = "",
        tokens: int = 65536,
    ) -> "Circuit":
        """Read one of OpenAI's released circuits, its `viz_data.pt`; nothing in it is executed.

        The file has the kept nodes, but neither means, which are measured, nor the scale and shift
        of the logits. Of the stream before the unembedding everything stays.

        Args:
            file: the path of `viz_data.pt`.
            model: the released model that the circuit is of, from [`from_openai`].
            reference: sample of the pretraining distribution; see [`find_circuit`].
            task: name of the task, as the folder of the file has it.
            tokens: of the reference to measure, at most.

        Raises:
            FileNotFoundError: there is no such file.
            ArtifactError: (a `ValueError`) the file is damaged, or does not fit the model.
        """
        if not Path(file).is_file():
            raise FileNotFoundError(f"{file} was not found; pass the path of a viz_data.pt.")
        inner = unwrapped(model)
        widths = {site: node.width for site, node in node_sites(inner).items()}
        nodes = read_openai_masks(file, widths)
        model_name, model_revision = model_source(inner)
        return cls(
            nodes=nodes,
            means=mean_activations(inner, reference_input_ids(inner, None, reference, tokens)),
            task=task or "openai",
            model_fingerprint=model_fingerprint(inner),
            model_name=model_name,
            model_revision=model_revision,
        )

    def to_dict(self) -> dict[str, Any]:
        """The content of `circuit.json`: plain values, without the tensors."""
        fields = {name: getattr(self, name) for name in _STORED}
        fields["own_task"] = self.own_task is not None
        shift = {str(token): value for token, value in self.calibration.shift.items()}
        fields["calibration"] = {"scale": self.calibration.scale, "shift": shift}
        if self.kept_edges is not None:
            fields["kept_edges"] = [list(edge) for edge in self.kept_edges]
        fields["edge_offsets"] = {
            site: {str(index): value for index, value in sums.items()}
            for site, sums in self.edge_offsets.items()
        }
        return fields

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """Write `circuit.json` and `circuit.safetensors` into a folder, each moved into place.

        The task goes beside them as `task.json`, if it is one's own.

        Raises:
            ArtifactError: (a `ValueError`) a field that could not be read back, as a number that is
                not finite; nothing is written.
        """
        tensors = {f"means.{site}": mean.contiguous() for site, mean in self.means.items()}
        tensors |= {f"scores.{site}": s.contiguous() for site, s in self.scores.items()}
        if self.token_mean is not None:
            tensors["token.mean"] = self.token_mean.contiguous()
        write_circuit(save_directory, self.to_dict(), tensors, self.own_task)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        subfolder: str = "",
        base_model: str | None = None,
        base_model_revision: str | None = None,
        picture: str | os.PathLike | None = None,
        private: bool = True,
        revision: str | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> CommitInfo:
        """Upload the circuit to the Hub, into a repository that is made if it is not there.

        Args:
            repo_id: `user/name`.
            subfolder: folder in the repository; with it, one repository holds several circuits.
            base_model: Hub id of the model it was cut out of. Not needed if the model was loaded
                from the Hub before the circuit was found.
            base_model_revision: branch, tag or commit hash of that model; the commit hash is
                recorded. Default: the commit it was loaded at, else the newest.
            picture: PNG of the circuit, as [`plot_circuit`] draws it; uploaded beside it.
            private: whether a new repository is private.
            revision: branch to write to.
            token: access token; the saved one if not given.
            commit_message: of the one commit made.
            create_pr: open a pull request with the commit instead of writing to the branch.

        Raises:
            HfHubHTTPError: (an `OSError`) nobody is signed in, there is no right to write, or the
                base model is not there.
            ValueError: another task's circuit lies there, or there is no such picture.
        """
        if picture is not None and not Path(picture).is_file():
            raise ValueError(
                f"picture={os.fspath(picture)!r} was passed, but there is no such file."
            )
        if {"..", "/"} & set(PurePosixPath(subfolder).parts):
            raise ValueError(
                f"subfolder={subfolder!r} was passed, but it must be a folder in the repository."
            )
        name, commit = model_on_hub(self.to_dict(), base_model, base_model_revision, token)
        circuit = replace(self, model_name=name, model_revision=commit)
        with tempfile.TemporaryDirectory() as folder:
            circuit.save_pretrained(folder)
            if picture is not None:
                shutil.copyfile(picture, Path(folder) / PICTURE_NAME)
            return upload_circuit(
                Path(folder), circuit.to_dict(), repo_id, subfolder,
                private=private, revision=revision, token=token, create_pr=create_pr,
                commit_message=commit_message or f"Upload the circuit for {self.task}",
            )  # fmt: skip

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        subfolder: str = "",
        token: str | bool | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
    ) -> "Circuit":
        """Read a circuit from a folder, or from a repository on the Hub.

        Args:
            name_or_path: folder that [`Circuit.save_pretrained`] wrote, or `user/name`.
            revision: branch, tag or commit hash on the Hub.
            subfolder: folder in there (see `list_circuits`).
            token: access token; the saved one if not given, none if False.
            cache_dir: where downloads are kept; the usual cache if not given.
            local_files_only: take from the cache what is there and ask nobody.

        Raises:
            FileNotFoundError: one of its two files is missing; names the folders that hold a
                circuit, if it is a repository.
            HfHubHTTPError: (an `OSError`) the repository or the revision is not there.
            ArtifactError: (a `ValueError`) a file is damaged or does not hold a circuit; names the
                file and the field.
        """
        directory: Path = Path(name_or_path) / subfolder
        from_hub = is_hub_id(name_or_path)
        if from_hub:
            directory = download_circuit(
                os.fspath(name_or_path), subfolder=subfolder, revision=revision, token=token,
                cache_dir=cache_dir, local_files_only=local_files_only,
            )  # fmt: skip
        content, tensors = read_circuit(directory, from_hub=from_hub)
        shift = content["calibration"]["shift"]
        calibration = Calibration(
            float(content["calibration"]["scale"]), {int(t): float(v) for t, v in shift.items()}
        )
        fields = {name: content[name] for name in _STORED if name in content}
        if fields.get("kept_edges") is not None:
            fields["kept_edges"] = [tuple(edge) for edge in fields["kept_edges"]]
        own_task = read_own_task(directory, content)
        fields["edge_offsets"] = {
            site: {int(index): float(value) for index, value in sums.items()}
            for site, sums in content.get("edge_offsets", {}).items()
        }
        try:
            return cls(
                own_task=own_task,
                calibration=calibration,
                means=tensors["means"],
                scores=tensors["scores"],
                token_mean=tensors["token"].get("mean"),
                **fields,
            )
        except ValueError as error:
            raise ArtifactError(
                Path(directory) / JSON_NAME, f" does not hold a circuit: {error}"
            ) from error


def _as_set(edges: Sequence[tuple] | None) -> set[tuple] | None:
    return None if edges is None else set(edges)


def _equal(
    first: Mapping[str, torch.Tensor | None], second: Mapping[str, torch.Tensor | None]
) -> bool:
    return first.keys() == second.keys() and all(
        a is b or (a is not None and b is not None and torch.equal(a, b))
        for a, b in ((first[name], second[name]) for name in first)
    )


# The fields that are stored in circuit.json as they are.
_STORED = (
    "task", "model_name", "model_revision", "model_fingerprint", "nodes", "metrics", "config",
    "example", "kept_edges", "tokens", "verification", "names", "notes",
)  # fmt: skip
