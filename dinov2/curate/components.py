"""Connected components in NumPy: the definition of what ``dinov2_kernels._host`` does in native code, and its stand-in.

Each node has a parent of lower number or itself; the root of a component is its lowest node.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.uint32] | npt.NDArray[np.int64]


def join_components(parent: Labels, first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]) -> None:
    """Join nodes ``first`` [E] with nodes ``second`` [E], in place in ``parent`` [N].

    The higher root of every edge is hung below the lowest of those it has edges to, until edges have one root.
    """
    for nodes in (first, second):
        if nodes.size and not (nodes.min() >= 0 and nodes.max() < len(parent)):
            raise IndexError("nodes of edges must lie in [0, number of nodes)")
    while len(first):
        first, second = _roots(parent, first), _roots(parent, second)
        open_edges = first != second
        first, second = first[open_edges], second[open_edges]
        np.minimum.at(parent, np.maximum(first, second), np.minimum(first, second).astype(parent.dtype))


def label_components(parent: Labels) -> None:
    """Make ``parent`` [N], in place, the lowest node of each node's component."""
    parent[:] = _roots(parent, np.arange(len(parent)))


def _roots(parent: Labels, nodes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The root of each of some nodes [E]."""
    while True:
        above = parent[nodes].astype(np.int64)
        if np.array_equal(above, nodes):
            return nodes
        nodes = above
