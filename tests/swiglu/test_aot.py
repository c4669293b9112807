"""SwiGLU's GPU kernels compile for A100 and H100 or H200, spill nothing and fit."""

from __future__ import annotations

import pytest

from tests import aot


@pytest.mark.parametrize("target", aot.TRITON_TARGETS)
def test_triton(target: int) -> None:
    usages = aot.compile_triton("swiglu", target)
    assert {usage.kernel.partition("<")[0] for usage in usages} == {"_forward", "_backward", "_backward_with_sums"}
    for usage in usages:
        usage.check()
