"""Which cases a test on a GPU takes in which dtype: there, nearly every pair of them is a kernel to compile."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch

Case = TypeVar("Case")
TURNS = {torch.float32: (2, 0), torch.bfloat16: (2, 1), torch.float64: (6, 0), torch.float16: (6, 3)}
"""A dtype's period among small cases, and its place in the period."""


def pairs(
    cases: Sequence[Case], dtypes: Sequence[torch.dtype], large: Sequence[Case] = ()
) -> list[tuple[Case, torch.dtype]]:
    """Small cases by turns in float32 and bfloat16, some in float64 or float16 too; large in bfloat16, half in both.

    A kernel's code changes with the shape or with the dtype, hardly ever with both. The tests in Triton's interpreter,
    which compile nothing, take more pairs. The kernels of float16 are those of bfloat16 but for their conversions.
    """

    def is_in_turn(number: int, dtype: torch.dtype) -> bool:
        period, place = TURNS[dtype]
        return number % period == place

    small = [(case, dtype) for n, case in enumerate(cases) for dtype in dtypes if is_in_turn(n, dtype)]
    return small + [(case, torch.bfloat16) for case in large] + [(case, torch.float32) for case in large[::2]]
