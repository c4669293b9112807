"""The native CPU operators: every target this processor runs, values, dtypes, threads, memory."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor

from dinov2_kernels import _library
from dinov2_kernels.residual import reference
from tests.cpu_targets import TARGETS, run_python, run_value_tests
from tests.residual.cases import CASES, DTYPES, OPERATORS, Case, assert_matches_reference, operators_of
from tests.tolerance import assert_at_most_twice_the_error

native = operators_of(torch.ops.dinov2_kernels)
SHAPES = (
    Case(((40, 50), (3, 257)), 384),  # many chunks of tokens, cut within samples
    Case(((9, 70),), 1537, drop_rate=0.0),
    Case(((3000, 1),), 16, drop_rate=0.7),
    Case(((6, 11),), 3),  # fewer channels than lanes
    Case(((6, 11),), 64, with_weight=False),
    Case(((6, 11),), 67, with_weight=False, with_bias=False, with_gamma=False),
)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def test_is_built() -> None:
    """Without this, every test below would compare the reference with itself."""
    assert _library.NATIVE_MISSING["cpu"] is None
    assert all(_library.OPERATORS[f"residual_{name}"].has_native("cpu") for name in OPERATORS)


@pytest.mark.usefixtures("poisoned_outputs")
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", CASES + SHAPES, ids=str)
def test_values(case: Case, dtype: torch.dtype) -> None:
    assert_matches_reference(native, case, dtype)
