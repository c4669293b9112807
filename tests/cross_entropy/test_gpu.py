"""The Triton kernels on a GPU, reached as users reach them: `make test-gpu`."""

from __future__ import annotations

import pytest
import torch

from dinov2_kernels import soft_cross_entropy
from tests.cross_entropy.cases import CASES, DTYPES, Case, assert_matches_reference
from tests.pairs import pairs

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_outputs")]

LARGE = (Case(300, 300, 65536, J=0), Case(1280, 128, 65536, J=2), Case(5000, 7, 131), Case(64, 64, 131071, J=0))


@pytest.mark.parametrize(("case", "dtype"), pairs(CASES, DTYPES, LARGE), ids=str)
def test_values(case: Case, dtype: torch.dtype) -> None:
    assert_matches_reference(torch.ops.dinov2_kernels, case, dtype, "cuda")


def test_cuda_graph() -> None:
    student = torch.randn(64, 1000, device="cuda", requires_grad=True)
    teacher = torch.randn(64, 1000, device="cuda")

    def gradient() -> torch.Tensor:
        loss = soft_cross_entropy(student, teacher, student_temperature=0.1, teacher_temperature=0.07)
        return torch.autograd.grad(loss.sum(), student)[0]

    gradient()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = gradient()
    with torch.no_grad():
        student.normal_()
    graph.replay()
    torch.testing.assert_close(result, gradient())


@pytest.mark.large
def test_more_than_two_to_the_31_elements() -> None:
    student = torch.randn(2**15 + 3, 65536, dtype=torch.bfloat16, device="cuda")
    teacher = torch.randn(1, 65536, dtype=torch.bfloat16, device="cuda")
    index = torch.zeros(len(student), dtype=torch.int64, device="cuda")
    options = {"student_temperature": 0.1, "teacher_temperature": 0.07}
    loss = soft_cross_entropy(student, teacher, teacher_index=index, **options)
    expected = soft_cross_entropy(student[-3:].clone(), teacher, teacher_index=index[-3:], **options)
    torch.testing.assert_close(loss[-3:], expected)
