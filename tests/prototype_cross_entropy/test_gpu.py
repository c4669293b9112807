"""The Triton kernels on a GPU, and the loss as users reach it: `make test-gpu`."""

from __future__ import annotations

import pytest
import torch

from dinov2_kernels import prototype_cross_entropy
from tests.pairs import pairs
from tests.prototype_cross_entropy.cases import (
    CASES,
    DTYPES,
    Case,
    assert_matches_reference,
    gradients_of,
    to_float64,
    with_logits_in_memory,
)
from tests.tolerance import assert_at_most_twice_the_error

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_outputs")]

LARGE = (Case(1024, 128, 8192, J=2), Case(128, 128, 65536, J=0, magnitude=1e4), Case(1031, 1031, 7001, J=0))


@pytest.mark.parametrize(("case", "dtype"), pairs(CASES, DTYPES, LARGE), ids=str)
def test_values(case: Case, dtype: torch.dtype) -> None:
    assert_matches_reference(torch.ops.dinov2_kernels, case, dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [Case(512, 128, 65536, 256, J=2), Case(333, 333, 7001, 63, J=0)], ids=str)
def test_loss_and_gradients(case: Case, dtype: torch.dtype) -> None:
    arguments = case.loss_arguments(dtype, "cuda", gain=True)
    wide = to_float64(arguments)
    functions = (
        (prototype_cross_entropy, arguments),
        (with_logits_in_memory, arguments),
        (with_logits_in_memory, wide),
    )
    ours, plain, exact = (
        {"loss": loss, **gradients_of(loss, inputs)} for loss, inputs in ((f(**x), x) for f, x in functions)
    )
    for name, value in exact.items():
        floor = 8 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * value.abs().max().item()
        assert_at_most_twice_the_error(name, ours[name], plain[name], value, floor)


def test_cuda_graph() -> None:
    arguments = Case(64, 16, 8192, 64, J=2).loss_arguments(torch.float32, "cuda", gain=True)
    gradients_of(prototype_cross_entropy(**arguments), arguments)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = gradients_of(prototype_cross_entropy(**arguments), arguments)
    with torch.no_grad():
        arguments["features"].normal_()
    graph.replay()
    torch.testing.assert_close(result, gradients_of(prototype_cross_entropy(**arguments), arguments))
