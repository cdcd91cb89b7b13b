"""What holds for all circuits."""

import tempfile

import torch
from hypothesis import strategies as st

from hf_circuit_sparsity.circuits.circuit import Circuit
from hf_circuit_sparsity.circuits.task_scores import Calibration
from tests.properties import holds_for

SITES = ("h.0.attn.q", "h.0.mlp.post_act", "h.1.attn.v")
NUMBERS = st.floats(allow_nan=False, allow_infinity=False)
SINGLE = st.floats(allow_nan=False, allow_infinity=False, width=32)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
LINE = TEXT.filter(str.isprintable)
INDEX = st.integers(0, 2**31 - 1)
PLAIN = st.recursive(
    st.none() | st.booleans() | INDEX | NUMBERS | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(LINE, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def circuits(draw):
    widths = {site: draw(st.integers(0, 5)) for site in SITES}
    vectors = {
        site: torch.tensor(draw(st.lists(SINGLE, min_size=w, max_size=w)), dtype=torch.float32)
        for site, w in widths.items()
    }
    nodes = {
        site: draw(st.lists(st.integers(0, w - 1), unique=True)) if w else []
        for site, w in widths.items()
    }
    ends = [(site, i) for site, ids in nodes.items() for i in ids]
    edges = st.none() | st.just([])
    offsets = {}
    if ends:
        end = st.sampled_from(ends)
        edges |= st.lists(st.builds(lambda a, b: (*a, *b), end, end), max_size=4)
        for site, index in draw(st.lists(end, max_size=2)):
            offsets.setdefault(site, {})[index] = draw(NUMBERS)
    tokens = draw(st.none() | st.lists(INDEX, max_size=3))
    return Circuit(
        nodes=nodes,
        means=vectors,
        scores={site: v for site, v in vectors.items() if draw(st.booleans())},
        task="a_task",
        model_fingerprint="0123456789abcdef",
        model_name=draw(LINE),
        calibration=Calibration(draw(NUMBERS), draw(st.dictionaries(st.integers(0, 9), NUMBERS))),
        metrics=draw(st.dictionaries(LINE, NUMBERS, max_size=3)),
        config=draw(st.dictionaries(LINE, PLAIN, max_size=3)),
        example=draw(
            st.fixed_dictionaries(
                {}, optional={"prompt": TEXT, "token_ids": st.lists(INDEX), "target_id": INDEX}
            )
        ),
        kept_edges=draw(edges),
        edge_offsets=offsets,
        tokens=tokens,
        token_mean=None if tokens is None else torch.zeros(2),
        verification=draw(
            st.dictionaries(LINE, st.fixed_dictionaries({"value": NUMBERS}), max_size=2)
        ),
    )


@holds_for(40, circuit=circuits())
def test_what_is_saved_is_what_is_loaded(circuit):
    with tempfile.TemporaryDirectory() as folder:
        circuit.save_pretrained(folder)
        again = Circuit.from_pretrained(folder)
    assert again.to_dict() == circuit.to_dict()
    for own, read in ((circuit.means, again.means), (circuit.scores, again.scores)):
        assert own.keys() == read.keys()
        assert all(torch.equal(own[site], read[site]) for site in own)
    assert (again.token_mean is None) == (circuit.token_mean is None)
    assert again.edge_offsets == circuit.edge_offsets and again.kept_edges == circuit.kept_edges
