"""The GPU kernels of attention compile for A100 and H100 or H200, spill nothing, fit, and use matrix instructions."""

from __future__ import annotations

import pytest

from tests import aot


@pytest.mark.timeout(900)
@pytest.mark.parametrize("target", aot.TRITON_TARGETS)
def test_triton(target: int) -> None:
    usages = aot.compile_triton("attention", target)
    kernels = {usage.kernel.partition("<")[0] for usage in usages}
    assert kernels == {
        "forward_resident",
        "forward_streaming",
        "backward_short",
        "backward_blocks",
    }
    for usage in usages:
        usage.check()
        # float32 is three products of TF32, on matrix instructions too. Hopper's own take 64 rows and four warps.
        wide = target == 90 and usage.threads >= 128 and "<fp32" not in usage.kernel
        assert usage.hgmma if wide else usage.hmma + usage.hgmma, f"{usage}: no matrix instructions"
