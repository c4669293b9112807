"""KoLeo's GPU kernels compile for A100 and H100 or H200, spill nothing and fit."""

from __future__ import annotations

import pytest

from tests import aot
from tests.koleo.cases import CUDA_THREADS


@pytest.mark.parametrize("target", aot.TRITON_TARGETS)
def test_triton(target: int) -> None:
    usages = aot.compile_triton("koleo", target)
    assert {usage.kernel.partition("<")[0] for usage in usages} == {"_nearest", "_forward", "_backward"}
    for usage in usages:
        usage.check()


@pytest.mark.skipif(aot.find_nvcc() is None, reason="nvcc is not installed: THE CUDA KERNELS WERE NOT COMPILED")
@pytest.mark.parametrize("target", aot.CUDA_TARGETS)
def test_cuda(target: str) -> None:
    for usage in aot.compile_cuda("koleo", target, CUDA_THREADS):
        usage.check()
