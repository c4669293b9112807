"""Tables on the device, and the CUDA graphs that read them."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from dinov2_kernels import _tables
from dinov2_kernels._tables import table_cache


@pytest.fixture
def table():
    @table_cache(maxsize=1)
    def numbers(n: int, scale: float = 1.0) -> Tensor:
        """The first n numbers."""
        return scale * torch.arange(n)

    return numbers


def capture(monkeypatch: pytest.MonkeyPatch, is_capturing: bool) -> None:
    monkeypatch.setattr(_tables, "is_capturing", lambda: is_capturing)


def is_alive(reference: weakref.ref) -> bool:
    gc.collect()
    return reference() is not None


def test_a_table_is_made_once(table) -> None:
    assert table(3) is table(3)
    assert table(3, scale=2.0).tolist() == [0, 2, 4]
    assert table.__name__ == "numbers"
    assert table.__doc__ == "The first n numbers."
    assert not _tables.is_capturing()


def test_a_table_that_a_graph_reads_stays(table, monkeypatch: pytest.MonkeyPatch) -> None:
    read, other = weakref.ref(table(3)), weakref.ref(table(4))  # the second one takes the place of the first
    assert not is_alive(read)
    read = weakref.ref(table(3))
    assert not is_alive(other)
    capture(monkeypatch, True)
    table(3)
    capture(monkeypatch, False)
    table(4)
    assert is_alive(read)


def test_a_graph_cannot_make_a_table(table, monkeypatch: pytest.MonkeyPatch) -> None:
    capture(monkeypatch, True)
    with pytest.raises(RuntimeError, match=r"is being captured.*make the same call once before the capture"):
        table(3)
    capture(monkeypatch, False)
    assert table(3).tolist() == [0, 1, 2]
