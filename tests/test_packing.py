"""The layout of packed sequences."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dinov2_kernels import PackedLayout, packing

RUNS = [(2, 5), (0, 7), (3, 0), (1, 4)]


def test_sizes() -> None:
    layout = PackedLayout(RUNS)
    assert layout.runs == tuple(RUNS)
    assert (layout.num_sequences, layout.total_tokens, layout.max_length) == (6, 14, 5)
    assert layout.lengths == [5, 5, 0, 0, 0, 4]


def test_an_empty_run_has_no_part_in_the_maximum() -> None:
    assert PackedLayout([(0, 7), (2, 3)]).max_length == 3
    assert PackedLayout([]).max_length == 0


def test_equality_and_hash_go_by_the_runs() -> None:
    assert PackedLayout(RUNS) == PackedLayout(tuple(RUNS))
    assert hash(PackedLayout(RUNS)) == hash(PackedLayout(tuple(RUNS)))
    assert PackedLayout([(2, 3)]) != PackedLayout([(3, 2)])


def test_is_immutable() -> None:
    with pytest.raises(AttributeError):
        PackedLayout(RUNS).runs = ()  # type: ignore[misc]


def test_from_lengths_joins_equal_neighbours() -> None:
    assert PackedLayout.from_lengths([5, 5, 0, 3, 5]).runs == ((2, 5), (1, 0), (1, 3), (1, 5))


def test_offsets() -> None:
    offsets = PackedLayout(RUNS).cu_seqlens("cpu")
    assert offsets.dtype == torch.int32
    assert offsets.tolist() == [0, 5, 10, 10, 10, 10, 14]


def test_offsets_are_cached_and_the_cache_is_bounded() -> None:
    assert PackedLayout([(2, 9)]).cu_seqlens("cpu") is PackedLayout([(2, 9)]).cu_seqlens("cpu")
    for length in range(300):
        PackedLayout([(1, length)]).cu_seqlens("cpu")
    assert packing._cached_cu_seqlens.cache_info().currsize <= 128


def test_offsets_made_in_inference_mode_can_be_saved_for_backward() -> None:
    with torch.inference_mode():
        offsets = PackedLayout([(3, 11)]).cu_seqlens("cpu")
    assert not offsets.is_inference()


def test_fake_offsets_do_not_enter_the_cache() -> None:
    layout = PackedLayout([(3, 13)])
    with FakeTensorMode():
        layout.cu_seqlens("cpu")
    assert layout.cu_seqlens("cpu").tolist() == [0, 13, 26, 39]


def test_pack_and_unpack_are_inverse() -> None:
    layout = PackedLayout(RUNS)
    tensors = [torch.randn(*run, 3) for run in RUNS]
    packed = layout.pack(tensors)
    assert packed.shape == (14, 3)
    assert torch.equal(packed[10:], tensors[3][0])
    for tensor, piece in zip(tensors, layout.unpack(packed), strict=True):
        assert torch.equal(piece, tensor)


def test_unpacking_gives_views() -> None:
    packed = torch.zeros(14, 3)
    PackedLayout(RUNS).unpack(packed)[3].fill_(1.0)
    assert packed[10:].eq(1).all()
    assert packed[:10].eq(0).all()


def test_packing_a_single_run_copies_nothing() -> None:
    tensor = torch.randn(2, 5, 3)
    assert PackedLayout([(2, 5)]).pack([tensor]).data_ptr() == tensor.data_ptr()


@pytest.mark.parametrize("runs", [[(1, -1)], [(2,)], [(1, 2, 3)], [(1.5, 2)]], ids=str)
def test_bad_runs(runs: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match=r"runs: expected pairs \(count, length\) of integers >= 0, got"):
        PackedLayout(runs)


def test_packing_the_wrong_number_of_tensors() -> None:
    with pytest.raises(ValueError, match="tensors: expected one for each of the 2 runs, got 1"):
        PackedLayout([(1, 2), (3, 4)]).pack([torch.zeros(1, 2, 8)])


def test_packing_a_tensor_of_another_shape() -> None:
    with pytest.raises(ValueError, match=r"tensors\[1\]: expected shape \[3, 4, ...\], got \[3, 5, 8\]"):
        PackedLayout([(1, 2), (3, 4)]).pack([torch.zeros(1, 2, 8), torch.zeros(3, 5, 8)])


def test_unpacking_another_number_of_tokens() -> None:
    with pytest.raises(ValueError, match="packed: expected 14 tokens, as the layout describes, got 10"):
        PackedLayout(RUNS).unpack(torch.zeros(10, 3))
