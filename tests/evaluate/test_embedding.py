"""Features of whole datasets: rows, names, what is skipped, and that nothing half-written is left."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from dinov2.cli import main
from dinov2.data import (
    AugmentationConfig,
    ImageFolder,
    ShardImage,
    TarShards,
    UnreadableDatasetError,
    image_names,
    write_shards,
)
from dinov2.evaluate import embed
from dinov2.evaluate.probe import central_view
from dinov2.models import VisionTransformer, ViTConfig, save_pretrained
from tests.data.files import encode, encode_array, noise

VIEWS = AugmentationConfig(global_size=16)


@pytest.fixture(scope="module")
def model() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(
        ViTConfig(img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, init_values=1.0)
    ).eval()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Seven images, the third and the last of which are damaged."""
    for i in range(7):
        (tmp_path / f"{i}.png").write_bytes(encode(noise(i)) if i not in (2, 6) else b"")
    (tmp_path / "0.png").rename(tmp_path / "a, b.png")  # the last by its name
    return tmp_path


def rows_of(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("workers", [0, 2])
def test_every_row_is_the_feature_of_its_image(model: VisionTransformer, photos: Path, workers: int) -> None:
    told: list[int] = []
    dataset, output = ImageFolder(photos), photos.parent / f"features{workers}"
    written = embed(
        model, dataset, dataset.paths, output, VIEWS, batch_size=3, num_workers=workers, progress=told.append
    )
    assert (written.images, written.width, written.skipped) == (5, 32, 2)
    assert told == [3, 6, 7]
    features = np.load(output / "features.npy")
    assert (features.shape, features.dtype) == ((5, 32), np.float32)
    assert rows_of(output / "images.csv") == [["image"], ["1.png"], ["3.png"], ["4.png"], ["5.png"], ["a, b.png"]]
    readable = [i for i, name in enumerate(dataset.paths) if name not in ("2.png", "6.png")]
    with torch.no_grad():
        expected = torch.cat([model(central_view(dataset[i], VIEWS)[None]) for i in readable])
    torch.testing.assert_close(torch.from_numpy(features), expected, atol=1e-5, rtol=1e-5)
    header, *skipped = rows_of(output / "skipped.csv")
    assert header == ["image", "reason"]
    assert [name for name, _ in skipped] == ["2.png", "6.png"]
    assert "cannot read image" in skipped[0][1]


def test_a_batch_without_a_readable_image(model: VisionTransformer, photos: Path) -> None:
    dataset = ImageFolder(photos)
    written = embed(model, dataset, dataset.paths, photos / "out", VIEWS, batch_size=1, num_workers=0)
    assert (written.images, written.skipped) == (5, 2)


def test_names_of_shards(tmp_path: Path) -> None:
    write_shards([ShardImage(f"key{i}", encode(noise(i))) for i in range(5)], tmp_path, shard_size=3)
    assert image_names(TarShards(tmp_path)) == [f"0000{i // 3}/key{i}" for i in range(5)]
    assert image_names(np.zeros((3, 4, 4, 3), np.uint8)) == ["0", "1", "2"]


def test_nothing_is_left_of_what_failed(model: VisionTransformer, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "1.png").write_bytes(b"")
    dataset = ImageFolder(tmp_path / "photos")
    with pytest.raises(UnreadableDatasetError, match=r"none of 1 images can be read; cannot read image '.*1\.png'"):
        embed(model, dataset, dataset.paths, tmp_path / "features", VIEWS, num_workers=0)
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


@pytest.mark.parametrize(
    ("augmentation", "message"),
    [
        (AugmentationConfig(global_size=20), "size: expected a multiple of 8, the model's patch size, got 20"),
        (AugmentationConfig(global_size=16, mean=(0.5,), std=(0.2,)), "mean and std: expected 3 values, .* got 1"),
    ],
)
def test_what_does_not_fit(model: VisionTransformer, augmentation: AugmentationConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        embed(model, np.zeros((1, 8, 8, 3), np.uint8), ["0"], Path("nowhere"), augmentation)


def test_command(model: VisionTransformer, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_pretrained(model, photos / "model")
    command = ["embed", str(photos / "model"), str(photos), "--device=cpu", "--num-workers=0"]
    exact, half = photos / "exact", photos / "half"
    assert main([*command, str(exact)]) == main([*command, str(half), "--precision=bf16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [f"wrote 5 features of 32 numbers to {exact}", f"2 images cannot be read: {exact}/skipped.csv"]
    first, second = (np.load(folder / "features.npy") for folder in (exact, half))
    assert 0 < np.abs(first - second).max() < 0.1
    assert main([*command, str(exact)]) == 1
    assert capsys.readouterr().err == f"dinov2 embed: output: expected a new or an empty folder, got {exact}\n"


def test_command_for_other_channels(tmp_path: Path) -> None:
    config = ViTConfig(img_size=16, patch_size=8, in_chans=2, embed_dim=32, depth=1, num_heads=2)
    save_pretrained(VisionTransformer(config), tmp_path / "model")
    (tmp_path / "tiles").mkdir()
    (tmp_path / "tiles" / "1.npy").write_bytes(encode_array(noise(1, channels=2)))
    command = ["embed", *(str(tmp_path / name) for name in ("model", "tiles", "out")), "--device=cpu"]
    assert main([*command, "--num-workers=0"]) == 1
    assert main([*command, "--num-workers=0", "--mean", "0.1", "0.2", "--std", "0.1", "0.2"]) == 0
    assert np.load(tmp_path / "out" / "features.npy").shape == (1, 32)
