"""The picture of a circuit, measured as it is drawn."""

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch

from hf_circuit_sparsity.circuits.viewer.layout import layered_graph
from hf_circuit_sparsity.circuits.viewer.plot import SITE_COLOURS, _draw
from tests.circuits.planted import word_tokenizer


def drawn(model, circuit, width):
    """Figure, boxes with their frames, weights, and lines as points in pixels."""
    figure = _draw(Figure, circuit, layered_graph(circuit, model), word_tokenizer(), width)
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw_without_rendering()
    (axes,) = figure.axes
    framed = [text for text in axes.texts if text.get_bbox_patch() is not None]
    weights = [text for text in framed if text.get_gid() == "weight"]
    titles = [text for text in framed if text.get_text().startswith("head ")]
    boxes = [text for text in framed if text not in weights and text not in titles]
    extent = {
        name: [text.get_bbox_patch().get_window_extent(renderer) for text in texts]
        for name, texts in (("boxes", boxes), ("weights", weights), ("titles", titles))
    }
    lines = [
        axes.transData.transform_path(patch.get_path()).interpolated(1).cleaned(curves=False)
        for patch in axes.patches
        if type(patch) is PathPatch
    ]
    return figure, extent, [line.vertices[:-1] for line in lines]


@pytest.mark.parametrize("width", [3.25, 6.75])
@pytest.mark.parametrize("which", ["planted", "crowded"])
def test_no_line_is_under_a_box_and_no_label_on_anything(request, which, width):
    model, *_, circuit = request.getfixturevalue(which)
    _, extent, lines = drawn(model, circuit, width)
    assert len(lines) > 10 and len(extent["boxes"]) >= len(circuit)
    points = np.concatenate(lines)
    for box in extent["boxes"]:
        low, high = box.padded(-1).get_points()
        assert not ((points > low) & (points < high)).all(1).any()
    weights = extent["weights"]
    assert (len(weights) > 4) == (which == "planted" and width > 5)
    for place, weight in enumerate(weights):
        for other in [*extent["boxes"], *extent["titles"], *weights[:place]]:
            assert not weight.padded(-0.5).overlaps(other)


def test_box_colours_and_headings_are_explained(planted):
    model, _, _, circuit = planted
    figure, _, _ = drawn(model, circuit, 6.75)
    legend = {text.get_text(): text.get_bbox_patch() for text in figure.texts}
    for word, kind in (("neuron", "post_act"), ("value", "v"), ("channel read", "act_in")):
        assert legend[word].get_facecolor()[:3] == pytest.approx(
            tuple(int(SITE_COLOURS[kind][i : i + 2], 16) / 255 for i in (1, 3, 5))
        )
    assert "query" not in legend  # there is none
    headings = {text.get_text() for text in figure.axes[0].texts}
    assert "layer 1\nMLP\nneurons" in headings and "layer 0\nattention\nreads" in headings
    assert "7 nodes, 5 edges" in figure.texts[0].get_text()
