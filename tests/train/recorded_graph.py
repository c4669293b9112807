"""A graph of operators, on any device: what a CUDA graph does with launches, it does with operators.

Capturing changes no memory and draws no random number. A replay runs every operator again with the arguments that it
had while it was captured, on the same tensors, and nothing of the Python around them. Like a CUDA graph it keeps no
tensor alive that it reads and did not make; but where that would read freed memory, this one raises.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from dinov2_kernels import _tables


class FreedTensorError(RuntimeError):
    """A tensor that the graph reads is gone."""


@dataclass
class Call:
    """An operator.

    Attributes:
        function, args, kwargs: the operator and its arguments; tensors from outside the capture are weak references.
        results: tensors that it returned, some of which are views of its arguments, or arguments.
        made: those among them that have memory of their own.
    """

    function: Any
    args: Any
    kwargs: Any
    results: list[Tensor]
    made: list[Tensor]

    @property
    def host_arguments(self) -> list[Any]:
        """All arguments that are no tensors, after the operator's name."""
        leaves = tree_iter((self.args, self.kwargs))
        return [str(self.function), *(x for x in leaves if not isinstance(x, Tensor | weakref.ref))]


class Recorder(TorchDispatchMode):
    """Notes every operator.

    Args:
        undo: keep a copy of memory from outside that operators overwrite, for :meth:`restore`.
    """

    def __init__(self, *, undo: bool = False) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._undo = undo
        self._inside: set[int] = set()  # identities of results, all of which the calls keep alive
        self._made: set[int] = set()  # addresses of their storages
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "profiler":  # marks in traces
            return function(*args, **kwargs)
        if self._undo:
            self._keep(function, args, kwargs)
        result = function(*args, **kwargs)
        made = [x.detach() for x in _made((args, kwargs), result)]
        args, kwargs = tree_map(self._weak, (args, kwargs))
        results = [x for x in _tensors(result) if id(x) not in self._given(args, kwargs)]
        self.calls.append(Call(function, args, kwargs, results, made))
        self._made |= {_address(x) for x in made}
        self._inside |= {id(x) for x in results}
        return result

    def restore(self) -> None:
        """Undo what was written."""
        for storage, before in self._before.values():
            storage.copy_(before)

    def _weak(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        is_inside = id(x) in self._inside or _address(x) in self._made
        return (
            x.detach() if is_inside else weakref.ref(x)
        )  # an alias, as operators like squeeze_ change shapes in place

    def _given(self, args: Any, kwargs: Any) -> set[int]:
        """Identities of the tensors from outside among the arguments, as an operator in place returns them."""
        return {id(x()) for x in tree_iter((args, kwargs)) if isinstance(x, weakref.ref)}

    def _keep(self, function: Any, args: Any, kwargs: Any) -> None:
        arguments = function._schema.arguments
        given = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
        for argument in arguments:
            if argument.alias_info is not None and argument.alias_info.is_write and argument.name in given:
                for x in _tensors(given[argument.name]):
                    if _address(x) not in self._made and _address(x) not in self._before:
                        storage = x.untyped_storage()
                        self._before[_address(x)] = (storage, storage.clone())


class RecordedGraph:
    """A :class:`~dinov2.train.graphed_step.Graph`.

    Attributes:
        calls: the captured operators.
        replays: how often they were repeated.
        is_known_to_caches: whether the caches of tables hear of a capture.
    """

    is_known_to_caches = True

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.replays = 0

    def capture(self, function: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        state = torch.get_rng_state()
        known = mock.patch.object(_tables, "is_capturing", return_value=self.is_known_to_caches)
        with known, Recorder(undo=True) as recorder:
            results = function()
        recorder.restore()
        torch.set_rng_state(state)
        self.calls = recorder.calls
        return results

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        for call in self.calls:
            args, kwargs = tree_map(_strong, (call.args, call.kwargs))
            for place, value in zip(call.made, _made((args, kwargs), call.function(*args, **kwargs)), strict=True):
                place.copy_(value)


def _strong(x: Any) -> Any:
    if not isinstance(x, weakref.ref):
        return x.detach() if isinstance(x, Tensor) else x
    tensor = x()
    if tensor is None:
        raise FreedTensorError("a tensor that the graph reads is gone")
    return tensor


def _made(arguments: Any, result: Any) -> list[Tensor]:
    """Tensors in the result of an operator whose memory is not that of an argument."""
    given = {_address(x) for x in _tensors(arguments)}
    return [x for x in _tensors(result) if _address(x) not in given]


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (x for x in tree_iter(tree) if isinstance(x, Tensor))


def _address(x: Tensor) -> int:
    return x.untyped_storage()._cdata
