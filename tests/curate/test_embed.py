"""Features are the model's, of unit length, on the rows of their images; built-in ones tell copies from others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dinov2.curate import Pool, run_steps
from dinov2.curate.copies.features import describe_copies
from dinov2.curate.embed import EmbedConfig, embed
from dinov2.curate.engines import Inline, ProcessPool
from dinov2.curate.pool import read_table
from dinov2.data import AugmentationConfig, BundledPhotographs
from dinov2.data.cropping import resized
from dinov2.data.decoding import Pixels
from dinov2.demo.patches import cut_patches
from dinov2.demo.planted import planted_images
from dinov2.evaluate.probe import central_view
from dinov2.models import VisionTransformer, ViTConfig, load_pretrained, save_pretrained
from tests.curate.pictures import encoded, picture, write_pool
from tests.curate.test_runner import contents

IMAGES = {f"i{seed}": encoded(picture(seed, 80 + seed, 90)) for seed in range(5)}


class Means(nn.Module):
    """Mean colours of the quarters of an image."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


def means(images: list[Pixels]) -> np.ndarray:
    return np.stack([image.mean(axis=(0, 1)) for image in images])


def embedded(tmp_path: Path, config: EmbedConfig, files: dict[str, bytes] = IMAGES, name: str = "out") -> Pool:
    pool = write_pool(tmp_path / "pool", [files])
    after: Pool = run_steps(embed(pool, config, str(tmp_path / name)), Inline())
    return after


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_features_of_a_vit_are_its_class_tokens(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vit = ViTConfig(img_size=28, patch_size=14, embed_dim=64, depth=1, num_heads=1)
    save_pretrained(VisionTransformer(vit), tmp_path / "model")
    pool = embedded(tmp_path, EmbedConfig(model=str(tmp_path / "model"), size=42, batch_size=2))
    model, views = load_pretrained(tmp_path / "model").eval(), AugmentationConfig(global_size=42)
    with torch.no_grad():
        expected = model(torch.stack([central_view(picture(s, 80 + s, 90), views) for s in range(5)])).numpy()
    features = pool.read_features("00000")
    assert (features.dtype, features.shape) == (np.float16, (5, 64))
    np.testing.assert_allclose(features, unit(expected), atol=1e-3)


@pytest.mark.parametrize("kind", ["onnx", "pt"])
def test_features_of_files(tmp_path: Path, kind: str) -> None:
    path, example = tmp_path / f"means.{kind}", torch.zeros(2, 3, 32, 32)
    if kind == "onnx":
        torch.onnx.export(Means(), (example,), path, dynamic_shapes=({0: torch.export.Dim("b")},), verbose=False)
    else:
        torch.jit.trace(Means(), example).save(path)
    config = EmbedConfig(model=str(path), size=32, view="squash", mean=(0, 0, 0), std=(1, 1, 1), batch_size=3)
    features = embedded(tmp_path, config).read_features("00000")
    views = [resized(picture(s, 80 + s, 90), 32, 32) for s in range(5)]
    expected = Means()(torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).float() / 255).numpy()
    np.testing.assert_allclose(features, unit(expected), atol=1e-3)


def test_features_of_a_function(tmp_path: Path) -> None:
    features = embedded(tmp_path, EmbedConfig(model=f"{__name__}:means")).read_features("00000")
    np.testing.assert_allclose(features, unit(means([picture(s, 80 + s, 90) for s in range(5)])), atol=1e-3)


def test_images_without_features_are_dropped(tmp_path: Path) -> None:
    files = {**IMAGES, "cut": encoded(picture(8), "JPEG")[:800], "black": encoded(np.zeros((64, 64, 3), np.uint8))}
    pool = embedded(tmp_path, EmbedConfig(model=f"{__name__}:means"), files)
    reasons = read_table(pool.decisions[-1], "00000")["reason"].to_pylist()
    assert reasons == [None] * 5 + ["unreadable", "without features"]
    assert np.isnan(pool.read_features("00000")[5:]).all()
    assert np.isfinite(pool.read_features("00000")[:5]).all()


def test_a_shard_of_nothing_readable(tmp_path: Path) -> None:
    pool = embedded(tmp_path, EmbedConfig(), {"cut": encoded(picture(8), "JPEG")[:800]})
    assert np.isnan(pool.read_features("00000")).all()
    assert not pool.kept("00000").any()


@pytest.mark.parametrize("model", ["copies", "colour-texture"])
def test_same_bytes_on_every_engine(tmp_path: Path, model: str) -> None:
    pool = write_pool(tmp_path / "pool", [{f"i{seed}": encoded(picture(seed))} for seed in range(3)])
    run_steps(embed(pool, EmbedConfig(model=model), str(tmp_path / "one")), Inline())
    run_steps(embed(pool, EmbedConfig(model=model), str(tmp_path / "two")), ProcessPool(2))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_other_weights_are_other_features(tmp_path: Path) -> None:
    path, config = tmp_path / "m.pt", EmbedConfig(model=str(tmp_path / "m.pt"), size=32)
    torch.jit.trace(Means(), torch.zeros(2, 3, 32, 32)).save(path)
    first = embedded(tmp_path, config)
    torch.jit.trace(nn.Sequential(nn.ReLU(), Means()), torch.zeros(2, 3, 32, 32)).save(path)
    assert embedded(tmp_path, config).features != first.features


def test_no_such_model(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        embedded(tmp_path, EmbedConfig(model=str(tmp_path / "nothing")))


def test_copies_are_nearer_than_other_patches_on_halves_never_seen() -> None:
    """Patches of right halves: the network learnt from left halves alone."""
    photographs = BundledPhotographs(colour_only=True)
    patches = cut_patches(photographs, half="right", size=128, per_photograph=4, seed=1).images
    originals = describe_copies(list(patches))
    flipped = describe_copies([image[:, ::-1] for image in patches])
    cropped = describe_copies([image[10:118, 14:122] for image in patches])
    others = originals @ originals.T - 2 * np.eye(len(originals))
    assert ((originals * flipped).sum(axis=1) > others.max(axis=1)).all()
    assert np.mean((originals * cropped).sum(axis=1) > others.max(axis=1)) > 0.8


def test_the_planted_crawl_is_what_it_says() -> None:
    images = planted_images(0, per_photograph=4, distractors=3)
    again = planted_images(0, per_photograph=4, distractors=3)
    assert images == again != planted_images(1, per_photograph=4, distractors=3)
    names = [image.name for image in images]
    assert len(set(names)) == len(names)
    by_name = {image.name: image for image in images}
    assert all(by_name[image.original].kind in ("original", "distractor") for image in images)
    assert {image.role for image in images} == {"pool", "evaluation"}
