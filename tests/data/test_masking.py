"""Block masks: the native sampler against its definition, both against an independent writing of the algorithm."""

import math
import random
import threading
import time

import numpy as np
import pytest

from dinov2.data import MaskConfig, batch_masks, mask_counts, masking, masking_reference, sample_block_masks
from dinov2_kernels import _host

GRIDS = [(1, 1), (2, 2), (4, 4), (7, 5), (14, 14), (16, 16), (37, 37)]


def blocks_by_the_book(height: int, width: int, count: int, rng: random.Random) -> np.ndarray:
    """BEiT's algorithm 1 cell by cell, on Python's own generator."""
    mask = np.zeros((height, width), dtype=bool)
    while mask.sum() < count:
        cap = min(count - int(mask.sum()), height * width // 2)
        for _ in range(10):
            area = rng.uniform(4, cap)
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if w >= width or h >= height:
                continue
            top, left = rng.randint(0, height - h), rng.randint(0, width - w)
            new = [(y, x) for y in range(top, top + h) for x in range(left, left + w) if not mask[y, x]]
            if 0 < len(new) <= cap:
                for cell in new:
                    mask[cell] = True
                break
        else:
            break
    return mask


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid[0]}x{grid[1]}")
@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_native_sampler_is_bit_identical_to_its_definition(grid: tuple[int, int], seed: int) -> None:
    height, width = grid
    arguments = {"min_patches": 4, "max_patches": height * width // 2, "min_log_aspect": -1.2, "max_log_aspect": 1.2}
    counts = np.arange(height * width + 1)

    native = _host.sample_block_masks(height, width, counts, seed=seed, **arguments)
    defined = masking_reference.sample_block_masks(height, width, counts, seed=seed, **arguments)

    np.testing.assert_array_equal(native, defined)
    assert native.dtype == np.bool_
    assert native.any() == (height * width > 1)


def test_generator_is_splitmix64() -> None:
    generator = masking_reference.SplitMix64(1234567)
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [generator.next() for _ in published] == published


def test_native_sampler_is_the_one_in_use() -> None:
    assert masking._sample is _host.sample_block_masks


def test_without_the_extension_the_masks_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    native = sample_block_masks((16, 16), [10, 60, 128], seed=3)
    monkeypatch.setattr(masking, "_sample", masking_reference.sample_block_masks)
    np.testing.assert_array_equal(sample_block_masks((16, 16), [10, 60, 128], seed=3), native)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid[0]}x{grid[1]}")
def test_never_more_than_asked(grid: tuple[int, int]) -> None:
    counts = np.tile(np.arange(grid[0] * grid[1] + 1), 5)
    assert (sample_block_masks(grid, counts, seed=0).sum(axis=(1, 2)) <= counts).all()


