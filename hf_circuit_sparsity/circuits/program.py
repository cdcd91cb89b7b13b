"""A circuit as a program of a few dozen lines, which needs numpy and nothing of the model.

What the circuit reads of fixed nodes is a constant, so only its own nodes and weights are left; and
of every site with AbsTopK the other channels that vary, since a node passes only if it is among the
largest there. The arrays that are no part of the reading (embeddings, those rivals) lie beside.
"""

import hashlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from inspect import getsource, isfunction
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ..decoders.circuitgpt import CircuitGPTDecoder
from ..decoders.decoder import decoder_of
from ..files import replacing
from . import program_functions
from .ablation import unwrapped
from .edges import site_weights, unembedding_edges
from .running import Running

Arrays = dict[str, np.ndarray]
# Answers that are named in a comment.
_FEW = 4

Term = tuple[float, str, str]
"""Weight, expression, what it is."""

_LOADING = """\
import hashlib
import io
import math
import sys
from pathlib import Path

import numpy as np

arrays = Path(__file__).with_suffix(".npz").read_bytes()
if hashlib.sha256(arrays).hexdigest() != {digest}:
    raise SystemExit(f"{Path(__file__).with_suffix('.npz')} does not belong to this program.")
DATA = {name: np.asarray(a, float) for name, a in np.load(io.BytesIO(arrays)).items()}

"""


def write_program(
    circuit: Running,
    path: str | os.PathLike,
    model: nn.Module,
    answers: Mapping[int, str],
) -> Path:
    """Write `path` and, beside it, its arrays in a file of the same name that ends in `.npz`.

    Args:
        circuit: a [`Circuit`] of `model`.
        path: of the program, ending in `.py`.
        model: a CircuitGPT.
        answers: token id → text of the tokens that are compared.

    Raises:
        ValueError: the circuit was made for another model, that is no CircuitGPT, or `path` does
            not end in `.py`.
    """
    path = Path(path)
    if path.suffix != ".py":
        raise ValueError(f"path={str(path)!r} was passed, but a program's name ends in .py.")
    circuit.check_model(model)
    model = unwrapped(model)
    if not isinstance(decoder_of(model), CircuitGPTDecoder):
        raise ValueError(
            f"A {type(model).__name__} was passed, but only circuits of a CircuitGPT can be "
            "written as programs so far; use circuit.apply to run this one."
        )
    program = _Program(circuit, model, answers)
    with torch.no_grad():
        code = program.code()
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **program.arrays)
    loading = _LOADING.replace("{digest}", repr(hashlib.sha256(buffer.getvalue()).hexdigest()))
    # The program knows its arrays by their hash: of an interrupted pair it says so.
    with replacing(path.with_suffix(".npz")) as temporary:
        temporary.write_bytes(buffer.getvalue())
    with replacing(path) as temporary:
        temporary.write_text(f"{program.head(path.name)}\n{loading}{code}", encoding="utf-8")
    return path


