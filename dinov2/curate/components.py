"""Connected components of a graph whose edges come in pieces.

The functions here define them in NumPy. The parent of a node is a node of lower number or the node itself. The root of
a component is its lowest node. If the package was built with native code, ``dinov2_kernels._host`` does the same.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Labels = npt.NDArray[np.uint32] | npt.NDArray[np.int64]


def join_components(parent: Labels, first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]) -> None:
    """Join nodes ``first`` [E] with nodes ``second`` [E], in place in ``parent`` [N].

    For each edge, the higher root becomes a child of the lowest root that it has an edge to. This repeats until both
    nodes of every edge have one root.
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
    """Replace ``parent`` [N], in place, by the lowest node of each node's component."""
    parent[:] = _roots(parent, np.arange(len(parent)))


def _roots(parent: Labels, nodes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The root of each node of ``nodes`` [E]."""
    while True:
        above = parent[nodes].astype(np.int64)
        if np.array_equal(above, nodes):
            return nodes
        nodes = above


try:
    from dinov2_kernels._host import join_components as _join
    from dinov2_kernels._host import label_components as _label
except ImportError:  # installed without a compiler
    _join = join_components
    _label = label_components


class Components:
    """Disjoint sets of nodes. They take 4 bytes a node below 2^32 nodes, and 8 from there on. Edges are not kept.

    Args:
        nodes: number of nodes.
    """

    def __init__(self, nodes: int) -> None:
        self._parent: Labels = np.arange(nodes, dtype=np.uint32) if nodes < 2**32 else np.arange(nodes, dtype=np.int64)

    def join(self, first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]) -> None:
        """Put the nodes ``first`` [E] and ``second`` [E] of each edge in one component.

        Raises:
            IndexError: an edge names a node that does not exist.
        """
        _join(self._parent, first, second)

    def labels(self) -> Labels:
        """The lowest node of each node's component [N]. The array shares memory with this object."""
        _label(self._parent)
        return self._parent