@pytest.mark.parametrize("side", [14, 16])
def test_how_often_the_count_is_hit(side: int) -> None:
    counts = np.random.default_rng(0).integers(side**2 // 10, side**2 // 2, 20_000)
    short_by = counts - sample_block_masks((side, side), counts, seed=5).sum(axis=(1, 2))
    assert 0.90 < (short_by == 0).mean() < 0.94
    assert (short_by <= 2).mean() > 0.999


def test_statistics_are_those_of_the_algorithm() -> None:
    side, number = 14, 3000
    counts = np.random.default_rng(1).integers(20, 98, number)
    rng = random.Random(2)
    expected = np.stack([blocks_by_the_book(side, side, int(count), rng) for count in counts])
    masks = sample_block_masks((side, side), counts, seed=2)

    def edges(masks: np.ndarray) -> np.ndarray:
        """Neighbours of which one is masked: how broken up each mask is."""
        return (masks[:, 1:] != masks[:, :-1]).sum(axis=(1, 2)) + (masks[:, :, 1:] != masks[:, :, :-1]).sum(axis=(1, 2))

    assert abs((masks.sum(axis=(1, 2)) == counts).mean() - (expected.sum(axis=(1, 2)) == counts).mean()) < 0.025
    # Standard error of a cell's rate: sqrt(2 * 0.25 / 3000) = 0.013; of the mean number of edges: about 0.4.
    assert np.abs(masks.mean(axis=0) - expected.mean(axis=0)).max() < 0.06
    assert np.abs(masks.mean(axis=0) - expected.mean(axis=0)).mean() < 0.02
    assert abs(edges(masks).mean() - edges(expected).mean()) < 1.5
    assert abs(edges(masks).std() - edges(expected).std()) < 1.5


def test_interpreter_lock_is_released() -> None:
    counts = np.full(200_000, 100)
    worker = threading.Thread(target=sample_block_masks, args=((16, 16), counts), kwargs={"seed": 0})
    ticks = 0
    worker.start()
    while worker.is_alive():
        time.sleep(0.001)
        ticks += 1
    assert ticks > 10  # with the lock held there would be one or two


def test_seeds_decide() -> None:
    first, again, other = (sample_block_masks((14, 14), [50] * 8, seed=seed) for seed in (7, 7, 8))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert len({mask.tobytes() for mask in first}) == 8


@pytest.mark.parametrize(
    ("grid", "counts", "options", "message"),
    [
        ((0, 4), [1], {"seed": 0}, r"grid: expected \(H, W\) .* got \(0, 4\)"),
        ((4, 4), [17], {"seed": 0}, r"counts: expected numbers in \[0, 16\] for a 4 x 4 grid, got 17 to 17"),
        ((4, 4), [3, -1], {"seed": 0}, r"counts: .* got -1 to 3"),
        ((4, 4), [[1]], {"seed": 0}, r"counts: expected one number per mask, got shape \(1, 1\)"),
        ((4, 4), [1], {"seed": -1}, r"seed: expected an integer in \[0, 2\*\*64\), got -1"),
        (
            (4, 4),
            [1],
            {"seed": 0, "min_patches": 0},
            "min_patches and max_patches: expected at least 1 and at least 0, got 0 and",
        ),
        ((4, 4), [1], {"seed": 0, "aspect": (0.0, 1.0)}, "aspect: expected"),
    ],
)
def test_bad_arguments(grid: tuple[int, int], counts: list, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_block_masks(grid, counts, **options)


def test_no_masks() -> None:
    assert sample_block_masks((4, 4), [], seed=0).shape == (0, 4, 4)


def test_counts_of_a_batch_spread_over_the_ratio() -> None:
    counts = mask_counts(128, 256, MaskConfig(), np.random.default_rng(0))
    masked = np.sort(counts[counts > 0])
    edges = 256 * np.linspace(0.1, 0.5, 65)
    assert len(counts) == 128
    assert len(masked) == 64
    assert (masked >= np.floor(edges[:-1])).all()
    assert (masked <= edges[1:]).all()
    assert (np.flatnonzero(counts) != np.arange(64)).any()  # shuffled


def test_every_number_between_the_edges_is_drawn() -> None:
    counts = np.concatenate([mask_counts(2, 100, MaskConfig(), np.random.default_rng(i)) for i in range(2000)])
    drawn, times = np.unique(counts[counts > 0], return_counts=True)
    np.testing.assert_array_equal(drawn, np.arange(10, 50))
    assert times.min() > 20  # 50 expected


@pytest.mark.parametrize(("probability", "masked"), [(0.0, 0), (0.5, 2), (1.0, 5)])
def test_share_of_masked_crops(probability: float, masked: int) -> None:
    masks = batch_masks((8, 8), 5, MaskConfig(probability=probability), seed=0, position=(0, 0))
    assert masks.shape == (5, 64)
    assert masks.any(axis=1).sum() == masked


def test_batches_of_the_same_total() -> None:
    """Equally many patches in each, blocks as ever, completed by single patches; shares in the middle of intervals."""
    config, crops, patches = MaskConfig(same_total=True), 32, 196
    expected = [int(patches * (0.1 + 0.4 * (i + 0.5) / 16)) for i in range(16)]
    seen = set()
    for step in range(50):
        masks = batch_masks((14, 14), crops, config, seed=3, position=(step, 0))
        assert sorted(masks.sum(axis=1)) == [0] * 16 + expected
        seen.add(masks.tobytes())
    assert len(seen) == 50
    config = MaskConfig(same_total=True, ratio=(1.0, 1.0), probability=1.0)  # blocks alone never cover everything
    assert batch_masks((6, 5), 4, config, seed=0, position=(0, 0)).all()


def test_batches_differ_by_position_only() -> None:
    draw = {(s, r): batch_masks((8, 8), 16, MaskConfig(), seed=1, position=(s, r)) for s in (0, 1) for r in (0, 1)}
    np.testing.assert_array_equal(draw[1, 1], batch_masks((8, 8), 16, MaskConfig(), seed=1, position=(1, 1)))
    assert len({masks.tobytes() for masks in draw.values()}) == 4


@pytest.mark.parametrize(
    "bad", [{"probability": 1.5}, {"ratio": (0.5, 0.1)}, {"ratio": (0.1, 1.2)}, {"max_block_share": 0.0}]
)
def test_config_refuses(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        MaskConfig(**bad)
