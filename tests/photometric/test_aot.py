"""The GPU kernels of the photometric augmentation compile for A100 and H100 or H200, spill nothing and fit."""

from __future__ import annotations

import pytest

from tests import aot


@pytest.mark.parametrize("target", aot.TRITON_TARGETS)
def test_triton(target: int) -> None:
    usages = aot.compile_triton("photometric", target)
    assert {usage.kernel.partition("<")[0] for usage in usages} == {"_sum_luma", "_recolour", "_blur"}
    for usage in usages:
        usage.check()
