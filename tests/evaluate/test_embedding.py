"""Features of whole datasets: rows, names, what is skipped, and that nothing half-written is left."""

from __future__ import annotations

import csv
import io
import os
import shutil
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
    unescaped,
    write_shards,
)
from dinov2.evaluate import embed, embedding
from dinov2.evaluate.probe import central_view
from dinov2.models import VisionTransformer, ViTConfig, save_pretrained
from tests.data.files import encode, encode_array, noise
from tests.data.test_files import image_files

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


def test_names_of_every_kind_are_found_again(
    model: VisionTransformer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also those that are not UTF-8, in tables and in what is printed."""
    photos = tmp_path / os.fsdecode(b"ph\xf6tos")
    files = image_files(photos)
    (photos / files[3]).write_bytes(b"")
    save_pretrained(model, tmp_path / "model")
    output = tmp_path / os.fsdecode(b"f\xe9atures")
    command = ["embed", *map(str, (tmp_path / "model", photos, output)), "--device=cpu", "--num_workers=0"]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(rf"features of 32 numbers to '{tmp_path}/f\xe9atures'")
    embedded, skipped = (rows_of(output / name)[1:] for name in ("images.csv", "skipped.csv"))
    names = [unescaped(name) for name, *_ in embedded]
    assert sorted([*names, unescaped(skipped[0][0])]) == sorted(files)
    assert unescaped(skipped[0][0]) == files[3]
    features = torch.from_numpy(np.load(output / "features.npy"))
    with torch.no_grad():
        expected = torch.cat([model(central_view(noise(files.index(name)), VIEWS)[None]) for name in names])
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_every_terminal_shows_every_name(
    encoding: str, photos: Path, model: VisionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr("sys.stdout", terminal)
    save_pretrained(model, photos / "model")
    output = photos / "日本\udce9"
    assert main(["embed", *map(str, (photos / "model", photos, output)), "--device=cpu", "--num_workers=0"]) == 0
    terminal.flush()
    assert b"wrote 5 features" in terminal.buffer.getvalue()
    assert (output / "features.npy").exists()


def test_names_of_a_caller(model: VisionTransformer, tmp_path: Path) -> None:
    dataset = np.zeros((2, 16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match="names: expected one for each of 2 images, got 1"):
        embed(model, dataset, ["a"], tmp_path / "out", VIEWS, num_workers=0)
    with pytest.raises(ValueError, match="dataset: expected at least one image, got none"):
        embed(model, dataset[:0], [], tmp_path / "out", VIEWS, num_workers=0)
    embed(model, dataset, ["a\udce9", r"b\xe9"], tmp_path / "out", VIEWS, num_workers=0)
    assert rows_of(tmp_path / "out" / "images.csv")[1:] == [[r"a\xe9"], [r"b\xe9"]]


def test_the_file_of_features_is_that_of_numpy(model: VisionTransformer, photos: Path) -> None:
    """Its header is rewritten when images were skipped."""
    dataset = ImageFolder(photos)
    embed(model, dataset, dataset.paths, photos / "out", VIEWS, num_workers=0)
    file = io.BytesIO()
    np.save(file, np.load(photos / "out" / "features.npy"))
    assert (photos / "out" / "features.npy").read_bytes() == file.getvalue()


def untouched(*_: object) -> None:
    pytest.fail("an image was read before the output was checked")


def test_what_cannot_be_written_is_told_first(
    model: VisionTransformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "_batches", untouched)
    dataset = np.zeros((1, 16, 16, 3), np.uint8)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"output: expected a folder that can be written, got .*/file/out: "):
        embed(model, dataset, ["a"], tmp_path / "file" / "out", VIEWS)
    with pytest.raises(OSError, match="File name too long"):
        embed(model, dataset, ["a"], tmp_path / ("x" * 256), VIEWS)
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"output: expected \d+ bytes of free space for the features, got 100"):
        embed(model, dataset, ["a"], tmp_path / "out", VIEWS)
    monkeypatch.undo()
    monkeypatch.setattr(embedding, "_batches", untouched)

    def full(*_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"output: no space for \d+ bytes of features: No space left on device"):
        embed(model, dataset, ["a"], tmp_path / "out", VIEWS)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_longest_name_of_a_folder(model: VisionTransformer, tmp_path: Path) -> None:
    output = tmp_path / ("x" * 255)
    embed(model, np.zeros((1, 16, 16, 3), np.uint8), ["a"], output, VIEWS, num_workers=0)
    assert np.load(output / "features.npy").shape == (1, 32)


def test_features_are_kept_if_only_their_place_is_taken(model: VisionTransformer, tmp_path: Path) -> None:
    def take(_: int) -> None:
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "file").touch()

    dataset = np.zeros((3, 16, 16, 3), np.uint8)
    with pytest.raises(OSError, match=r"out cannot be written any more .*; the features are in (.*)$") as caught:
        embed(model, dataset, ["a", "b", "c"], tmp_path / "out", VIEWS, num_workers=0, progress=take)
    kept = Path(str(caught.value).rpartition("the features are in ")[2])
    assert np.load(kept / "features.npy").shape == (3, 32)
    assert rows_of(kept / "images.csv") == [["image"], ["a"], ["b"], ["c"]]
