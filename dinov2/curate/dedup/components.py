"""Connected components of a graph whose edges come bit by bit."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from dinov2.curate.dedup import components_reference
from dinov2.curate.dedup.components_reference import Labels

try:
    from dinov2_kernels._host import join_components as _join
    from dinov2_kernels._host import label_components as _label
except ImportError:  # installed without a compiler
    _join = components_reference.join_components
    _label = components_reference.label_components


class Components:
    """Disjoint sets of nodes, 4 bytes a node below 2^32 of them and 8 from there on; edges are not kept.

    Native code where the package was built with it; else :mod:`dinov2.curate.dedup.components_reference`, with the same
    result.

    Args:
        nodes: how many there are.
    """

    def __init__(self, nodes: int) -> None:
        self._parent: Labels = np.arange(nodes, dtype=np.uint32) if nodes < 2**32 else np.arange(nodes, dtype=np.int64)

    def join(self, first: npt.NDArray[np.int64], second: npt.NDArray[np.int64]) -> None:
        """Put the nodes ``first`` [E] and ``second`` [E] of each edge in one component.

        Raises:
            IndexError: there is no such node.
        """
        _join(self._parent, first, second)

    def labels(self) -> Labels:
        """The lowest node of each node's component [N]; shares memory with this object."""
        _label(self._parent)
        return self._parent
