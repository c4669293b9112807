"""What the tests of every backend of KoLeo share: inputs, and the comparison with the reference in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dinov2_kernels._library import accumulation_dtype
from dinov2_kernels.koleo import reference
from tests.tolerance import assert_at_most_twice_the_error

ARGUMENTS = "Tensor x, int k, int n_groups, int world_size, int rank, float eps"
SCHEMAS = (
    f"koleo_nearest({ARGUMENTS}) -> (Tensor, Tensor)",
    f"koleo_forward({ARGUMENTS}) -> (Tensor, Tensor)",
    "koleo_backward(Tensor grad, Tensor x, Tensor index, int rank, float eps) -> Tensor",
)
CUDA_THREADS = 256  # of a block, in csrc/koleo/cuda.cu
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-8


def operators_of(namespace: Any) -> SimpleNamespace:
    """The raw operators of one backend: of ``torch.ops.dinov2_kernels``, or functions of a module."""
    names = ("nearest", "forward", "backward")
    return SimpleNamespace(**{name: getattr(namespace, f"koleo_{name}") for name in names})


def random_rows(B: int, D: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> Tensor:
    generator = torch.Generator(device).manual_seed(B * D)
    return torch.randn(B, D, dtype=torch.float64, device=device, generator=generator).to(dtype)


def _normal(x: Tensor) -> Tensor:
    return x


def _equal(x: Tensor) -> Tensor:
    """Pairs of equal rows, and of opposite ones."""
    x[len(x) // 2 : len(x) // 2 * 2] = x[: len(x) // 2]
    x[::5] = -x[1::5][: len(x[::5])] if len(x[1::5]) == len(x[::5]) else x[::5]
    return x


def _zeros(x: Tensor) -> Tensor:
    x[::3] = 0
    return x


def _uneven(x: Tensor) -> Tensor:
    return x * torch.logspace(-3, 3, len(x), dtype=x.dtype, device=x.device)[:, None]


def _large(x: Tensor) -> Tensor:
    return (x * 1e4).clamp(-6e4, 6e4)


@dataclass(frozen=True)
class Case:
    """Rows [B, D] of each of world_size processes, of which this one is number `rank`."""

    B: int
    D: int
    k: int = 1
    n_groups: int = 1
    world_size: int = 1
    rank: int = 0
    kind: Any = _normal

    def __str__(self) -> str:
        kind = self.kind.__name__.removeprefix("_")
        return f"{self.B}x{self.D}-k{self.k}-groups{self.n_groups}-rank{self.rank}of{self.world_size}-{kind}"

    def rows(self, dtype: torch.dtype, device: str = "cpu") -> Tensor:
        rows = random_rows(self.world_size * self.B, self.D, device=device)
        return self.kind(rows).to(dtype)  # type: ignore[no-any-return]

    @property
    def arguments(self) -> tuple[int, int, int, int, float]:
        return self.k, self.n_groups, self.world_size, self.rank, EPS

    @property
    def members(self) -> int:
        return self.world_size * self.B // self.n_groups


CASES = (
    Case(1, 1),
    Case(1, 384),
    Case(2, 1),
    Case(2, 3),
    Case(3, 17, k=2),
    Case(5, 64, k=4),
    Case(6, 4, n_groups=6),
    Case(7, 384),
    Case(8, 16, kind=_equal),
    Case(9, 16, k=3, kind=_zeros),
    Case(31, 1),
    Case(64, 384),
    Case(65, 33, k=2, kind=_uneven),
    Case(37, 64, kind=_large),
    Case(97, 3, k=3),
    Case(12, 5, n_groups=2),
    Case(12, 17, k=3, n_groups=3, world_size=2, rank=1),
    Case(2, 4, n_groups=2, world_size=2, rank=0),
    Case(70, 9, n_groups=2, world_size=2, rank=1),
    Case(5, 40, k=2, world_size=4, rank=2),
)


def assert_matches_reference(operators: Any, case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """All operators of a backend on one case: neighbours, loss, and gradient."""
    x = case.rows(dtype, device)
    wide = accumulation_dtype(x)
    floor = 16 * torch.finfo(wide).eps
    if case.k < case.members:
        _assert_nearest(operators, case, x, floor)

    loss, found = operators.forward(x, *case.arguments)
    plain, exact = (reference.koleo_forward(rows, *case.arguments)[0] for rows in (x, x.double()))
    assert loss.dtype == wide
    assert_at_most_twice_the_error("loss", loss, plain, exact, floor * (1 + float(exact.abs())))
    _assert_valid(found, case, x)

    everyone = (reference.koleo_forward(x, *case.arguments[:3], r, EPS)[1] for r in range(case.world_size))
    index = torch.cat(list(everyone))
    grad = torch.linspace(1, 2, case.world_size, dtype=wide, device=device)
    dx = operators.backward(grad, x, index, case.rank, EPS)
    plain = reference.koleo_backward(grad, x, index, case.rank, EPS)
    exact = reference.koleo_backward(grad.double(), x.double(), index, case.rank, EPS)
    assert dx.dtype == dtype
    one_pull = 1 / (case.B * reference.unit_rows(x.double(), EPS)[1].max())  # where they cancel, exact may be 0
    assert_at_most_twice_the_error("dx", dx, plain, exact, floor * float(exact.abs().max() + one_pull))


def _assert_nearest(operators: Any, case: Case, x: Tensor, floor: float) -> None:
    index, cosine = operators.nearest(x, *case.arguments)
    plain = reference.koleo_nearest(x, *case.arguments)[1]
    exact_index, exact = reference.koleo_nearest(x.double(), *case.arguments)
    assert cosine.dtype == plain.dtype
    assert_at_most_twice_the_error("cosine", cosine, plain, exact, floor)
    _assert_valid(index, case, x)
    # The cosines of the rows that were found: rounding may exchange rows that are about equally near, and only those.
    unit = reference.unit_rows(x.double(), EPS)[0]
    own = unit[case.rank * case.B :][: case.B]
    torch.testing.assert_close((own[:, None] * unit[index]).sum(dim=2), exact, rtol=0, atol=4 * floor)
    if x.dtype == torch.float64 and case.D > 1:
        assert torch.equal(index, exact_index)


def _assert_valid(index: Tensor, case: Case, x: Tensor) -> None:
    """The neighbours are different rows of the same batch, and no row is its own unless it is alone."""
    own = torch.arange(case.rank * case.B, (case.rank + 1) * case.B, device=x.device)[:, None]
    assert index.shape == (case.B, case.k)
    assert index.dtype == torch.int64
    assert ((index >= 0) & (index < len(x))).all()
    block = case.B // case.n_groups
    assert (index % case.B // block == own % case.B // block).all()
    assert (index.sort(dim=1).values.diff(dim=1) > 0).all()
    assert ((index == own) == (case.members == 1)).all()


def assert_ties_go_to_the_lowest(operators: Any, dtype: torch.dtype, device: str = "cpu") -> None:
    """Rows of small integers, each many times over: all cosines are exact, and most of them equal."""
    x = torch.eye(4)[torch.randint(4, (150,), generator=torch.Generator().manual_seed(0))].to(device, dtype)
    for arguments in ((1, 1, 1, 0), (3, 1, 1, 0), (40, 2, 1, 0), (5, 3, 2, 1)):
        index, cosine = operators.nearest(x, *arguments, EPS)
        expected_index, expected = reference.koleo_nearest(x, *arguments, EPS)
        assert torch.equal(index, expected_index)
        assert torch.equal(cosine, expected)


def assert_a_nan_is_farthest(operators: Any, dtype: torch.dtype, device: str = "cpu") -> None:
    x = random_rows(70, 12, dtype, device)
    x[[0, 7, 69]] = torch.nan
    for k in (1, 67, 69):
        index, cosine = operators.nearest(x, k, 1, 1, 0, EPS)
        expected_index, expected = reference.koleo_nearest(x, k, 1, 1, 0, EPS)
        assert torch.equal(cosine.isnan(), expected.isnan())
        assert torch.equal(index[expected.isnan()], expected_index[expected.isnan()])
        _assert_valid(index, Case(70, 12, k=k), x)
    loss, index = operators.forward(x, 2, 1, 1, 0, EPS)
    assert loss.isnan()
    _assert_valid(index, Case(70, 12, k=2), x)


def launches() -> Iterator[None]:
    """Every launch whose Triton kernels tests/aot.py compiles: class tokens of one process, and rows of many."""
    from dinov2_kernels.koleo import triton_kernel

    for dtype in DTYPES:
        for B, k in ((64, 1), (1024, 4), (8192, 1)):
            x = torch.empty(B, 384, dtype=dtype, device="meta")
            index = torch.empty(B, k, dtype=torch.int64, device="meta")
            grad = torch.empty((), dtype=accumulation_dtype(x), device="meta")
            yield triton_kernel.koleo_nearest(x, k, 1, 1, 0, EPS)
            yield triton_kernel.koleo_forward(x, k, 1, 1, 0, EPS)
            yield triton_kernel.koleo_backward(grad, x, index, 0, EPS)
