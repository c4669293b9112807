"""Tables on the device: small tensors that depend on shapes alone, made once and kept for the next call."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, update_wrapper
from typing import Any, Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
Table = TypeVar("Table")


class TableCache(Generic[P, Table]):
    """``functools.lru_cache`` for a function that returns tensors on a device, safe with CUDA graphs.

    A captured graph reads memory but keeps no tensor alive. So a table that is looked up during a capture is kept
    forever. A new table cannot be made during a capture: its memory would belong to the graph, and it would have no
    values before the first replay.
    """

    def __init__(self, make: Callable[P, Table], maxsize: int) -> None:
        self._make = make
        self._cached = lru_cache(maxsize)(self._make_outside_captures)
        self._in_graphs: dict[Any, Table] = {}
        self.cache_info, self.cache_clear = self._cached.cache_info, self._cached.cache_clear
        update_wrapper(self, make)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Table:
        """The table for these arguments; a new one under FakeTensorMode and under the transforms of ``torch.func``.

        Their tensors are not plain ones, and must not be cached.

        Raises:
            RuntimeError: the table does not exist yet, and a CUDA graph is being captured.
        """
        if is_faking() or torch._C._are_functorch_transforms_active():
            return self._make(*args, **kwargs)
        table: Table = self._cached(*args, **kwargs)  # type: ignore[arg-type]
        if is_capturing():
            self._in_graphs[args, tuple(kwargs.items())] = table
        return table

    def _make_outside_captures(self, *args: P.args, **kwargs: P.kwargs) -> Table:
        if is_capturing():
            raise RuntimeError(
                "a CUDA graph is being captured, and this call needs a table on the device that does not exist yet:"
                " make the same call once before the capture"
            )
        return self._make(*args, **kwargs)


def table_cache(maxsize: int) -> Callable[[Callable[P, Table]], TableCache[P, Table]]:
    """Decorator that makes a :class:`TableCache` of a function, for its last ``maxsize`` tables."""
    return lambda make: TableCache(make, maxsize)


def is_faking() -> bool:
    """Whether operators make fake tensors now. It takes 0.1 us; ``torch._guards.detect_fake_mode`` takes several us."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def is_capturing() -> bool:
    """Whether a CUDA graph is capturing the current stream."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
