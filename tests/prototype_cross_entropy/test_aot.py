"""The GPU kernels of the cross-entropy of prototypes compile for A100 and H100 or H200, spill nothing and fit."""

from __future__ import annotations

import pytest

from tests import aot


@pytest.mark.parametrize("target", aot.TRITON_TARGETS)
def test_triton(target: int) -> None:
    usages = aot.compile_triton("prototype_cross_entropy", target)
    kernels = {usage.kernel.partition("<")[0] for usage in usages}
    assert kernels == {"_target_norm", "_targets", "_accumulate", "_gradient"}
    for usage in usages:
        usage.check()
