"""The demo and what it is made of: patches, descriptors made by hand, dense features, colours, pictures."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dinov2.data import AugmentationConfig, BundledPhotographs, normalize
from dinov2.demo.patches import Patches, PatchProbe, cut_patches, half_of, handmade_accuracies
from dinov2.evaluate.features import (
    dense_features,
    image_features,
    neighbourhood_features,
    pca_colours,
    principal_components,
)
from dinov2.evaluate.handmade import colour_histogram, raw_pixels, texture_histogram
from dinov2.models import VisionTransformer, ViTConfig, load_pretrained
from tests.extras import hide_all_but, installed_with

ROOT = Path(__file__).parents[2]
VIEWS = AugmentationConfig()


@pytest.fixture(scope="module")
def task() -> tuple[Patches, Patches]:
    photographs = BundledPhotographs()
    index = cut_patches(photographs, half="left", size=32, per_photograph=100, seed=0)
    return index, cut_patches(photographs, half="right", size=32, per_photograph=50, seed=1)


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    torch.manual_seed(0)
    config = ViTConfig(img_size=16, patch_size=4, embed_dim=16, depth=2, num_heads=2, init_values=1.0)
    return VisionTransformer(config).eval()


def numbered_pixels(height: int, width: int) -> np.ndarray:
    """An image whose every pixel has a colour of its own."""
    number = np.arange(height * width).reshape(height, width)
    return np.stack([number >> 16, (number >> 8) & 255, number & 255], axis=-1).astype(np.uint8)


def colours_of(images: np.ndarray) -> set[int]:
    return set((images.reshape(-1, 3).astype(np.int64) @ [1 << 16, 1 << 8, 1]).tolist())


@pytest.mark.parametrize("width", [64, 65])
def test_patches_of_the_halves_share_no_pixel(width: int) -> None:
    photograph = numbered_pixels(40, width)
    sides = [
        cut_patches([photograph], half=half, size=24, per_photograph=400, seed=seed)
        for seed, half in enumerate(("left", "right"))
    ]
    left, right = (colours_of(patches.images) for patches in sides)
    assert not left & right
    # together the patches cover the photograph, so the test would see a patch that crosses the middle
    assert left | right == colours_of(photograph)
    assert half_of(photograph, "left").shape[1] + half_of(photograph, "right").shape[1] == width


def test_patches_know_their_photograph_and_depend_on_the_seed_alone() -> None:
    photographs = [np.full((32, 64, 3), level, np.uint8) for level in (10, 200)]
    patches = cut_patches(photographs, half="right", size=8, per_photograph=3, seed=0)
    assert patches.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert [int(patches[i].mean()) for i in range(len(patches))] == [10, 10, 10, 200, 200, 200]
    image = [numbered_pixels(64, 64)]
    first, again, other = (
        cut_patches(image, half="left", size=8, per_photograph=4, seed=seed).images for seed in (5, 5, 6)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_patch_larger_than_half_is_refused() -> None:
    with pytest.raises(ValueError, match=r"size: expected at most 32, .* left half of photograph 0 of 40 x 32, got 33"):
        cut_patches([numbered_pixels(40, 64)], half="left", size=33, per_photograph=1, seed=0)


def test_histograms_count_pixels() -> None:
    image = np.zeros((1, 4, 4, 3), np.uint8)
    image[0, :2, :, 0] = 255  # half of the pixels red
    histogram = colour_histogram(image, bins=2)
    np.testing.assert_allclose(histogram, np.array([[0.5, 0.5, 1, 0, 1, 0]]) / 3, rtol=1e-6)
    textures = texture_histogram(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8))
    assert textures.shape == (2, 38)
    np.testing.assert_allclose(textures.sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(raw_pixels(image).max(), 1)


def test_baselines_of_the_task(task: tuple[Patches, Patches]) -> None:
    """The task is neither trivial nor hopeless: raw pixels near 40 %, histograms of colour near 65 %, of both 76 %."""
    index, queries = task
    assert (len(index), len(queries)) == (2000, 1000)
    accuracies = handmade_accuracies(index, queries)
    assert 0.37 < accuracies["raw pixels"] < 0.47
    assert 0.60 < accuracies["colour histogram"] < 0.70
    assert 0.60 < accuracies["texture histogram (LBP)"] < 0.70
    assert 0.71 < accuracies["colour and texture"] < 0.81


def test_probe_finds_a_patch_among_itself_and_not_its_label_in_noise(
    task: tuple[Patches, Patches], model: VisionTransformer
) -> None:
    index, _ = task
    assert PatchProbe(index, index, VIEWS, k=1)(model) == {"knn_accuracy": 1.0}
    shuffled = Patches(index.images, np.random.default_rng(0).permutation(index.labels))
    assert PatchProbe(shuffled, index, VIEWS, k=5)(model)["knn_accuracy"] < 0.5


def test_image_features_are_class_tokens_of_image_and_mirror_image(model: VisionTransformer) -> None:
    images = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    features = image_features(model, images, VIEWS, batch_size=2)
    assert features.shape == (5, 16)
    for image, feature in zip(images, features, strict=True):
        views = [torch.from_numpy(normalize(view, VIEWS.mean, VIEWS.std)) for view in (image, image[:, ::-1])]
        first, second = model(torch.stack(views)).detach()
        torch.testing.assert_close(feature, (first / first.norm() + second / second.norm()) / 2)


def test_neighbourhood_features_are_class_tokens_around_each_place(model: VisionTransformer) -> None:
    image = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    features = neighbourhood_features(model, image, VIEWS, stride=4)
    assert features.shape == (7, 9, 16)
    around = torch.from_numpy(normalize(image[4:20, 8:24], VIEWS.mean, VIEWS.std))[None]  # centred on row 12, column 16
    torch.testing.assert_close(features[3, 4], model(around)[0].detach())


def test_dense_features_are_means_over_all_windows(model: VisionTransformer) -> None:
    image = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    pixels = torch.from_numpy(normalize(image, VIEWS.mean, VIEWS.std))
    total, count = torch.zeros(6, 8, 16), torch.zeros(6, 8, 1)
    for top in (0, 8):
        for left in (0, 8, 16):
            window = pixels[None, :, top : top + 16, left : left + 16]
            tokens = model.forward_features(window)["x_norm_patchtokens"].detach().reshape(4, 4, 16)
            total[top // 4 : top // 4 + 4, left // 4 : left // 4 + 4] += tokens
            count[top // 4 : top // 4 + 4, left // 4 : left // 4 + 4] += 1
    torch.testing.assert_close(dense_features(model, image, VIEWS, stride=8), total / count)


@pytest.mark.parametrize(
    ("size", "stride", "message"),
    [
        ((16, 16), 6, "stride: expected a multiple of 4, the patch size, up to 16, got 6"),
        ((16, 16), 20, "up to 16, got 20"),
        ((12, 16), 4, "image: expected sides of 16 plus a multiple of stride 4, got 12 x 16"),
        ((16, 28), 8, "multiple of stride 8, got 16 x 28"),
    ],
)
def test_dense_features_refuse_what_does_not_fit(
    model: VisionTransformer, size: tuple[int, int], stride: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        dense_features(model, np.zeros((*size, 3), np.uint8), VIEWS, stride=stride)


def test_principal_components_of_known_axes() -> None:
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))[0]
    spread = torch.tensor([5.0, 3, 1, 0.1, 0.1, 0.1], dtype=torch.float64)
    features = torch.randn(20000, 6, generator=generator, dtype=torch.float64) * spread @ axes.T + 7
    components = principal_components(features, 3)
    assert torch.all((components * axes[:, :3]).sum(dim=0).abs() > 0.999)
    assert torch.all(components.gather(0, components.abs().argmax(dim=0, keepdim=True)) > 0)


def test_colours_are_shared_by_all_maps_and_span_the_range() -> None:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(10, 12, 8, generator=generator), torch.randn(7, 5, 8, generator=generator)]
    maps[1][0, 0] = maps[0][3, 4]  # the same feature in two images
    colours = pca_colours(maps)
    assert [tuple(colour.shape) for colour in colours] == [(10, 12, 3), (7, 5, 3)]
    torch.testing.assert_close(colours[1][0, 0], colours[0][3, 4])
    values = torch.cat([colour.flatten() for colour in colours])
    assert values.min() == 0
    assert values.max() == 1
    with pytest.raises(ValueError, match="maps: expected features of at least 3 numbers, got 2"):
        pca_colours([torch.zeros(4, 4, 2)])


def test_demo_in_three_steps_ends_with_a_table_and_pictures(tmp_path: Path) -> None:
    run = tmp_path / "run"
    demo = [sys.executable, str(ROOT / "examples" / "demo.py"), "--steps", "3", "--output", str(run)]
    only = hide_all_but(installed_with("demo"), tmp_path / "only")  # make demo installs no more than this extra
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{only}:{ROOT}", "COLUMNS": "100"}
    done = subprocess.run(demo, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if "│" in line]
    for name in ("raw pixels", "colour histogram", "texture histogram", "untrained ViT", "ViT after"):
        assert sum(name in row and "%" in row for row in rows) == 1, name
    for picture in ("loss.png", "pca.png"):
        assert (run / picture).read_bytes().startswith(b"\x89PNG")
    assert load_pretrained(run / "teacher").config.patch_size == 4

    again = subprocess.run(demo, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 2
    assert f"--output: expected a new folder, got '{run}', which exists" in again.stderr
