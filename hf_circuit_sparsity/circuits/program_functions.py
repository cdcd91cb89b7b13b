"""What a circuit's program is made of; `program.py` copies the functions into it as they stand."""

import math

import numpy as np


def rms_norm(x, data, name, epsilon):
    """Of every row: divided by the root of its mean square."""
    size = np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
    return x / size * data[name + ".weight"]


def layer_norm(x, data, name, epsilon):
    """Of every row: centred and divided by its standard deviation."""
    x = x - x.mean(-1, keepdims=True)
    size = np.sqrt((x**2).mean(-1, keepdims=True) + epsilon)
    return x / size * data[name + ".weight"] + data.get(name + ".bias", 0.0)


def keep_largest(x, k):
    """AbsTopK: of every row the k entries of the largest magnitude, the others zero."""
    order = np.argsort(-np.abs(x), axis=-1, kind="stable")[..., :k]
    kept = np.zeros_like(x)
    np.put_along_axis(kept, order, np.take_along_axis(x, order, -1), -1)
    return kept


def rivals(data, site, *inputs, act=lambda x: x):
    """What competes for the places at a site: channels that vary, and magnitudes that do not."""
    varying = data[site + ".constant"] + np.stack(inputs, -1) @ data[site + ".weights"].T
    return data[site + ".rows"], np.abs(act(varying)), data[site + ".fixed"]


def among(k, node, value, others):
    """The value where fewer than k rivals are larger, else 0: the node's part of AbsTopK."""
    rows, varying, fixed = others
    size = np.abs(value)
    larger = (varying[:, rows != node] > size[:, None]).sum(-1)
    larger += len(fixed) - np.searchsorted(fixed, size, side="right")
    return np.where(larger < k, value, 0.0)


def attend(scores, sink=-np.inf):
    """How much each token (row) looks at itself and those before it; a sink takes its share."""
    scores = np.where(np.tri(len(scores), dtype=bool), scores, -np.inf)
    top = np.maximum(scores.max(-1), sink)
    weights = np.exp(scores - top[:, None])
    return weights / (weights.sum(-1) + np.exp(sink - top))[:, None]


def gelu(x):
    """The exact one, by the error function."""
    return 0.5 * x * (1 + np.vectorize(math.erf, otypes=[float])(x / math.sqrt(2)))


def relu(x):
    """What is positive."""
    return np.maximum(x, 0.0)
