"""The GPU kernels of residual connections compile for A100 and H100 or H200, spill nothing and fit."""

from __future__ import annotations

import pytest

from tests import aot

KERNELS = {
    "kept_rows",
    "gather_norm",
    "gather_norm_backward",
    "scatter",
    "scatter_in_place",
    "scatter_backward",
    "scatter_gather_norm",
    "scatter_gather_norm_backward",
}


@pytest.mark.parametrize("target", aot.TRITON_TARGETS)
def test_triton(target: int) -> None:
    usages = aot.compile_triton("residual", target)
    assert {usage.kernel.partition("<")[0] for usage in usages} == KERNELS
    for usage in usages:
        usage.check()
