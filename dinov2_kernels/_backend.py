"""Which implementation runs: :func:`info` reports it, :class:`use_backend` forces it for tests and benchmarks."""

from __future__ import annotations

import importlib.metadata
from typing import Any, Literal, get_args

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dinov2_kernels import _library
from dinov2_kernels._version import __version__

Backend = Literal["reference", "triton", "native"]


class use_backend(TorchDispatchMode):
    """Context manager that forces one implementation of every operator of this library.

    It is for tests and benchmarks. Ordinary code leaves the choice to the dispatcher.

    Args:
        name: ``"reference"`` (plain PyTorch, any device), ``"triton"`` (CUDA, or CPU under Triton's interpreter) or
            ``"native"`` (the compiled C++ or CUDA extension).

    Raises:
        ValueError: the name is none of these.
        NotImplementedError: an operator that is called inside has no such implementation for its device.

    Examples:
        >>> logits = torch.randn(6, 4)
        >>> bias = sinkhorn_bias(logits, 0.07)
        >>> with use_backend("reference"):
        ...     expected = sinkhorn_bias(logits, 0.07)
        >>> torch.allclose(bias, expected, atol=1e-4)
        True
    """

    def __init__(self, name: Backend) -> None:
        if name not in get_args(Backend):
            raise ValueError(f"name: expected one of {', '.join(get_args(Backend))}, got {name!r}")
        super().__init__()  # type: ignore[no-untyped-call]
        self.name = name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operator = _library.OPERATORS.get(func._opname) if func.namespace == "dinov2_kernels" else None
        if operator is None:
            return func(*args, **(kwargs or {}))
        if self.name == "reference":
            return operator.reference(*args)
        if operator.composite is not None:
            with self:  # its parts are operators too: they use the same backend
                return operator.composite(*args)
        if self.name == "triton":
            return operator.call_triton(*args)
        device_type = args[0].device.type
        if not operator.has_native(device_type):
            raise NotImplementedError(f"{operator.name} has no native implementation for {device_type!r} tensors")
        return getattr(torch.ops.dinov2_kernels_cuda, operator.name)(*args) if device_type == "cuda" else func(*args)


def info() -> dict[str, Any]:
    """Report what is built on this machine and what will run.

    Returns:
        A dictionary with the versions; for each device type, whether compiled kernels are loaded, or the reason why
        not; how the extension was built; and, for each operator that has kernels, what the dispatcher runs on CPU and
        on CUDA, and the GPU that verified its Triton kernels ("none yet" if no GPU has).

    Examples:
        >>> report = info()
        >>> list(report["operators"]["swiglu"])
        ['cpu', 'cuda', 'verified_on_gpu']
        >>> report["operators"]["swiglu"]["cpu"] in ("native", "reference")
        True
    """
    with_kernels = {name: x for name, x in sorted(_library.OPERATORS.items()) if x.composite is None}
    return {
        "version": __version__,
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if _library.triton_is_installed() else None,
        "native_cpu": _library.NATIVE_MISSING["cpu"] or "loaded",
        "native_cuda": _library.NATIVE_MISSING["cuda"] or "loaded",
        "host": _host_build(),
        "cpu_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "operators": {name: _describe(operator) for name, operator in with_kernels.items()},
    }


def _describe(operator: _library.Operator) -> dict[str, str]:
    on_triton = operator.triton is not None and _library.triton_is_installed()
    return {
        "cpu": "native" if operator.has_native("cpu") else "reference",
        "cuda": "triton" if on_triton else "reference",
        "verified_on_gpu": operator.verified_on_gpu or "none yet",
    }


def _host_build() -> dict[str, Any] | str:
    try:
        from dinov2_kernels import _host
    except ImportError:
        return "not built"
    return dict(_host.build_info())
