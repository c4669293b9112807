"""Which cases a test on a GPU takes in which dtype: there, nearly every pair of them is a kernel to compile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

Case = TypeVar("Case")


def pairs(cases: Sequence[Case], dtypes: Sequence[torch.dtype]) -> list[tuple[Case, torch.dtype]]:
    """Every case in float32 and in bfloat16; one of three in float64 and another one in float16, if those are listed.

    The kernels of float16 are those of bfloat16 but for their conversions, and nobody trains in float64. The tests in
    Triton's interpreter, which compile nothing, take many more of these two.
    """
    every_third = {torch.float64: 0, torch.float16: 1}
    return [
        (case, dtype)
        for number, case in enumerate(cases)
        for dtype in dtypes
        if number % 3 == every_third.get(dtype, number % 3)
    ]
