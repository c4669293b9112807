"""Training on data in which nearly everything is wrong: no single image ends a run, and every way of reading agrees."""

import warnings
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from dinov2.data import AugmentationConfig, DataConfig, ImageDataset, batches, index_shards, open_dataset
from tests.data.files import encode, encode_array, noise, write_tar
from tests.data.test_loader import assert_equal

GOOD = 9
VIEWS = AugmentationConfig(global_size=16, local_size=8, local_crops=2)


def huge_png() -> bytes:
    """A file of some hundred bytes whose header claims 60,000 x 60,000 pixels."""
    content = bytearray(encode(noise(0)))
    content[16:24] = (60_000).to_bytes(4, "big") * 2
    return bytes(content)


def files() -> dict[str, bytes]:
    """Nine good images, two of them with a wrong extension; seven bad ones."""
    whole = encode(noise(0, 60, 60), "JPEG")
    return {
        "0.png": encode(noise(0)),
        "1.jpg": encode(noise(1), "PNG"),  # told by its content
        "2.npy": encode(noise(2), "WEBP"),
        "3.bmp": encode(noise(3), "BMP"),
        "4.tiff": encode(noise(4), "TIFF"),
        "5.gif": encode(noise(5), "GIF"),
        "6.npy": encode_array(noise(6)),
        "7.jpeg": encode(noise(7), "JPEG"),
        "8.PNG": encode(noise(8)),
        "a.jpg": b"",
        "b.jpg": whole[: len(whole) // 2],
        "c.png": huge_png(),
        "d.png": b"<html>404</html>",
        "e.npy": encode_array(np.zeros((5, 5))),
        "f.tif": encode(noise(9), "TIFF")[:200],
        "g.webp": bytes(500),
    }


@pytest.fixture(params=["folder", "shards"])
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> ImageDataset:
    """All files in a folder, or in two plain tars, the second of which is cut off after it was indexed."""
    if request.param == "folder":
        for name, content in files().items():
            (tmp_path / name).write_bytes(content)
        return open_dataset(DataConfig(root=tmp_path))
    for name in ("0", "1"):
        write_tar(tmp_path / f"{name}.tar", files().items())
    report = index_shards(tmp_path)
    assert report.skipped == {"no image by its content": 10}  # what the header shows is not even in the index
    half = (tmp_path / "1.tar").read_bytes()[:20_000]
    (tmp_path / "1.tar").write_bytes(half)
    return open_dataset(DataConfig(root=tmp_path))


def draw(dataset: ImageDataset, number: int, workers: int = 0, **options: int) -> list:
    config = DataConfig(augmentation=VIEWS, num_workers=workers)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(islice(batches(dataset, config, **{"batch_size": 5, "patch_size": 4, "seed": 3} | options), number))


@pytest.mark.filterwarnings("ignore")
def test_a_run_goes_on(dataset: ImageDataset) -> None:
    with pytest.warns(
        UserWarning, match=rf"skipped unreadable images, \d+ of {len(dataset)} so far; cannot read image "
    ):
        found = list(islice(batches(dataset, DataConfig(augmentation=VIEWS), batch_size=5, patch_size=4, seed=3), 12))
    assert all(batch["global_crops"].isfinite().all() for batch in found)
    assert_equal(draw(dataset, 12), found)


def test_resumed_in_the_middle_of_a_pass(dataset: ImageDataset) -> None:
    whole = draw(dataset, 12)
    for start in (1, 2, 3, 7):
        assert_equal(draw(dataset, 12 - start, start_step=start), whole[start:])
    assert_equal(draw(dataset, 5, workers=2, start_step=7), whole[7:])


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_agree_on_substitutes(dataset: ImageDataset, world_size: int) -> None:
    (alone,) = draw(dataset, 1, batch_size=6)
    shared = [
        draw(dataset, 1, batch_size=6 // world_size, rank=rank, world_size=world_size)[0] for rank in range(world_size)
    ]
    parts = [batch["global_crops"].unflatten(0, (2, -1)) for batch in shared]
    for rank, part in enumerate(parts):
        each = 6 // world_size
        expected = alone["global_crops"].unflatten(0, (2, -1))[:, rank * each : (rank + 1) * each]
        assert (part == expected).all()
