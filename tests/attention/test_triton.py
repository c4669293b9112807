"""The Triton kernels against the reference, in Triton's interpreter."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate

import pytest
import torch
import triton
import triton.language as tl

from dinov2_kernels import PackedLayout
from dinov2_kernels.attention import reference, triton_kernel
from dinov2_kernels.attention.triton_tiles import find_block
from tests.attention.cases import CASES, Case, assert_matches_reference
from tests.triton_interpreter import exact_bfloat16, ptx_arithmetic

pytestmark = [
    pytest.mark.usefixtures("poisoned_outputs"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, test_gpu.py runs the compiled kernels"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of rows that no result depends on
]

OPERATORS = (triton_kernel.attention_forward, triton_kernel.attention_backward)

# A step of the interpreter takes a fraction of a millisecond, so one head is enough, and few long sequences.
SMALL = tuple(case for case in CASES if case.H < 24 and max([0, *case.layout.lengths]) <= 64)
WIDE = tuple(Case(((1, 40), (2, 20)), H=1, D=D) for D in (32, 72, 80, 96, 128))
LARGE = Case(((1, 50), (1, 100)), H=1, magnitude=30.0)
LARGE_IN_PARTS = Case(((1, 257),), H=1, magnitude=30.0)
RESIDENT = tuple(Case(((1, length),), H=1) for length in (15, 33, 64, 65, 81, 144, 145, 201, 256, 257, 272))
STREAMING = Case(((2, 20), (1, 70), (1, 337)), H=1)
HALF = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    exact_bfloat16(monkeypatch)


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("case", [*SMALL, *WIDE, LARGE], ids=str)
def test_values(case: Case, offsets: bool) -> None:
    assert_matches_reference(*OPERATORS, case, torch.float32, offsets=offsets)


@pytest.mark.parametrize("offsets", [False, True])
@pytest.mark.parametrize("case", [*SMALL, *WIDE, LARGE], ids=str)
def test_values_in_the_arithmetic_of_a_gpu(case: Case, offsets: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ptx_arithmetic(monkeypatch)
    assert_matches_reference(*OPERATORS, case, torch.float32, offsets=offsets)


@pytest.mark.parametrize("case", [*RESIDENT, STREAMING, LARGE_IN_PARTS], ids=str)
def test_values_in_the_tiles_of_half_precision(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """float32, whose errors are a thousand times smaller, in tiles that only narrower dtypes use on a GPU."""
    for direction in ("forward", "backward"):
        choose = getattr(triton_kernel, f"{direction}_tile")
        monkeypatch.setattr(
            triton_kernel,
            f"{direction}_tile",
            lambda n, D, _, hopper, choose=choose: choose(n, D, torch.half, hopper),
        )
    assert_matches_reference(*OPERATORS, case, torch.float32)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", [*RESIDENT, STREAMING], ids=str)
def test_values_in_half_precision(case: Case, dtype: torch.dtype) -> None:
    assert_matches_reference(*OPERATORS, case, dtype)


@pytest.mark.parametrize("D", [5, 16, 80, 96, 128])
@pytest.mark.parametrize("length", [20, 70, 261])
def test_widths_of_a_head_in_half_precision(length: int, D: int) -> None:
    assert_matches_reference(*OPERATORS, Case(((1, length),), H=1, D=D), torch.float16)


def test_half_precision_where_only_the_device_knows_lengths() -> None:
    case = Case(((1, 3), (1, 0), (2, 70), (1, 130)), H=1)
    assert_matches_reference(*OPERATORS, case, torch.bfloat16, offsets=True)


@triton.jit
def _find_blocks(items, offsets, found, S, BLOCK: tl.constexpr):
    place = tl.program_id(0)
    first, length, row = find_block(tl.load(items + place), offsets, 0, 0, S, BLOCK, True)
    tl.store(found + 3 * place, first)
    tl.store(found + 3 * place + 1, length)
    tl.store(found + 3 * place + 2, row)


@pytest.mark.parametrize("S", [1, 2, 31, 32, 33, 1000, 1025])
def test_blocks_of_lengths_that_only_the_device_knows(S: int) -> None:
    """32 sequences are looked at in one step, and many of them are empty."""
    BLOCK = 16
    lengths = torch.randint(41, (S,), generator=torch.Generator().manual_seed(S)).tolist()
    lengths = [0 if s % 3 else length for s, length in enumerate(lengths)]
    offsets = [0, *accumulate(lengths)]
    begins = [offset // BLOCK + s for s, offset in enumerate(offsets[:-1])]
    count = offsets[-1] // BLOCK + S
    owners = [bisect_right(begins, item) - 1 for item in range(count)]
    expected = [[offsets[s], lengths[s], (item - begins[s]) * BLOCK] for item, s in enumerate(owners)]
    blocks = {(s, row) for (_, length, row), s in zip(expected, owners, strict=True) if row < length}
    assert blocks == {(s, row) for s, length in enumerate(lengths) for row in range(0, length, BLOCK)}

    items = sorted({*range(0, count, 1 + count // 80), count - 1})
    found = torch.empty(len(items), 3, dtype=torch.int64)
    tensors = torch.tensor(items, dtype=torch.int32), torch.tensor(offsets, dtype=torch.int32)
    _find_blocks[(len(items),)](*tensors, found, S, BLOCK=BLOCK)
    assert found.tolist() == [expected[item] for item in items]


RAGGED = Case(((2, 5), (1, 3), (1, 9), (1, 80), (1, 0), (2, 70), (1, 75)), H=1)


def test_many_different_lengths_share_a_launch() -> None:
    q = torch.empty(0, 1, 64, dtype=torch.float16)
    assert len(triton_kernel.forward_launches(None, RAGGED.layout.flat_runs, q)) == 2
    assert len(triton_kernel.backward_launches(None, RAGGED.layout.flat_runs, q)) == 2
    assert_matches_reference(*OPERATORS, RAGGED, torch.float16)


def test_launches_are_planned_once() -> None:
    q = torch.empty(0, 1, 64, dtype=torch.float16)
    first, again = (triton_kernel.forward_launches(None, list(RAGGED.layout.flat_runs), q) for _ in range(2))
    assert first is again


@pytest.mark.parametrize("offsets", [False, True])
def test_sequences_do_not_see_each_other(offsets: bool) -> None:
    layout = PackedLayout([(2, 20), (1, 3), (2, 70)])
    qkv, grad = Case(layout.runs, H=1).inputs(torch.float32)
    sequences = (layout.cu_seqlens("cpu"), ()) if offsets else (None, layout.flat_runs)
    expected = _results(qkv, grad, sequences)
    for poisoned in (slice(20, 40), slice(43, 113)):
        for x in (qkv, grad):
            x[poisoned] = torch.nan
    clean = [*range(20), *range(40, 43), *range(113, 183)]
    for name, result, wanted in zip(("out", "lse", "dqkv"), _results(qkv, grad, sequences), expected, strict=True):
        assert torch.equal(result[clean], wanted[clean]), name
        assert result[20:40].isnan().all(), name
        assert result[43:113].isnan().all(), name


@pytest.mark.parametrize("length", [20, 70])
def test_scores_far_below_zero(length: int) -> None:
    """exp(0 - lse), of a key that is not there, is then infinite."""
    qkv = torch.ones(length, 3, 1, 64)
    qkv[:, 0] *= 100
    qkv[:, 1] *= -100
    grad = torch.ones(length, 1, 64)
    for result in _results(qkv, grad, (None, (1, length))):
        assert result.isfinite().all()


def _results(qkv: torch.Tensor, grad: torch.Tensor, sequences: tuple[object, ...]) -> tuple[torch.Tensor, ...]:
    out, lse = triton_kernel.attention_forward(*qkv.unbind(1), *sequences, 0.125)
    return out, lse.T, triton_kernel.attention_backward(grad, *qkv.unbind(1), out, lse, *sequences, 0.125)


def test_any_strides() -> None:
    layout = PackedLayout([(1, 20), (1, 70)])
    packed, _ = Case(layout.runs).inputs(torch.float32)
    q, k, v = packed.unbind(1)  # [T, H, D]
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    expected, _ = reference.attention_forward(q, k, v, None, layout.flat_runs, 0.125)
    for views in ((q, k, v), heads_first, (q.contiguous(), heads_first[1], v)):
        result, _ = triton_kernel.attention_forward(*views, None, layout.flat_runs, 0.125)
        torch.testing.assert_close(result, expected)
