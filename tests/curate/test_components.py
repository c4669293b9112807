"""Connected components: native code and its definition against scipy."""

from __future__ import annotations

from types import ModuleType

import numpy as np
import numpy.typing as npt
import pytest
import scipy.sparse
import scipy.sparse.csgraph

from dinov2.curate import components
from dinov2.curate.components import Components
from dinov2_kernels import _host

Nodes = npt.NDArray[np.int64]


def expected_labels(nodes: int, first: Nodes, second: Nodes) -> Nodes:
    """The lowest node of each node's component, by scipy."""
    graph = scipy.sparse.coo_array((np.ones(len(first)), (first, second)), (nodes, nodes))
    count, labels = scipy.sparse.csgraph.connected_components(graph, directed=False)
    lowest = np.full(count, nodes)
    np.minimum.at(lowest, labels, np.arange(nodes))
    found: Nodes = lowest[labels]
    return found


@pytest.fixture(params=[_host, components], ids=["native", "reference"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module: ModuleType = request.param
    monkeypatch.setattr(components, "_join", module.join_components)
    monkeypatch.setattr(components, "_label", module.label_components)
    return module


def labels(nodes: int, first: Nodes, second: Nodes, portions: int = 1) -> list[int]:
    sets = Components(nodes)
    for a, b in zip(np.array_split(first, portions), np.array_split(second, portions), strict=True):
        sets.join(a, b)
    found: list[int] = sets.labels().tolist()
    return found


@pytest.mark.parametrize("seed", range(20))
def test_random_graphs(implementation: ModuleType, seed: int) -> None:
    random = np.random.default_rng(seed)
    nodes = int(random.integers(1, 3000))
    edges = int(nodes * random.choice([0, 0.1, 0.5, 1, 4]))
    first, second = random.integers(nodes, size=(2, edges))  # self loops and double edges among them
    assert (
        labels(nodes, first, second, portions=int(random.integers(1, 5)))
        == expected_labels(nodes, first, second).tolist()
    )


def test_shapes_of_graphs(implementation: ModuleType) -> None:
    steps = np.arange(999)
    assert labels(1000, steps, steps + 1) == [0] * 1000  # a chain, and backwards, and in disorder
    assert labels(1000, steps[::-1] + 1, steps[::-1]) == [0] * 1000
    order = np.random.default_rng(0).permutation(999)
    assert labels(1000, order, order + 1, portions=7) == [0] * 1000
    assert labels(1000, np.full(999, 999), steps) == [0] * 1000  # a star
    assert labels(3, np.array([1, 1]), np.array([1, 1])) == [0, 1, 2]  # self loops
    assert labels(1, np.array([0]), np.array([0])) == [0]
    nothing = np.zeros(0, np.int64)
    assert labels(1, nothing, nothing) == [0]
    assert labels(0, nothing, nothing) == []


def test_eight_bytes_a_node(implementation: ModuleType) -> None:
    parent = np.arange(6)  # int64
    implementation.join_components(parent, np.array([5, 2]), np.array([2, 4]))
    implementation.label_components(parent)
    assert parent.tolist() == [0, 1, 2, 3, 2, 2]


@pytest.mark.parametrize("node", [-1, 4])
def test_nodes_that_do_not_exist(implementation: ModuleType, node: int) -> None:
    with pytest.raises(IndexError, match="nodes of edges must lie in"):
        Components(4).join(np.array([0, 1]), np.array([1, node]))


def test_native_code_is_used() -> None:
    assert components._join is _host.join_components
    assert components._label is _host.label_components
