"""Registration of operators: every ``op.py`` describes its operators with :func:`define`, once, when it is imported.

A call goes one way: public function -> ``torch.ops.dinov2_kernels.<op>`` -> PyTorch's dispatcher -> one implementation.

==================  ===============================================================================================
dispatch key        implementation
==================  ===============================================================================================
any device          ``reference.py`` (CompositeExplicitAutograd), unless a more specific key below has one; for a
                    composite operator, the Python function that calls its parts
CPU                 ``csrc/<op>/cpu.cpp``, which registers itself when ``_native_cpu.so`` is loaded
CUDA                ``triton_kernel.py``, which has the launchers and is imported on the first call
==================  ===============================================================================================

CUDA C++ (``csrc/<op>/cuda.cu``) registers the same schema in the namespace ``dinov2_kernels_cuda``. Tests and
benchmarks call it through ``use_backend("native")``. It becomes an operator's implementation for CUDA when a committed
benchmark shows that it is the fastest.

This file also has what several ``op.py`` files share: dtypes, autocast and process groups; derivatives are in
``_autograd.py``.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import compiler

Implementation = Callable[..., Any]

_LIBRARY = torch.library.Library("dinov2_kernels", "DEF")
_CUDA_LIBRARY = torch.library.Library("dinov2_kernels_cuda", "DEF")
_PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Operator:
    """One operator ``torch.ops.dinov2_kernels.<name>`` and its implementations.

    Attributes:
        name: name of the operator, without its namespace.
        reference: the definition, in plain PyTorch, for any device.
        triton: ``"module:function"`` of the Triton implementation, or None.
        composite: the function that computes it with other operators, on every device; None for an operator with
            kernels of its own.
    """

    name: str
    reference: Implementation
    triton: str | None
    composite: Implementation | None

    @property
    def call(self) -> Any:
        """The operator in ``torch.ops``: a call of it goes through the dispatcher.

        It is the overload itself, so that no call has to search for it.
        """
        return getattr(torch.ops.dinov2_kernels, self.name).default

    def has_native(self, device_type: str) -> bool:
        """Whether the compiled extension holds a kernel of this operator for ``"cpu"`` or ``"cuda"``."""
        namespace = "dinov2_kernels_cuda" if device_type == "cuda" else "dinov2_kernels"
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{self.name}", device_type.upper())

    @property
    def verified_on_gpu(self) -> str | None:
        """The GPU on which its Triton kernels passed their tests, with the date; None if no GPU has verified them."""
        if self.triton is None:
            return None
        verified = _verified_on_gpu().get(self.triton.split(".")[1], {}).get("triton")
        return f"{verified['gpu']}, {verified['date']}" if verified else None

    def call_triton(self, *args: Any) -> Any:
        """Run the Triton implementation; the first call imports it."""
        return self._launcher(*args)

    @cached_property
    def _launcher(self) -> Implementation:
        """The Triton implementation. It is cached, because looking it up takes longer than the rest of a call."""
        if self.triton is None:
            raise NotImplementedError(f"{self.name} has no Triton implementation")
        module, function = self.triton.split(":")
        launcher: Implementation = getattr(importlib.import_module(module), function)
        return launcher


OPERATORS: dict[str, Operator] = {}


def define(
    schema: str,
    *,
    reference: Implementation,
    fake: Implementation,
    triton: str | None = None,
    composite: Implementation | None = None,
) -> Operator:
    """Define ``dinov2_kernels::<op>`` and register its reference, its fake and its Triton implementation.

    Args:
        schema: signature in PyTorch's schema language, e.g. ``"square(Tensor x) -> Tensor"``.
        reference: the definition in plain PyTorch; it runs on every device that has nothing better.
        fake: allocates the result for given arguments without computing it (``torch.compile``, FakeTensor).
        triton: ``"module:function"`` of the implementation for CUDA.
        composite: Python function that calls other operators, which have kernels. It replaces the reference on every
            device, and tests compare it with the reference like any kernel.
    """
    operator = Operator(schema.partition("(")[0], reference, triton, composite)
    _LIBRARY.define(schema)
    _CUDA_LIBRARY.define(schema)
    _LIBRARY.impl(operator.name, composite or reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dinov2_kernels::{operator.name}", fake, lib=_LIBRARY)
    if triton is not None and triton_is_installed():
        _LIBRARY.impl(operator.name, operator.call_triton, "CUDA")
    OPERATORS[operator.name] = operator
    return operator


@cache
def _verified_on_gpu() -> dict[str, dict[str, dict[str, str]]]:
    """The record of ``python -m gpu.verify``, by folder of the operator and kind of kernels."""
    record: dict[str, dict[str, dict[str, str]]] = json.loads((_PACKAGE / "verified_on_gpu.json").read_text())
    return record


def accumulation_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of arithmetic and sums: float64 for float64, float32 for everything narrower."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def autocast_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of a matrix product of x under autocast; that of x if autocast is off or does not change x."""
    if not torch._C._is_any_autocast_enabled() or x.dtype == torch.float64:
        return x.dtype
    device_type = x.device.type
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else x.dtype


def autocast_disabled(device_type: str) -> AbstractContextManager[object]:
    """Context that keeps float32 products in float32. The meta device has no autocast, so nothing happens there."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def is_tracing() -> bool:
    """Whether ``torch.jit.trace`` records, which ``torch.onnx.export(dynamo=False)`` uses too; sizes are tensors then.

    It takes half as long as ``torch.jit.is_tracing()``.
    """
    return torch._C._is_tracing()


# What torch.compiler.assume_constant_result sets; that function also imports Triton.
is_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def contiguous(x: torch.Tensor) -> torch.Tensor:
    """``x.contiguous()``; always a copy in a program of ``torch.export``, whose later inputs may have other strides."""
    # The flag is read as it is, because torch.compiler.is_exporting() takes as long as x.contiguous().
    return x.clone(memory_format=torch.contiguous_format) if compiler._is_exporting_flag else x.contiguous()


def dense(x: torch.Tensor) -> torch.Tensor:
    """x with a dense last dimension and any other strides; under ``torch.export`` as :func:`contiguous`."""
    return x if x.stride(-1) == 1 and not compiler._is_exporting_flag else contiguous(x)


def refuse_symbols(*values: Any) -> None:
    """Raise an error for the symbols of ``torch.fx.symbolic_trace``, which stand for tensors and sizes of any kind."""
    if any(isinstance(value, torch.fx.Proxy) for value in values):
        raise NotImplementedError(
            "torch.fx.symbolic_trace: expected modules that do not run on dinov2_kernels; use torch.export,"
            " or first call dinov2_kernels.integrations.restore(model) if accelerate changed the model"
        )


def place_in(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """World size of the group and rank of this process; None means this process alone.

    Raises:
        ValueError: this process is not a member of the group.
    """
    if group is None:
        return 1, 0
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError("group: expected a process group to which this process belongs, got one to which it does not")
    return dist.get_world_size(group), rank


def triton_is_installed() -> bool:
    """Whether Triton can be imported, found out without importing it."""
    return importlib.util.find_spec("triton") is not None


def _load_native(device_type: str) -> str | None:
    """Load the compiled kernels for a device type; return None, or the reason why they are missing."""
    path = _PACKAGE / f"_native_{device_type}.so"
    if not path.exists():
        return "not built"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return f"does not load: {error}"
    return None


NATIVE_MISSING: dict[str, str | None] = {device: _load_native(device) for device in ("cpu", "cuda")}
"""For each device type: None if the compiled kernels are loaded, else the reason why not."""
