"""What data.root may name."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from dinov2.cli.pretrain import parse
from dinov2.data import BundledPhotographs, DataConfig, ImageFolder, TarShards, open_dataset, write_shards
from tests.data.files import encode, noise, shard_images, write_tar


@pytest.fixture
def memory() -> Iterator[str]:
    """A URL whose contents are forgotten afterwards."""
    yield "memory://sources"
    filesystem = fsspec.filesystem("memory")
    if filesystem.exists("/sources"):
        filesystem.rm("/sources", recursive=True)


def test_nothing_is_the_bundled_photographs() -> None:
    assert isinstance(open_dataset(DataConfig()), BundledPhotographs)


def test_folders(tmp_path: Path) -> None:
    (tmp_path / "image.png").write_bytes(encode(noise(0)))
    for root in (tmp_path, str(tmp_path)):
        assert isinstance(open_dataset(DataConfig(root=root)), ImageFolder)


def test_shards(tmp_path: Path, memory: str) -> None:
    for root in (tmp_path, str(tmp_path), memory, f"file://{tmp_path}"):
        if root in (tmp_path, memory):
            write_shards(shard_images(2), root)
        images = open_dataset(DataConfig(root=root))
        assert isinstance(images, TarShards)
        np.testing.assert_array_equal(images[1], noise(1))


def test_tars_without_an_index(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("a.png", encode(noise(0)))])
    with pytest.raises(
        ValueError, match=rf"lacks the indices of 1 of 1 tars: a\.tar; write them with: dinov2 index {tmp_path}$"
    ):
        open_dataset(DataConfig(root=tmp_path))


def test_an_index_without_tars(tmp_path: Path) -> None:
    write_shards(shard_images(1), tmp_path)
    (tmp_path / "images" / "00000.tar").unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of 1 tars: 00000\.tar"):
        open_dataset(DataConfig(root=tmp_path))


def test_nothing_of_any_kind(tmp_path: Path, memory: str) -> None:
    with pytest.raises(ValueError, match="root: expected a folder with images"):
        open_dataset(DataConfig(root=tmp_path))
    with pytest.raises(ValueError, match="root: expected a folder of images, got 'nowhere', which is not a folder"):
        open_dataset(DataConfig(root="nowhere"))
    with pytest.raises(ValueError, match=f"root: expected tar shards .*, got '{memory}', which has none"):
        open_dataset(DataConfig(root=memory))
    with pytest.raises(ValueError, match="Protocol not known: nosuch"):
        open_dataset(DataConfig(root="nosuch://place"))


def test_an_unknown_protocol() -> None:
    with pytest.raises(ValueError, match=r"^data\.root: Protocol not known: nosuch$"):
        open_dataset(DataConfig(root="nosuch://images"))


def test_an_empty_name_is_not_the_working_folder() -> None:
    with pytest.raises(ValueError, match=r"^data\.root: expected a folder or URL, or None, got ''$"):
        DataConfig(root="")


def test_command_line() -> None:
    def root(*options: str) -> object:
        return parse("vitl14", options).config.data.root

    assert root() == Path("images")
    assert str(root("--data.root", "my/photos")) == "my/photos"
    assert root("--data.root", "s3://bucket/pool") == "s3://bucket/pool"
    assert root("--data.root", "None") is None
    mean = ("0.1", "0.2")
    options = ("--data.augmentation.mean", *mean, "--data.augmentation.std", *mean, "--vit.in_chans", "2")
    augmentation = parse("vits14_small_data", options).config.data.augmentation
    assert augmentation.channels == 2
    assert augmentation.colour("hue") == 0
