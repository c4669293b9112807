"""Sinkhorn's GPU kernels compile for A100 and H100 or H200, spill nothing and fit."""

from __future__ import annotations

import pytest
import torch

from dinov2_kernels._library import accumulation_dtype
from tests import aot
from tests.sinkhorn.cases import CUDA_THREADS, DTYPES


@pytest.mark.parametrize("target", aot.TRITON_TARGETS)
def test_triton(target: int) -> None:
    usages = aot.compile_triton("sinkhorn", target)
    kernels = {usage.kernel.partition("<")[0] for usage in usages}
    assert kernels == {"_balance", "_merge_row_norms", "_column_logsumexp", "_row_norm", "_column_mass", "_assign"}
    for usage in usages:
        usage.check()


@pytest.mark.skipif(aot.find_nvcc() is None, reason="nvcc is not installed: THE CUDA KERNELS WERE NOT COMPILED")
@pytest.mark.parametrize("target", aot.CUDA_TARGETS)
def test_cuda(target: str) -> None:
    usages = aot.compile_cuda("sinkhorn", target, CUDA_THREADS)
    assert len(usages) == 4 * len(DTYPES) + 3 * len({accumulation_dtype(torch.empty(0, dtype=d)) for d in DTYPES})
    for usage in usages:
        usage.check()