class _Program:
    """Writes the lines and collects the arrays."""

    def __init__(self, circuit: Running, model: nn.Module, answers: Mapping[int, str]) -> None:
        self.circuit, self.model, self.answers = circuit, model, dict(answers)
        self.config, self.body = model.config, model.transformer
        self.sites = model.node_sites()
        self.means = {site: mean.double() for site, mean in circuit.means.items()}
        self.arrays: Arrays = {}
        # `(nodes, inputs)`, without what was cut.
        self.matrices = {
            matrix.target.site: matrix.weight.detach().double().cpu().clone()
            for matrix in site_weights(model)
        }
        for edge in circuit.split_edges(model)[1]:
            self.matrices[edge.target_site][edge.target, edge.column] = 0.0
        self.biases = self._biases()

    def _biases(self) -> dict[str, torch.Tensor]:
        """Site → `(width,)`, with what cut edges add on average."""
        biases = {}
        for projection in decoder_of(self.model).projections():
            bias = projection.module.bias
            for target in projection.targets:
                width = self.sites[target.site].width
                own = torch.zeros(width) if bias is None else bias.detach().cpu()
                own = own if bias is None or target.rows is None else own[target.rows]
                own = own.double().clone()
                for i, value in self.circuit.edge_offsets.get(target.site, {}).items():
                    own[i] += value
                biases[target.site] = own
        return biases

    def open(self, site: str) -> list[int]:
        return list(self.circuit.nodes.get(site, ()))

    def k(self, site: str) -> int | None:
        """How many pass the site; `None` where all do."""
        k = self.sites[site].k
        return None if k is None or k >= self.sites[site].width else k

    def code(self) -> str:
        """The functions, then the layers, then what calls them; fills `arrays`."""
        parts: list[str] = []
        body: list[str] = []
        for i, block in enumerate(self.body.h):
            for part, lines in (("attn", self._attention), ("mlp", self._mlp)):
                after = self._after(block, part)
                site = f"h.{i}.{part}.resid_delta"
                if not self.open(site):
                    self._store(site, self.means[site])
                    body.append(
                        f"    x = {after.format(f'x + DATA[{site!r}]')}  # h.{i}.{part}: all fixed"
                    )
                    continue
                name = f"layer_{i}_{'attention' if part == 'attn' else 'mlp'}"
                body.append(f"    x = {name}(x)")
                parts.append("\n".join([f"def {name}(x):", *lines(i, block, after), "", ""]))
        calling = "\n".join([*parts, *self._ends(body)])
        called = [
            f"{getsource(function)}\n" for name, function in vars(program_functions).items()
            if isfunction(function) and (f"{name}(" in calling or f"act={name}" in calling)
        ]  # fmt: skip
        return "\n".join([*called, calling])

    def head(self, name: str) -> str:
        """What the program says of itself."""
        circuit = self.circuit
        title = f"{circuit.task} in {circuit.model_name or circuit.model_fingerprint}"
        return f'''"""The circuit for {_comment(title)}: {len(circuit)} nodes, \
{circuit.count_edges(self.model)} edges.

    python {_comment(name)} 5 17 301    # token ids of a prompt

says the logit of each answer, which `answers([5, 17, 301])` returns. Rows of every array are
tokens. All that is not in the circuit is fixed at its average, so it is here in the constants only,
and as rivals: a node passes a site with AbsTopK only if it is among the largest of all channels
there. Written by hf-circuit-sparsity.
"""
'''

    def _norm(self, x: str, name: str, norm: nn.Module) -> str:
        """A call of the norm, whose weights are stored."""
        self._store(f"{name}.weight", norm.weight)
        if getattr(norm, "bias", None) is not None:
            self._store(f"{name}.bias", norm.bias)
        function = "rms_norm" if self.config.rms_norm else "layer_norm"
        return f"{function}({x}, DATA, {name!r}, {norm.eps!r})"

    def _store(self, name: str, values: torch.Tensor) -> None:
        self.arrays[name] = values.detach().float().cpu().numpy()

    def _after(self, block: nn.Module, part: str) -> str:
        """What is done with the stream after something was added."""
        text = "{}"
        if self.config.residual_activation_type == "relu":
            text = f"relu({text})"
        k = (block.resid_post_attn if part == "attn" else block.resid_post_mlp).k
        return text if k is None or k >= self.config.d_model else f"keep_largest({text}, {k})"

    def _read(self, i: int, block: nn.Module, part: str) -> Iterator[str]:
        """The nodes that read the stream."""
        site, which = f"h.{i}.{part}.act_in", 1 if part == "attn" else 2
        nodes, width = self.open(site), self.config.d_model
        if not nodes:
            return
        read = self._norm("x", f"h.{i}.ln_{which}", getattr(block, f"ln_{which}"))
        if self.config.d_pos_emb is not None:
            norm = getattr(block, f"ln_p{which}")
            positions = self._norm('DATA["positions"][: len(x)]', f"h.{i}.ln_p{which}", norm)
            read = f"np.concatenate([{read}, {positions}], -1)"
        k = self.k(site)
        yield f"    read = {read if k is None else f'keep_largest({read}, {k})'}"
        for node in nodes:
            of = "" if node < width else f", position {node - width}"
            yield f"    a_{node} = read[:, {node}]  # {self._called(site, node)}{of}"

    def _written(
        self, site: str, letter: str, inputs: Sequence[tuple[torch.Tensor, str, str]],
        constant: torch.Tensor, act: str | None = None,
    ) -> Iterator[str]:  # fmt: skip
        """The nodes that a matrix writes.

        Args:
            site: of the nodes.
            letter: begins their names.
            inputs: of each input that varies: its weights `(width,)`, its name and what it is.
            constant: `(width,)`, the rest.
            act: the nonlinearity between.
        """
        nodes, k = self.open(site), self.k(site)
        if k is not None and nodes:
            weights = torch.stack([w for w, _, _ in inputs], 1) if inputs else None
            varies = torch.zeros(len(constant), dtype=torch.bool)
            if weights is not None:
                varies = (weights != 0).any(1)
            fixed = constant[~varies]
            if act is not None:
                fixed = F.gelu(fixed) if act == "gelu" else F.relu(fixed)
            # A node that does not vary is compared with the others, not with itself.
            rows = varies.clone()
            rows[nodes] = True
            fixed = fixed[~rows[~varies]]
            used = weights[rows] if weights is not None else torch.zeros(int(rows.sum()), 1)
            self._store(f"{site}.rows", rows.nonzero()[:, 0])
            self._store(f"{site}.weights", used)
            self._store(f"{site}.constant", constant[rows])
            self._store(f"{site}.fixed", fixed.abs().sort().values)
            names = ", ".join(name for _, name, _ in inputs) or "np.zeros(len(x))"
            ending = f", act={act}" if act else ""
            yield f"    others = rivals(DATA, {site!r}, {names}{ending})"
        for node in nodes:
            terms = [(w[node].item(), name, what) for w, name, what in inputs]
            called, value = self._called(site, node), f"{letter}_{node}"
            yield from _sum(value, constant[node].item(), terms, act or "", called)
            if k is not None:
                yield f"    {value} = among({k}, {node}, {value}, others)"

    def _attention(self, i: int, block: nn.Module, after: str) -> Iterator[str]:
        part = f"h.{i}.attn"
        yield from self._read(i, block, "attn")
        source = f"{part}.act_in"
        for name in ("q", "k", "v"):
            site = f"{part}.{name}"
            yield from self._written(site, name, *self._inputs(site, source, "a"))
        heads, width = self.config.n_head, self.config.d_head
        sinks = block.attn.attn_imp.sink_logit if block.attn.attn_imp is not None else None
        site, values = f"{part}.resid_delta", f"{part}.v"
        weight, mean = self.matrices[site], self.means[values].clone()
        mean[self.open(values)] = 0.0
        constant, inputs = self.biases[site].clone(), []
        for head in range(heads):
            channels = range(head * width, (head + 1) * width)
            opened = [c for c in self.open(values) if c in channels]
            fixed = weight[:, channels] @ mean[list(channels)]
            if sinks is None:
                constant += fixed
            summed = sinks is not None and bool(fixed.any())
            if not (opened or summed):
                continue
            yield from self._pattern(part, head, list(channels), sinks)
            for c in opened:
                yield f"    heard_{c} = pattern @ v_{c}"
                inputs.append((weight[:, c], f"heard_{c}", f"{values}.{c}, attended"))
            if summed:
                yield f"    total_{head} = pattern.sum(-1)"
                inputs.append((fixed, f"total_{head}", f"what is fixed in head {head}"))
        yield from self._written(site, "w", inputs, constant)
        yield from self._added(site, after)

    def _pattern(
        self, part: str, head: int, channels: list[int], sinks: torch.Tensor | None
    ) -> Iterator[str]:
        """Where a head looks."""
        queries, keys = (set(self.open(f"{part}.{n}")) & set(channels) for n in "qk")
        mean_q, mean_k = self.means[f"{part}.q"], self.means[f"{part}.k"]
        constant, terms = 0.0, []
        for c in channels:
            q, k = mean_q[c].item(), mean_k[c].item()
            if c in queries and c in keys:
                terms.append((1.0, f"q_{c}[:, None] * k_{c}", f"query and key {c}"))
            elif c in queries:
                terms.append((k, f"q_{c}[:, None]", f"query {c} on the mean key"))
            elif c in keys:
                terms.append((q, f"k_{c}[None, :]", f"key {c} for the mean query"))
            else:
                constant += q * k
        yield f"    # Head {head}."
        square = "np.zeros((len(x), len(x)))"
        yield from _sum("scores", constant, [*terms, (1.0, square, "of every pair")])
        sink = "" if sinks is None else f", sink={_number(sinks[head].item())}"
        yield f"    pattern = attend({_number(self.config.d_head**-0.5)} * scores{sink})"

    def _mlp(self, i: int, block: nn.Module, after: str) -> Iterator[str]:
        part, act = f"h.{i}.mlp", self.config.activation_type
        yield from self._read(i, block, "mlp")
        site = f"{part}.post_act"
        yield from self._written(site, "n", *self._inputs(site, f"{part}.act_in", "a"), act)
        site = f"{part}.resid_delta"
        yield from self._written(site, "w", *self._inputs(site, f"{part}.post_act", "n"))
        yield from self._added(site, after)

    def _inputs(
        self, site: str, source: str, letter: str
    ) -> tuple[list[tuple[torch.Tensor, str, str]], torch.Tensor]:
        weight, mean, nodes = self.matrices[site], self.means[source].clone(), self.open(source)
        mean[nodes] = 0.0
        inputs = [(weight[:, n], f"{letter}_{n}", f"{source}.{n}") for n in nodes]
        return inputs, self.biases[site] + weight @ mean

    def _added(self, site: str, after: str) -> Iterator[str]:
        self._store(site, self.means[site])
        yield f"    delta = np.tile(DATA[{site!r}], (len(x), 1))"
        for node in self.open(site):
            yield f"    delta[:, {node}] = w_{node}"
        yield f"    return {after.format('x + delta')}"

    def _ends(self, body: Sequence[str]) -> list[str]:
        """The embedding, the unembedding and the command line."""
        model, tokens = self.model, sorted(self.answers)
        table = self.body.wte.weight.detach().clone()
        if self.circuit.tokens is not None:
            table[:] = self.circuit.token_mean.to(table)
            table[self.circuit.tokens] = self.body.wte.weight[self.circuit.tokens]
        self._store("embedding", table)
        self._store("unembedding", model.lm_head.weight[tokens])
        self._store("bias", model.final_logits_bias[tokens])
        start = '    x = DATA["embedding"][tokens]'
        if self.body.wpe is not None:
            self._store("positions", self.body.wpe.weight)
            if self.config.d_pos_emb is None:
                start += ' + DATA["positions"][: len(tokens)]'
        last = self._norm("x[-1]", "ln_f", self.body.ln_f)
        logits = f'    logits = DATA["unembedding"] @ {last} + DATA["bias"]'
        if model.bigram_table is not None:
            self._store("bigrams", model.bigram_table[:, tokens])
            logits += ' + DATA["bigrams"][tokens[-1]]'
        calibration = self.circuit.calibration
        shift = [calibration.shift.get(token, 0.0) for token in tokens]
        names = [f"    {token}: {text!r}," for token, text in sorted(self.answers.items())]
        most, passed = self.config.block_size, "{len(tokens)} tokens were passed"
        return [
            "ANSWERS = {", *names, "}", "", "",
            "def answers(tokens):",
            '    """Token id → logit after these tokens, calibrated as the circuit is."""',
            f"    if not 0 < len(tokens) <= {most}:",
            f'        raise ValueError(f"{passed}, expected 1 to {most}.")',
            start, *body, *self._unembedded(tokens), logits,
            f"    logits = {_number(calibration.scale)} * logits + np.array({_numbers(shift)})",
            "    return dict(zip(ANSWERS, logits.tolist()))",
            "", "",
            'if __name__ == "__main__":',
            "    for token, logit in answers([int(token) for token in sys.argv[1:]]).items():",
            '        print(f"{logit:8.3f}  {ANSWERS[token]!r}")',
            "",
        ]  # fmt: skip

    def _unembedded(self, tokens: Sequence[int]) -> Iterator[str]:
        """In words, what the answers read of the channels that the circuit writes."""
        edges = unembedding_edges(self.model, self.circuit.nodes, tokens)
        for channel, found in groupby(edges, key=lambda edge: edge[0]):
            read = [f"{_number(weight)} for {self.answers[t]!r}" for _, t, weight in found]
            more = f" and {len(read) - _FEW} more" if len(read) > _FEW else ""
            yield f"    # Channel {channel}, unembedded: {', '.join(read[:_FEW])}{more}."

    def _called(self, site: str, node: int) -> str:
        name = f"{site}.{node}"
        given = self.circuit.names.get(name)
        return f"{name} ({_comment(given)})" if given else name


def _sum(
    name: str, constant: float, terms: Sequence[Term], act: str = "", called: str = ""
) -> Iterator[str]:
    """Lines that add up what a node reads, one per edge."""
    terms = [term for term in terms if term[0] != 0]
    terms = terms or [(1.0, "np.zeros(len(x))", "at every token")]
    comment = f"  # {called}" if called else ""
    yield f"    {name} = {act}({comment}"
    yield f"        {_number(constant)}  # what is fixed"
    for weight, expression, what in terms:
        sign = "-" if weight < 0 else "+"
        times = "" if weight == 1 else f"{_number(abs(weight))} * "
        yield f"        {sign} {times}{expression}  # {what}"
    yield "    )"


def _number(value: float) -> str:
    return str(np.float32(value))


def _numbers(values: Sequence[float]) -> str:
    return "[" + ", ".join(map(_number, values)) + "]"


def _comment(text: str) -> str:
    """Somebody's words within a line of a comment or a docstring."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line.replace("\\", "/").replace('"', "'")
