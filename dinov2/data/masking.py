"""Masks of the patches that the student must predict: rectangular blocks of random area, shape and place.

The blocks are those of BEiT (arXiv 2106.08254, algorithm 1), as iBOT and DINOv2 use them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from dinov2.data import masking_reference
from dinov2.data.config import MaskConfig
from dinov2.data.randomness import Stream, derived_generator

try:
    from dinov2_kernels._host import sample_block_masks as _sample
except ImportError:  # installed without a compiler
    _sample = masking_reference.sample_block_masks


def sample_block_masks(
    grid: tuple[int, int],
    counts: Sequence[int] | npt.NDArray[np.int64],
    *,
    seed: int,
    min_patches: int = 4,
    max_patches: int | None = None,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> npt.NDArray[np.bool_]:
    """Masks of rectangular blocks, with at most ``counts[i]`` masked patches in mask i.

    Blocks are added until the count is reached or ten draws in a row do not fit. A block's area is uniform between
    ``min_patches`` and the patches left to mask (at most ``max_patches``). Its aspect ratio is log-uniform, its place
    uniform, and it is smaller than the grid on both sides. On 14 x 14 and 16 x 16 grids, 92 % of the masks reach their
    count, and nearly all others miss it by one or two patches. Native code takes about a microsecond per mask and does
    not hold the interpreter lock. A package built without it uses :mod:`dinov2.data.masking_reference`, with bitwise
    equal results.

    Args:
        grid: rows and columns of patches, (H, W).
        counts: patches to mask, one number per mask, each in [0, H * W].
        seed: an integer in [0, 2**64); the same seed gives the same masks on every machine.
        min_patches: smallest area of a block, in patches.
        max_patches: largest area of a block, in patches; half the grid by default.
        aspect: smallest and largest height-to-width ratio of a block.

    Returns:
        bool [len(counts), H, W], True for masked patches.

    Raises:
        ValueError: an argument is out of its range.
    """
    height, width = grid
    num_patches = height * width
    counts = np.asarray(counts, dtype=np.int64)  # [len]
    max_patches = num_patches // 2 if max_patches is None else max_patches
    if height < 1 or width < 1:
        raise ValueError(f"grid: expected (H, W) of at least one patch each, got {grid}")
    if counts.ndim != 1:
        raise ValueError(f"counts: expected one number per mask, got shape {counts.shape}")
    if counts.size and (counts.min() < 0 or counts.max() > num_patches):
        raise ValueError(
            f"counts: expected numbers in [0, {num_patches}] for a {height} x {width} grid,"
            f" got {counts.min()} to {counts.max()}"
        )
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed: expected an integer in [0, 2**64), got {seed}")
    if min_patches < 1 or max_patches < 0:
        raise ValueError(
            f"min_patches and max_patches: expected at least 1 and at least 0, got {min_patches} and {max_patches}"
        )
    if not 0 < aspect[0] <= aspect[1]:
        raise ValueError(f"aspect: expected (low, high) with 0 < low <= high, got {aspect}")
    return _sample(
        height,
        width,
        counts,
        seed=seed,
        min_patches=min_patches,
        max_patches=max_patches,
        min_log_aspect=math.log(aspect[0]),
        max_log_aspect=math.log(aspect[1]),
    )


def mask_counts(
    num_crops: int, num_patches: int, config: MaskConfig, generator: np.random.Generator
) -> npt.NDArray[np.int64]:
    """Patches to mask in each of a batch's global crops, int64 ``[num_crops]``, in random order.

    ``int(num_crops * probability)`` crops are masked. ``config.ratio`` is cut into as many equal intervals. The i-th
    crop draws its share of masked patches from the i-th interval. So the number of masked tokens hardly changes from
    batch to batch. With ``config.same_total``, each crop takes the middle of its interval.
    """
    num_masked = int(num_crops * config.probability)
    edges = np.linspace(*config.ratio, num_masked + 1)
    low, high = edges[:-1], edges[1:]
    shares = (low + high) / 2 if config.same_total else generator.uniform(low, high)
    counts = np.zeros(num_crops, dtype=np.int64)
    counts[:num_masked] = num_patches * shares  # rounds down
    generator.shuffle(counts)
    return counts


def batch_masks(
    grid: tuple[int, int], num_crops: int, config: MaskConfig, *, seed: int, position: tuple[int, ...]
) -> npt.NDArray[np.bool_]:
    """Masks of one batch's global crops, bool ``[num_crops, H * W]``: a pure function of the arguments.

    Args:
        grid: rows and columns of patches in a global crop.
        num_crops: global crops in the batch.
        config: the share of masked crops and of masked patches.
        seed: seed of the run, not negative.
        position: step and rank of the batch in the run.
    """
    num_patches = grid[0] * grid[1]
    generator = derived_generator(seed, Stream.MASKS, *position)
    counts = mask_counts(num_crops, num_patches, config, generator)
    masks = sample_block_masks(
        grid,
        counts,
        seed=int(generator.integers(1 << 63)),
        min_patches=config.min_patches,
        max_patches=int(num_patches * config.max_block_share),
        aspect=config.aspect,
    )
    masks = masks.reshape(num_crops, num_patches)
    if config.same_total:
        _top_up(masks, counts, generator)
    return masks


def _top_up(masks: npt.NDArray[np.bool_], counts: npt.NDArray[np.int64], generator: np.random.Generator) -> None:
    """Mask more random patches in each of the masks [N, patches] that has fewer than its count."""
    missing = counts - masks.sum(axis=1)
    for row in np.flatnonzero(missing):
        free = np.flatnonzero(~masks[row])
        masks[row, generator.choice(free, missing[row], replace=False)] = True
