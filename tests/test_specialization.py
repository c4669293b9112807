"""A step of training compiles nothing that an earlier step has not: kernels do not depend on what changes with a step.

Unless told not to, Triton compiles a kernel anew where an integer is 1, divisible by 16 or past 2^31. That is good for
what is constant in a run, as the width of a row, whose loads become wide. The number of masked patches, though, changes
with every step, and one step in sixteen would stop for the seconds that a kernel takes to compile.

Every operator is launched here on meta tensors in steps of several sizes, in a process without Triton's interpreter,
and each launch ends before it compiles: what Triton would compile is what is counted.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dinov2_kernels import PackedLayout
from tests import aot, prepared

SIZES = (1, 15, 16, 17, 4896, 4897, 4900)
EQUALLY_TILED = ("4896", "4897", "4900")  # of these sizes, no operator chooses different tiles


def _attention(n: int) -> None:
    from dinov2_kernels.attention import triton_kernel

    runs = PackedLayout([(1, 256), (n, 50), (1, 320)]).flat_runs
    table = PackedLayout.from_lengths([*(40 + s % 3 for s in range(n)), 300, 350, 400, n % 1000 + 300]).flat_runs
    for sequences in ((None, runs), (None, table), (_empty(n + 1, dtype=torch.int32), ())):
        T = sum(c * length for c, length in zip(runs[::2], runs[1::2], strict=True))
        qkv, out = _empty(T, 3, 6, 64), _empty(T, 6, 64)
        _, lse = triton_kernel.attention_forward(*qkv.unbind(1), *sequences, 1.0)
        triton_kernel.attention_backward(out, *qkv.unbind(1), out, lse, *sequences, 1.0)


def _cross_entropy(n: int) -> None:
    from dinov2_kernels.cross_entropy import triton_kernel

    for M, index in ((n, None), (128, _empty(n, 2, dtype=torch.int64))):
        bias, weight = _empty(65536, dtype=torch.float32), _empty(n, dtype=torch.float32)
        arguments = (_empty(n, 65536), _empty(M, 65536), index, bias, weight, 0.1, _temperature(n))
        loss, *norms = triton_kernel.soft_cross_entropy(*arguments)
        triton_kernel.soft_cross_entropy_backward(loss, *arguments, *norms)


def _koleo(n: int) -> None:
    """The rows of a batch are constant in a run; a kernel serves all processes."""
    from dinov2_kernels.koleo import triton_kernel

    x, rank = _empty(32 * 64, 384), n % 32
    triton_kernel.koleo_nearest(x, 1, 1, 32, rank, 1e-8)
    _, index = triton_kernel.koleo_forward(x, 1, 1, 32, rank, 1e-8)
    triton_kernel.koleo_backward(_empty(32, dtype=torch.float32), x, _empty(32 * 64, 1, dtype=index.dtype), rank, 1e-8)


def _photometric(n: int) -> None:
    from dinov2_kernels.photometric import triton_kernel

    images, plan = _empty(n, 224, 224, 3, dtype=torch.uint8), _empty(n, 12, dtype=torch.float32)
    triton_kernel.photometric(images, plan, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], torch.bfloat16)


def _prototype_cross_entropy(n: int) -> None:
    from dinov2_kernels.prototype_cross_entropy import triton_kernel

    student, teacher = _empty(n, 4096), _empty(n, 65536)[:, :4096]
    bias, targets = _empty(4096, dtype=torch.float32), _empty(n, 4096, dtype=torch.float32)
    norm, state = _empty(2, n, dtype=torch.float32), _empty(4, n, dtype=torch.float32)
    triton_kernel.prototype_target_norm(teacher, bias, _temperature(n))
    triton_kernel.prototype_targets_(targets, teacher, bias, norm, _temperature(n))
    for index in (None, _empty(n, 2, dtype=torch.int64)):
        triton_kernel.prototype_accumulate_(state, student, targets, index, 0.1)
        triton_kernel.prototype_gradient_(student, state, targets, index, state[0], 0.1)


def _residual(n: int) -> None:
    from dinov2_kernels.residual import triton_kernel

    T, t, C = 50 * n + 256, 50 * (n - n // 3) + 256, 384
    triton_kernel.residual_kept_rows(_empty(2, n + 1, dtype=torch.float32), [n, 50, 1, 256], [n - n // 3, 1] * 2)
    x, h, vector = _empty(T, C, dtype=torch.float32), _empty(t, C), _empty(C, dtype=torch.float32)
    rows, position = _empty(t, dtype=torch.int32), _empty(T, dtype=torch.int32)
    mean = scale = _empty(t, dtype=torch.float32)
    triton_kernel.residual_gather_norm(x, rows, vector, vector, 1e-6, torch.bfloat16)
    triton_kernel.residual_gather_norm_backward(h, x, x, None, rows, mean, mean, vector, vector)
    triton_kernel.residual_scatter(x, h, position, scale, vector, vector)
    triton_kernel.residual_scatter_(x, h, rows, scale, vector, vector)
    triton_kernel.residual_scatter_backward(x, h, rows, scale, vector, vector, torch.bfloat16)
    of_scatter, of_norm = (scale, vector, vector), (mean, mean, vector, vector)
    triton_kernel.residual_scatter_gather_norm(
        x, h, position, *of_scatter, rows, position, vector, vector, 1e-6, torch.bfloat16
    )
    triton_kernel.residual_scatter_gather_norm_backward(
        h, x, x, None, rows, position, *of_norm, h, rows, position, *of_scatter, torch.bfloat16
    )


def _sinkhorn(n: int) -> None:
    from dinov2_kernels.sinkhorn import triton_kernel

    logits, bias = _empty(n, 65536), _empty(65536, dtype=torch.float32)
    triton_kernel.sinkhorn_bias(logits, _temperature(n), 3)
    triton_kernel.column_logsumexp(logits, _temperature(n))
    triton_kernel.column_mass(logits, _temperature(n), bias)
    triton_kernel.assign(logits, _temperature(n), bias)


def _swiglu(n: int) -> None:
    from dinov2_kernels.swiglu import triton_kernel

    x12 = _empty(n, 2 * 4096)
    triton_kernel.swiglu_backward(triton_kernel.swiglu(x12), x12)


OPERATORS: dict[str, Callable[[int], None]] = {
    function.__name__.removeprefix("_"): function
    for function in (
        _attention,
        _cross_entropy,
        _koleo,
        _photometric,
        _prototype_cross_entropy,
        _residual,
        _sinkhorn,
        _swiglu,
    )
}


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _temperature(n: int) -> float:
    """It rises for thousands of steps, and 1 is a number like others."""
    return 1.0 if n == 1 else 0.04 + n * 1e-6


def kernels_of_steps() -> dict[str, dict[str, dict[str, list[str]]]]:
    """By operator, by kernel in its tiles, and by size of the step: what Triton would compile."""
    import triton

    found: dict[str, dict[str, dict[str, list[str]]]] = {}

    def record(
        self: Any, key: Any, signature: Any, device: Any, constants: Any, options: Any, attrs: Any, _: Any
    ) -> None:
        tiles = {p.name: str(constants[p.num,]) for p in self.params if p.is_constexpr}
        pointers = {p.name: signature[p.name] for p in self.params if str(signature[p.name]).startswith("*")}
        kernel = f"{self.__name__} {tiles} {pointers} {options.num_warps} warps"
        version = f"{signature} {constants} {attrs}"
        versions = found[operator].setdefault(kernel, {}).setdefault(str(n), [])
        if version not in versions:
            versions.append(version)

    aot.stand_in_for_a_gpu(90)
    triton.JITFunction._do_compile = record
    for operator, launch in OPERATORS.items():
        found[operator] = {}
        for n in SIZES:
            launch(n)
    return found


@pytest.fixture(scope="module")
def kernels() -> dict[str, dict[str, dict[str, list[str]]]]:
    program = "import json; from tests import test_specialization as t; print(json.dumps(t.kernels_of_steps()))"
    output = prepared.run(program)
    return json.loads(output.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_kernel_serves_steps_of_all_sizes(operator: str, kernels: Any) -> None:
    assert kernels[operator]
    for kernel, of_sizes in kernels[operator].items():
        versions = {version for versions in of_sizes.values() for version in versions}
        assert len(versions) == 1, f"{kernel} is compiled {len(versions)} times:\n" + "\n".join(sorted(versions))


@pytest.mark.parametrize("operator", OPERATORS)
def test_tiles_do_not_change_with_every_step(operator: str, kernels: Any) -> None:
    for kernel, of_sizes in kernels[operator].items():
        of_these = {size for size in EQUALLY_TILED if size in of_sizes}
        assert len(of_these) in (0, len(EQUALLY_TILED)), f"{kernel} serves {of_these} alone, of {EQUALLY_TILED}"
