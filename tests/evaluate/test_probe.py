"""The labelled-folder probe: classes by folder name, images as the evaluation protocol prepares them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dinov2.data import AugmentationConfig, UnreadableImageError
from dinov2.data.cropping import resized
from dinov2.evaluate import FolderProbe, probe
from dinov2.evaluate.probe import central_crop


def write(path: Path, red: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 16), (red, 100, 50)).save(path)


class MeanColour(torch.nn.Module):
    """A model whose feature is the mean of each normalised channel."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.seen: list[torch.Tensor] = []

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(images)
        return images.mean(dim=(2, 3)) * self.scale


def test_classes_are_the_first_folders(tmp_path: Path) -> None:
    for index, red in enumerate((200, 210, 220)):
        write(tmp_path / "train" / "reddish" / "deep" / f"{index}.png", red)
        write(tmp_path / "train" / "bluish" / f"{index}.png", 20 + index)
    write(tmp_path / "test" / "reddish" / "a.png", 230)
    write(tmp_path / "test" / "bluish" / "b.png", 230)  # looks like the other class
    model = MeanColour()
    views = AugmentationConfig(global_size=14)
    assert FolderProbe(tmp_path, views)(model) == {"knn_accuracy": 0.5}
    assert [tuple(images.shape) for images in model.seen] == [(6, 3, 14, 14), (2, 3, 14, 14)]
    expected = (torch.tensor([20, 100, 50]) / 255 - torch.tensor(views.mean)) / torch.tensor(views.std)
    torch.testing.assert_close(model.seen[0][0].mean(dim=(1, 2)), expected, atol=1e-4, rtol=1e-4)


def test_a_class_without_training_images_is_named(tmp_path: Path) -> None:
    write(tmp_path / "train" / "a" / "1.png", 1)
    write(tmp_path / "test" / "b" / "1.png", 1)
    with pytest.raises(ValueError, match=r"test has classes that .*train lacks: b"):
        FolderProbe(tmp_path, AugmentationConfig())


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    write(tmp_path / "train" / "a" / "1.png", 1)
    with pytest.raises(ValueError, match=r"root: expected a folder of images, got '.*test', which is not a folder"):
        FolderProbe(tmp_path, AugmentationConfig())


@pytest.mark.parametrize("shape", [(64, 64), (64, 90), (130, 64), (14, 14), (7, 50)])
def test_central_crop_is_central(shape: tuple[int, int]) -> None:
    height, width = shape
    ramp = np.linspace(-1, 1, height)[:, None, None] + np.linspace(-1, 1, width)[None, :, None]
    image = np.clip(127.5 + 60 * ramp, 0, 255).astype(np.uint8).repeat(3, axis=2)
    crop = central_crop(image, 14)
    assert crop.shape == (14, 14, 3)
    assert crop.mean() == pytest.approx(127.5, abs=4)


@pytest.mark.parametrize(("channels", "dtype"), [(1, np.uint16), (5, np.float32), (13, np.uint8)])
def test_images_of_other_channels(tmp_path: Path, channels: int, dtype: type) -> None:
    full = 1 if dtype is np.float32 else np.iinfo(dtype).max
    for part, name, share in [
        ("train", "low", 0.2),
        ("train", "high", 0.8),
        ("test", "low", 0.3),
        ("test", "high", 0.7),
    ]:
        path = tmp_path / part / name / "0.npy"
        path.parent.mkdir(parents=True)
        np.save(path, np.full((30, 20, channels), share * full, dtype))
    views = AugmentationConfig(global_size=14, mean=(0.5,) * channels, std=(0.25,) * channels)
    model = MeanColour()
    assert FolderProbe(tmp_path, views, k=1)(model) == {"knn_accuracy": 1.0}
    assert [tuple(images.shape) for images in model.seen] == [(2, channels, 14, 14)] * 2
    expected = torch.tensor([(0.8 - 0.5) / 0.25, (0.2 - 0.5) / 0.25])  # high comes first
    torch.testing.assert_close(model.seen[0].mean(dim=(1, 2, 3)), expected, atol=0.02, rtol=0)  # a level is 0.016


def test_images_of_a_wrong_number_of_channels_are_named(tmp_path: Path) -> None:
    for part in ("train", "test"):
        write(tmp_path / part / "a" / "1.png", 1)
    probe = FolderProbe(tmp_path, AugmentationConfig(mean=(0.5,) * 4, std=(0.25,) * 4))
    with pytest.raises(UnreadableImageError, match=r"1\.png'.*expected \[H, W, 4\], got \[16, 20, 3\]"):
        probe(MeanColour())


@pytest.mark.parametrize("shape", [(1, 400_000), (400_000, 1)])
def test_a_long_image_takes_little_memory(shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it, resized, has 16 x 6,400,000 pixels, or at the usual size 16 times as many on each side."""
    image = np.zeros((*shape, 3), np.uint8)
    image.reshape(-1, 3)[199_960:200_040] = 9
    sizes = list[int]()

    def measured(image: np.ndarray, height: int, width: int) -> np.ndarray:
        sizes.append(height * width)
        return resized(image, height, width)

    monkeypatch.setattr(probe, "resized", measured)
    crop = central_crop(image, 14)
    assert crop.shape == (14, 14, 3)
    assert (crop == 9).all()
    assert sizes == [32 * 16 * 16]
