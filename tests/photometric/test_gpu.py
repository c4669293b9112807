"""The Triton kernels on a GPU, reached as users reach them: `make test-gpu`."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dinov2_kernels import PhotometricDistribution, PhotometricPlan, draw_plan, photometric
from dinov2_kernels.photometric import reference
from tests.pairs import pairs
from tests.photometric.cases import (
    DTYPES,
    EXTREMES,
    MEAN,
    ORDERS,
    SMALL,
    STD,
    Case,
    assert_matches_reference,
    random_plans,
)

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_outputs")]

LARGE = (
    Case(96, 98, tuple(ORDERS), "orders"),
    Case(95, 129, tuple(EXTREMES * 2), "extremes"),
    Case(224, 224, tuple(random_plans(32)), "random"),
    Case(518, 517, tuple(random_plans(5)), "random"),
)


@pytest.mark.parametrize(("case", "dtype"), pairs(SMALL, DTYPES, LARGE), ids=str)
def test_values(case: Case, dtype: torch.dtype) -> None:
    assert_matches_reference(torch.ops.dinov2_kernels.photometric, case, dtype, "cuda")


def test_results_do_not_change_from_run_to_run_nor_with_the_batch() -> None:
    images, plan = LARGE[2].tensors("cuda")
    first, second = (photometric(images, PhotometricPlan(plan), mean=MEAN, std=STD) for _ in range(2))
    assert torch.equal(first, second)
    alone = photometric(images[7:8], PhotometricPlan(plan[7:8]), mean=MEAN, std=STD)
    assert torch.equal(alone[0], first[7])


def test_cuda_graph_takes_new_plans() -> None:
    """No launch depends on what a plan holds, and nothing waits for the device."""
    distribution = PhotometricDistribution(solarize=0.3, solarize_threshold=0.0)  # rounding decides no level's side
    images = torch.randint(0, 256, (16, 96, 96, 3), dtype=torch.uint8, device="cuda")
    plan = draw_plan(distribution, [np.random.default_rng(n) for n in range(16)]).to("cuda")
    photometric(images, plan, mean=MEAN, std=STD)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = photometric(images, plan, mean=MEAN, std=STD)
    other = draw_plan(distribution, [np.random.default_rng(100 + n) for n in range(16)])
    plan.table.copy_(other.table)
    graph.replay()
    expected = reference.photometric(images, plan.table, MEAN, STD, torch.float32)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-4)


@pytest.mark.large
def test_more_than_two_to_the_31_bytes() -> None:
    plans = [replace(plan, solarize_threshold=math.inf) for plan in random_plans(3)]
    images = torch.randint(0, 256, (15003, 224, 224, 3), dtype=torch.uint8, device="cuda")
    plan = PhotometricPlan.of(plans * 5001).to("cuda")
    result = photometric(images, plan, mean=MEAN, std=STD, dtype=torch.bfloat16)
    expected = reference.photometric(images[-3:], plan.table[-3:], MEAN, STD, torch.float32)
    torch.testing.assert_close(result[-3:].float(), expected, rtol=0.01, atol=0.01)
