"""A stand-in for a GPU that computes nothing: GPU tests and benchmarks run on it, to find errors without a GPU.

Tensors of "cuda" are tensors of PyTorch's meta device: they have shapes, dtypes and strides, but no values, so the
largest test is as quick as the smallest. Operators of this library go to their Triton launchers. A launch is bound as
Triton binds it, recorded, and compiled if :data:`COMPILE` is set, but never run. A comparison of values passes, because
there are no values.

It finds imports that fail, wrong fixtures and options, and arguments that an operator or a kernel refuses. It cannot
find wrong values.

    python -m pytest -p gpu.stand_in ...        tests and benchmarks
    python -m gpu.stand_in MODULE ...           a program
"""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

CAPABILITY = (9, 0)  # compute capability of the GPU that is replaced, an H200
COMPILE = "DINOV2_KERNELS_REHEARSAL_COMPILES"
"""Environment variable: if it is set, every kernel is compiled into Triton's cache."""
LAUNCHES = "DINOV2_KERNELS_REHEARSAL_LAUNCHES"
"""Environment variable: a folder in which each process writes a file with a line for each kernel it would run."""
MILLISECONDS = 5.0  # duration of every call; long enough that a benchmark times a single call


class AnyNumber(float):
    """A value that was never computed: every comparison with it holds."""

    def _holds(self, other: object) -> bool:
        return True

    __eq__ = __ne__ = __lt__ = __le__ = __gt__ = __ge__ = _holds
    __hash__ = float.__hash__

    def __index__(self) -> int:
        return 1


class StandIn(TorchFunctionMode):
    """Context in which "cuda" is a device whose tensors have no values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if answer := _ANSWERS.get(func):
            tensors = [x for x in args if isinstance(x, Tensor)]
            if tensors and tensors[0].is_meta:
                return answer(*args, **kwargs)
        if _names_cuda(kwargs.get("device")):
            kwargs["device"] = torch.device("meta")
        if func is Tensor.pin_memory:
            return args[0]
        if func is Tensor.cuda:
            return args[0].to(torch.device("meta"))
        if func is Tensor.to:
            args = [torch.device("meta") if _names_cuda(x) else x for x in args]
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            args = [args[0], _without_masks(args[1]), *args[2:]]
        if func in _MATRIX_PRODUCTS and torch.is_autocast_enabled("cuda"):
            args = [_autocast(x) for x in args]
            kwargs = {name: _autocast(x) for name, x in kwargs.items()}
        return func(*args, **kwargs)


_MATRIX_PRODUCTS = {F.linear, F.conv2d, torch.conv2d, torch.matmul, torch.mm, torch.bmm, torch.addmm}
_MATRIX_PRODUCTS |= {Tensor.matmul, Tensor.__matmul__, Tensor.mm, F.scaled_dot_product_attention}


def _names_cuda(device: object) -> bool:
    return isinstance(device, str | torch.device) and str(device).startswith("cuda")


def _autocast(x: Any) -> Any:
    """An argument of a matrix product as autocast would cast it; the meta device has no autocast."""
    is_wide = isinstance(x, Tensor) and x.is_meta and x.dtype == torch.float32
    return x.to(torch.get_autocast_dtype("cuda")) if is_wide else x


def _without_masks(index: Any) -> Any:
    """The index with a few places instead of each mask, because the number of places in a mask is unknown."""
    if isinstance(index, tuple):
        parts = [_without_masks(x) for x in index]
        return tuple(x for part in parts for x in (part if isinstance(part, tuple) else (part,)))
    if isinstance(index, Tensor) and index.is_meta and index.dtype == torch.bool:
        places = torch.empty(min(index.numel(), 5), dtype=torch.int64, device="meta")
        return (places,) * index.dim()
    return index


def _on_host(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return torch.zeros((), dtype=x.dtype).expand(x.shape)


def _isnan(x: Tensor) -> Tensor:
    result = x != x
    result.is_isnan = True  # type: ignore[attr-defined]
    return result


def _any(x: Tensor, *args: Any, **options: Any) -> Tensor:
    result = x.any(*args, **options)
    result.is_false = getattr(x, "is_isnan", False)  # type: ignore[attr-defined]
    return result


def _places(x: Tensor, **_: Any) -> Tensor:
    return torch.empty(min(x.numel(), 5), x.dim(), dtype=torch.int64, device="meta")


_ANSWERS: dict[Any, Callable[..., Any]] = {
    Tensor.device.__get__: lambda x: torch.device("cuda", 0),  # type: ignore[attr-defined]
    Tensor.item: lambda x: AnyNumber(1),
    Tensor.__float__: lambda x: 1.0,
    Tensor.__int__: lambda x: 1,
    Tensor.__index__: lambda x: 1,
    Tensor.__bool__: lambda x: not getattr(x, "is_false", False),  # nothing holds a NaN, everything else is true
    Tensor.tolist: lambda x: _on_host(x).tolist(),
    Tensor.cpu: _on_host,
    Tensor.isnan: _isnan,
    Tensor.any: _any,
    Tensor.nonzero: _places,
    torch.nonzero: _places,
    Tensor.equal: lambda x, y: x.shape == y.shape,
    torch.equal: lambda x, y: x.shape == y.shape,
}


class _Generator(torch.Generator):
    """Generator of random numbers for any device; a device without values needs no numbers."""

    def __new__(cls, device: str | torch.device = "cpu") -> _Generator:
        return super().__new__(cls)

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self.asked_for = torch.device(device)

    @property
    def device(self) -> torch.device:
        return self.asked_for


class _Anything:
    """A stream, an event or a graph, whose methods do nothing."""

    def __init__(self, *_: Any, **__: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_, **__: None

    def elapsed_time(self, _: object) -> float:
        return MILLISECONDS


_CAPTURES: list[object] = []  # captures that have begun and not ended


@contextmanager
def _capture(graph: object, **_: Any) -> Iterator[None]:
    _CAPTURES.append(graph)
    try:
        yield
    finally:
        _CAPTURES.pop()


def _assert_close(actual: Any, expected: Any, **_: Any) -> None:
    """``torch.testing.assert_close`` for tensors without values: compares structure, shapes and dtypes."""
    if isinstance(actual, Tensor) and isinstance(expected, Tensor):
        assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    elif isinstance(actual, dict):
        assert actual.keys() == expected.keys()
        for name in actual:
            _assert_close(actual[name], expected[name])
    elif isinstance(actual, list | tuple):
        for one, other in zip(actual, expected, strict=True):
            _assert_close(one, other)


def install() -> None:
    """Make PyTorch report a GPU, and Triton launch nothing. It cannot be undone, so use a separate process."""
    properties = SimpleNamespace(multi_processor_count=132, major=CAPABILITY[0], minor=CAPABILITY[1])
    answers: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: "no GPU, a stand-in",
        "get_device_properties": lambda device=None: properties,
        "Stream": _Anything,
        "Event": _Anything,
        "CUDAGraph": _Anything,
        "current_stream": _Anything,
        "stream": lambda stream: nullcontext(),
        "graph": _capture,
        "device": lambda device: nullcontext(),
        "is_initialized": lambda: True,
        "is_current_stream_capturing": lambda: bool(_CAPTURES),
    }
    answers |= {name: lambda *_, **__: None for name in ("synchronize", "set_sync_debug_mode", "empty_cache")}
    answers |= {"memory_allocated": lambda: 0, "max_memory_allocated": lambda: 10**9}
    answers |= {"graph_pool_handle": lambda: None, "memory_reserved": lambda: 0}
    answers |= {"reset_peak_memory_stats": lambda *_: None, "manual_seed": lambda seed: None}
    for name, answer in answers.items():
        setattr(torch.cuda, name, answer)
    torch.Generator = _Generator  # type: ignore[misc]
    torch.testing.assert_close = _assert_close
    torch.compile = lambda function=None, **_: function or (lambda function: function)  # type: ignore[assignment]
    torch._dynamo.reset = lambda: None
    _install_optimizer()
    _install_driver()
    _install_native()


def _install_native() -> None:
    """Make the operators of the CUDA extension return results of the right shape."""
    from dinov2_kernels._library import OPERATORS, Operator

    Operator.has_native = lambda self, device_type: True  # type: ignore[method-assign]
    library = torch.library.Library("dinov2_kernels_cuda", "IMPL")
    _KEPT.append(library)
    for name, operator in OPERATORS.items():
        library.impl(name, operator.call, "Meta")
        object.__setattr__(operator, "reference", _inside(operator.reference))


def _inside(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function inside the stand-in, because PyTorch disables such a mode inside an operator."""

    def call(*args: Any) -> Any:
        with StandIn():
            return function(*args)

    return call


