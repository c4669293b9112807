"""PCA hashes stay when an image is copied, and differ between images; near ones are found without comparing all."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from PIL import Image

from dinov2.curate.components import Components
from dinov2.curate.hashing import fit_directions, near_pairs, pca_hashes, standardized, thumbnail
from dinov2.data.decoding import Pixels, decode_image
from tests.curate.pictures import encoded, picture


def hashes(images: list[Pixels], sample: list[Pixels]) -> list[int]:
    fitted = fit_directions(standardized(np.stack([thumbnail(image) for image in sample]))[0])
    units, contrast = standardized(np.stack([thumbnail(image) for image in images]))
    assert contrast.all()
    found: list[int] = pca_hashes(units, fitted).tolist()
    return found


def test_copies_are_near_and_others_are_far() -> None:
    pool = [picture(seed) for seed in range(120)]
    originals = hashes(pool, pool)
    scaled = [np.asarray(Image.fromarray(image).resize((150, 150), 3)) for image in pool]
    compressed = [decode_image(encoded(image, "JPEG", quality=40), "") for image in pool]
    brighter = [np.clip(image * 0.8 + 20, 0, 255).astype(np.uint8) for image in pool]
    for copies in (scaled, compressed, brighter):
        distances = [(a ^ b).bit_count() for a, b in zip(originals, hashes(copies, pool), strict=True)]
        assert np.mean(np.array(distances) <= 2) > 0.9
    assert min((a ^ b).bit_count() for a, b in itertools.combinations(originals, 2)) > 8


def test_no_contrast_no_hash() -> None:
    flat = np.full((50, 40, 3), 77, np.uint8)
    units, contrast = standardized(np.stack([thumbnail(flat), thumbnail(picture(0))]))
    assert contrast.tolist() == [False, True]
    np.testing.assert_allclose(np.linalg.norm(units, axis=1), [0, 1], atol=1e-6)
    np.testing.assert_allclose(units.mean(axis=1), 0, atol=1e-6)
    assert fit_directions(units[:0]).shape == (65, 1024)


@pytest.mark.parametrize("distance", [0, 1, 2, 5])
def test_near_pairs_connect_what_comparing_all_connects(distance: int) -> None:
    rng = np.random.default_rng(distance)
    values = rng.integers(0, 2**63, 40, dtype=np.uint64)
    flips = np.uint64(1) << rng.integers(0, 64, (400, 4), dtype=np.uint64)
    some = np.arange(4) < rng.integers(0, 5, (400, 1))
    near = rng.choice(values, 400) ^ np.bitwise_xor.reduce(np.where(some, flips, np.uint64(0)), axis=1)
    found, all_pairs = Components(400), Components(400)
    pairs = near_pairs(near, distance)
    found.join(pairs[:, 0].copy(), pairs[:, 1].copy())
    every = itertools.combinations(range(400), 2)
    expected = [(i, j) for i, j in every if (int(near[i]) ^ int(near[j])).bit_count() <= distance]
    first, second = np.array(expected).T
    all_pairs.join(first.copy(), second.copy())
    assert np.array_equal(found.labels(), all_pairs.labels())


@pytest.mark.parametrize("count", [0, 1])
def test_near_pairs_of_few(count: int) -> None:
    assert near_pairs(np.zeros(count, np.uint64), 2).shape == (0, 2)
