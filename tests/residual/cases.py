"""What the tests of every backend of residual connections share: inputs, and the comparison with float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from dinov2_kernels import PackedLayout
from dinov2_kernels._library import accumulation_dtype
from dinov2_kernels.residual import num_kept_samples, reference
from tests.tolerance import assert_at_most_twice_the_error

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
MODES: dict[str, dict[str, bool]] = {"functional": {}, "recompute": {"recompute": True}, "inplace": {"inplace": True}}
OPERATORS = (
    "kept_rows",
    "gather_norm",
    "gather_norm_backward",
    "scatter",
    "scatter_",
    "scatter_backward",
    "scatter_gather_norm",
    "scatter_gather_norm_backward",
)


def operators_of(namespace: Any, prefix: str = "residual_") -> SimpleNamespace:
    """The raw operators of one backend: of ``torch.ops.dinov2_kernels``, or functions of a module."""
    return SimpleNamespace(**{name: getattr(namespace, prefix + name) for name in OPERATORS})


@dataclass(frozen=True)
class Case:
    """Samples of these runs (count, length), C channels; drop_rate 0 keeps all without an index."""

    runs: tuple[tuple[int, int], ...]
    C: int
    drop_rate: float = 0.3
    magnitude: float = 1.0
    with_weight: bool = True
    with_bias: bool = True
    with_gamma: bool = True

    def __str__(self) -> str:
        runs = "+".join(f"{count}x{length}" for count, length in self.runs) or "nothing"
        absent = "".join(f"-no-{name}" for name in ("weight", "bias", "gamma") if not getattr(self, f"with_{name}"))
        return f"{runs}-C{self.C}-drop{self.drop_rate}" + absent + (f"-{self.magnitude:g}" * (self.magnitude != 1))

    @property
    def layout(self) -> PackedLayout:
        return PackedLayout(self.runs)

    @property
    def kept(self) -> tuple[int, ...]:
        return tuple(num_kept_samples(count, self.drop_rate) for count, _ in self.runs)


CASES = (
    Case((), 8),
    Case(((0, 3), (2, 0)), 8),
    Case(((1, 1),), 1),
    Case(((1, 1),), 16),
    Case(((7, 5), (13, 3)), 5),
    Case(((4, 9), (6, 2)), 384),
    Case(((3, 5), (5, 2)), 768),
    Case(((3, 5), (5, 2)), 1024),
    Case(((3, 5), (5, 2)), 1280),
    Case(((3, 5), (5, 2)), 1536),
    Case(((3, 5), (5, 2)), 1537),
    Case(((3, 5), (5, 2)), 331),
    Case(((5, 7), (4, 2)), 384, drop_rate=0.0),
    Case(((5, 7), (4, 2)), 100, drop_rate=0.0, with_gamma=False, with_bias=False),
    Case(((5, 7), (4, 2)), 100, drop_rate=0.9, with_gamma=False),
    Case(((5, 7), (4, 2)), 100, with_weight=False, with_bias=False),
    Case(((5, 7), (4, 2)), 100, with_bias=False),
    Case(((9, 4), (4, 2)), 384, magnitude=1e4),
    Case(((300, 1), (70, 3)), 32, drop_rate=0.5),
)


DRAWS: tuple[tuple[tuple[tuple[int, int], ...], tuple[float, ...]], ...] = (
    (((5, 7), (4, 3)), (0.3, 0.5, 0.3)),  # 47 tokens, so that every draw but the first has a gap before it
    (((9, 4),), (0.9, 0.1)),
    (((0, 3), (3, 1), (2, 0)), (0.5,) * 5),
    ((), (0.5, 0.5)),
    (((300, 1), (70, 3)), (0.2, 0.6)),
)
"""Runs, and the rates of several draws at once."""


def assert_draws_match_reference(
    operators: Any, runs: tuple[tuple[int, int], ...], rates: tuple[float, ...], device: str = "cpu"
) -> None:
    layout = PackedLayout(runs)
    keys = torch.rand(len(rates), layout.num_sequences, generator=torch.Generator().manual_seed(0)).to(device)
    arguments = keys, layout.flat_runs, [num_kept_samples(count, rate) for rate in rates for count, _ in runs]
    for result, expected in zip(operators.kept_rows(*arguments), reference.residual_kept_rows(*arguments), strict=True):
        assert result.dtype == torch.int32
        assert torch.equal(result, expected)


def _vector(case: Case, generator: torch.Generator, wanted: bool, center: float) -> Tensor | None:
    values = torch.randn(case.C, dtype=torch.float64, device=generator.device, generator=generator) * 0.3 + center
    return values if wanted else None


def assert_matches_reference(
    operators: Any,
    case: Case,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    branch_dtype: torch.dtype | None = None,
    parameter_dtype: torch.dtype | None = None,
) -> None:
    """All operators of a backend on one case, against the reference in float64.

    Tokens are in ``dtype``; what the branch reads and returns is in ``branch_dtype``, by default the same; parameters
    are in ``parameter_dtype``, by default float32 (float64 for float64).
    """
    branch_dtype = branch_dtype or dtype
    generator = torch.Generator(device).manual_seed(case.C + case.layout.total_tokens)
    T, C = case.layout.total_tokens, case.C
    wide = accumulation_dtype(torch.empty(0, dtype=dtype))
    keys = torch.rand(2, 1, case.layout.num_sequences, device=device, generator=generator)
    rows = position = next_rows = next_position = scale = None
    t = T
    if case.drop_rate > 0:
        rows, position = operators.kept_rows(keys[0], case.layout.flat_runs, case.kept)
        expected = reference.residual_kept_rows(keys[0], case.layout.flat_runs, case.kept)
        assert torch.equal(rows, expected[0])
        assert torch.equal(position, expected[1])
        next_rows, next_position = reference.residual_kept_rows(keys[1], case.layout.flat_runs, case.kept)
        t = len(rows)
        scale = (0.5 + torch.rand(t, dtype=torch.float64, device=device, generator=generator)).to(wide)

    def tokens(count: int, dtype: torch.dtype) -> Tensor:
        values = torch.randn(count, C, dtype=torch.float64, device=device, generator=generator) * case.magnitude
        return values.clamp(-6e4, 6e4).to(dtype)

    weight, bias, gamma, last_bias = (
        None if vector is None else vector.to(parameter_dtype or wide)
        for vector in (
            _vector(case, generator, case.with_weight, 1.0),
            _vector(case, generator, case.with_bias, 0.0),
            _vector(case, generator, case.with_gamma, 0.5),
            _vector(case, generator, case.with_bias, 0.0),
        )
    )
    x, grad_x = tokens(T, dtype), tokens(T, dtype)
    residual, grad_h = tokens(t, branch_dtype), tokens(t, branch_dtype)
    eps = 1e-6

    def run(ops: Any, exact: bool) -> dict[str, Tensor]:
        def of(*tensors: Tensor | None) -> list[Tensor | None]:
            return [x.double() if exact and x is not None and x.is_floating_point() else x for x in tensors]

        result_dtype = torch.float64 if exact else branch_dtype
        x_, r_, gh_, gx_, w_, b_, g_, lb_, s_ = of(x, residual, grad_h, grad_x, weight, bias, gamma, last_bias, scale)
        h, mean, rstd = ops.gather_norm(x_, rows, w_, b_, eps, result_dtype)
        dx, dw, db = ops.gather_norm_backward(gh_, gx_, x_, None, rows, mean, rstd, w_, b_)
        recovered = ops.gather_norm_backward(gh_, gx_, None, h, rows, mean, rstd, w_, b_)
        y = ops.scatter(x_, r_, position, s_, g_, lb_)
        in_place = x_.clone()
        ops.scatter_(in_place, r_, rows, s_, g_, lb_)
        dr, dg, dlb = ops.scatter_backward(gx_, r_ if g_ is not None else None, rows, s_, g_, lb_, result_dtype)
        next_y, next_h, next_mean, next_rstd = ops.scatter_gather_norm(
            x_, r_, position, s_, g_, lb_, next_rows, next_position, w_, b_, eps, result_dtype
        )
        of_norm = (next_rows, next_position, next_mean, next_rstd, w_, b_)
        of_scatter = (r_ if g_ is not None else None, rows, position, s_, g_, lb_, result_dtype)
        chained = {
            name: ops.scatter_gather_norm_backward(gh_, gx_, *source, *of_norm, *of_scatter)
            for name, source in {"y": (next_y, None), "h": (None, next_h)}.items()
        }
        results = {"h": h, "mean": mean, "rstd": rstd, "dx": dx, "dweight": dw, "dbias": db}
        results |= {f"{name} from h": value for name, value in zip(("dx", "dweight", "dbias"), recovered, strict=True)}
        results |= {"next y": next_y, "next h": next_h, "next mean": next_mean, "next rstd": next_rstd}
        names = ("dx", "dweight", "dbias", "dr", "dgamma", "dlast_bias")
        for source, gradients in chained.items():
            results |= {f"next {name} from {source}": g for name, g in zip(names, gradients, strict=True)}
        return results | {"y": y, "y in place": in_place, "dr": dr, "dgamma": dg, "dlast_bias": dlb}

    results, plain = run(operators, exact=False), run(operators_of(reference), exact=False)
    exact = run(operators_of(reference), exact=True)
    for name, value in results.items():
        assert value.dtype == plain[name].dtype, f"{name}: {value.dtype}, expected {plain[name].dtype}"
        floor = 8 * torch.finfo(wide).eps * (1 + float(exact[name].abs().max()) if value.numel() else 0)
        assert_at_most_twice_the_error(name, value, plain[name], exact[name], floor)


def launches() -> Iterator[None]:
    """Every launch whose Triton kernels tests/aot.py compiles: (128, 257) + (512, 50) tokens, three tenths dropped."""
    from dinov2_kernels.residual import triton_kernel

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device="meta")

    T, t = 58496, 40773
    rows, position = empty(t, dtype=torch.int32), empty(T, dtype=torch.int32)
    yield triton_kernel.residual_kept_rows(empty(2, 640, dtype=torch.float32), [128, 257, 512, 50], [89, 358] * 2)
    of_autocast = [(torch.float32, torch.bfloat16, C) for C in (384, 768, 1024, 1280, 1536, 1537)]
    alike = [(dtype, dtype, 1280) for dtype in DTYPES]
    for dtype, branch_dtype, C in of_autocast + alike:
        wide = accumulation_dtype(empty(0, dtype=dtype))
        x, h, vector = empty(T, C, dtype=dtype), empty(t, C, dtype=branch_dtype), empty(C, dtype=wide)
        mean = scale = empty(t, dtype=wide)
        yield triton_kernel.residual_gather_norm(x, rows, vector, vector, 1e-6, branch_dtype)
        yield triton_kernel.residual_gather_norm_backward(h, x, x, None, rows, mean, mean, vector, vector)
        yield triton_kernel.residual_gather_norm_backward(h, x, None, h, rows, mean, mean, vector, vector)
        yield triton_kernel.residual_scatter(x, h, position, scale, vector, vector)
        yield triton_kernel.residual_scatter_(x, h, rows, scale, vector, vector)
        yield triton_kernel.residual_scatter_backward(x, h, rows, scale, vector, vector, branch_dtype)
        of_scatter, of_norm = (scale, vector, vector), (mean, mean, vector, vector)
        yield triton_kernel.residual_scatter_gather_norm(
            x, h, position, *of_scatter, rows, position, vector, vector, 1e-6, branch_dtype
        )
        for y, normed in ((x, None), (None, h)):
            yield triton_kernel.residual_scatter_gather_norm_backward(
                h, x, y, normed, rows, position, *of_norm, h, rows, position, *of_scatter, branch_dtype
            )
    # The interpreter takes what the compiler refuses: so everything that may be absent is absent once.
    x, h = empty(T, 384, dtype=torch.float32), empty(T, 384, dtype=torch.bfloat16)
    mean = empty(T, dtype=torch.float32)
    yield triton_kernel.residual_gather_norm(x, None, None, None, 1e-6, h.dtype)
    yield triton_kernel.residual_scatter(x, h, None, None, None, None)
    yield triton_kernel.residual_scatter_(x, h, None, None, None, None)
    yield triton_kernel.residual_scatter_backward(x, None, None, None, None, None, h.dtype)
    yield triton_kernel.residual_scatter_gather_norm(x, h, *[None] * 8, 1e-6, h.dtype)
    for y, normed in ((x, None), (None, h)):
        yield triton_kernel.residual_gather_norm_backward(h, x, y, normed, None, mean, mean, None, None)
        yield triton_kernel.residual_scatter_gather_norm_backward(
            h, x, y, normed, None, None, mean, mean, *[None] * 8, h.dtype
        )