def _install_optimizer() -> None:
    """Make fused AdamW, with its rates on the device, do nothing."""
    library = torch.library.Library("aten", "IMPL")
    _KEPT.append(library)
    library.impl("_fused_adamw_.tensor_lr", lambda *_, **__: None, "Meta")
    optimizer: Any = sys.modules["torch.optim.optimizer"]  # torch.optim has another object with the module's name
    optimizer._get_fused_kernels_supported_devices = lambda: ["cuda", "meta"]


_KEPT: list[torch.library.Library] = []  # kept alive, because a registration ends with its library


def _install_driver() -> None:
    """Bind every launch as Triton does, but do not run it."""
    import triton

    from tests import aot

    seen: set[tuple[str, str]] = set()
    folder = os.environ.get(LAUNCHES)

    def record(self: Any, key: str, *_: Any, **__: Any) -> None:
        kernel = f"{self.__module__}.{self.__name__}", key
        if folder and kernel not in seen:
            seen.add(kernel)
            with Path(folder, f"{os.getpid()}.txt").open("a") as file:
                file.write("\t".join(kernel) + "\n")

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        launch(self, *args, grid=grid, warmup=True, **options)

    def compile_and_record(self: Any, key: str, *args: Any) -> Any:
        record(self, key)
        return compile_kernel(self, key, *args)

    compile_kernel = triton.JITFunction._do_compile
    triton.JITFunction._do_compile = compile_and_record if COMPILE in os.environ else record
    launch, triton.JITFunction.run = triton.JITFunction.run, run
    aot.stand_in_for_a_gpu(10 * CAPABILITY[0] + CAPABILITY[1])


@contextmanager
def stand_in() -> Iterator[None]:
    """Context with tensors without values, in which every operator uses Triton."""
    import dinov2_kernels as dk

    with StandIn(), dk.use_backend("triton"):
        yield


# ---------------------------------------------------------------------------------------------------------- for pytest


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests() -> None:
    """Install the stand-in before any test file asks whether there is a GPU."""
    install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the few tests that write values into files or count different values."""
    left_out = [item for item in items if item.get_closest_marker("needs_values")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(autouse=True, scope="session")
def _stand_in() -> Iterator[None]:
    with stand_in():
        yield


if __name__ == "__main__":
    install()
    del sys.argv[0]
    with stand_in():
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
