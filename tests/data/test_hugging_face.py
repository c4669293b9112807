"""Datasets of Hugging Face as images."""

import sys
from pathlib import Path

import datasets
import numpy as np
import pytest

from dinov2.data import AugmentationConfig, DataConfig, HuggingFaceImages, UnreadableImageError, open_dataset
from tests.data.files import encode, noise


def some_images(number: int = 4) -> datasets.Dataset:
    """Rows of bytes: the first five sixths of a file in the last."""
    files = [encode(noise(i)) for i in range(number)]
    files[-1] = files[-1][: len(files[-1]) * 5 // 6]
    rows = {"image": [{"bytes": file, "path": None} for file in files], "label": list(range(number))}
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


def test_images_are_decoded_from_their_bytes() -> None:
    images = HuggingFaceImages(some_images())
    assert len(images) == 4
    for i in range(3):
        np.testing.assert_array_equal(images[i], noise(i))
    with pytest.raises(UnreadableImageError, match="cannot read image 3 of the dataset's column 'image': "):
        images[3]


def test_paths_bytes_and_nothing(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(encode(noise(0)))
    dataset = datasets.Dataset.from_dict({"photo": [str(path), str(tmp_path / "lost.png"), None]})
    images = HuggingFaceImages(dataset.cast_column("photo", datasets.Image()), "photo")
    np.testing.assert_array_equal(images[0], noise(0))
    with pytest.raises(UnreadableImageError, match=r"cannot read image '.*lost\.png'"):
        images[1]
    with pytest.raises(UnreadableImageError, match="cannot read image 2 of the dataset's column 'photo': it is null"):
        images[2]
    images = HuggingFaceImages(datasets.Dataset.from_dict({"jpg": [encode(noise(5))]}), "jpg")
    np.testing.assert_array_equal(images[0], noise(5))


def test_a_transformed_dataset_is_read_as_it_is_stored() -> None:
    images = HuggingFaceImages(some_images().with_format("torch").select([2, 1]))
    np.testing.assert_array_equal(images[0], noise(2))


def test_a_saved_dataset_is_recognised(tmp_path: Path) -> None:
    dataset = some_images()
    dataset.save_to_disk(tmp_path / "saved")
    images = open_dataset(DataConfig(root=tmp_path / "saved"))
    assert isinstance(images, HuggingFaceImages)
    np.testing.assert_array_equal(images[1], noise(1))
    datasets.DatasetDict({"train": dataset, "test": dataset}).save_to_disk(tmp_path / "splits")
    with pytest.raises(ValueError, match=r"expected one split \(a folder of its own on disk\).*several: train, test"):
        open_dataset(DataConfig(root=tmp_path / "splits"))
    np.testing.assert_array_equal(open_dataset(DataConfig(root=tmp_path / "splits" / "train"))[1], noise(1))


def test_channels_are_those_of_the_configuration(tmp_path: Path) -> None:
    some_images().save_to_disk(tmp_path)
    config = DataConfig(root=tmp_path, augmentation=AugmentationConfig(mean=(0.5,), std=(0.2,)))
    assert open_dataset(config)[0].shape == (20, 30, 1)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"column: expected a column of images or bytes \(image\), got 'label'"):
        HuggingFaceImages(some_images(), "label")
    with pytest.raises(ValueError, match=r"column: expected .*there is none.* got 'image'; the columns are label"):
        HuggingFaceImages(some_images().remove_columns("image"))
    with pytest.raises(ValueError, match=r"dataset: expected a datasets\.Dataset, got IterableDataset"):
        HuggingFaceImages(some_images().to_iterable_dataset())


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"HuggingFaceImages needs the package 'datasets'.*dinov2-kernels\[hf\]"):
        HuggingFaceImages(None)
