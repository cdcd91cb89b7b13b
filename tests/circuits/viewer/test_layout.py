"""Where boxes and lines stand, in the picture and on the page."""

from itertools import pairwise

import pytest

from hf_circuit_sparsity.circuits.viewer.layout import layered_graph


@pytest.fixture(scope="module")
def graph(crowded):
    model, circuit = crowded
    return layered_graph(circuit, model)


def test_no_two_boxes_share_a_place(graph):
    places = [(node.column, graph.rows[key]) for key, node in graph.nodes.items()]
    assert len(set(places)) == len(places) > 60
    columns = {}
    for column, row in places:
        columns.setdefault(column, []).append(row)
    for rows in columns.values():
        rows.sort()
        assert all(b - a > 0.99 for a, b in pairwise(rows))


def test_lines_pass_between_boxes_and_below_titles_of_heads(graph):
    boxes = {}
    for key, node in graph.nodes.items():
        boxes.setdefault(node.column, []).append((graph.rows[key], node.head))
    passed = 0
    for link in graph.links:
        first = graph.nodes[link.source].column
        assert len(link.via) == graph.nodes[link.target].column - first - 1
        for column, row in enumerate(link.via, first + 1):
            passed += len(boxes[column])
            assert all(abs(row - box) > 0.35 for box, _ in boxes[column])
            for head in {head for _, head in boxes[column] if head is not None}:
                top = max(box for box, other in boxes[column] if other == head)
                assert not top < row < top + 1
    assert passed > 500
