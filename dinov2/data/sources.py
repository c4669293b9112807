"""The sources that ``data.root`` may name: folders of images, tar shards and Hugging Face datasets."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dinov2.data.config import DataConfig
from dinov2.data.decoding import Pixels, UnreadableImageError, decode_image, read_image
from dinov2.data.files import escaped, quoted
from dinov2.data.folders import images_among, is_of_tars, located, warn_of_left_out
from dinov2.data.formats import image_extensions
from dinov2.data.photographs import BundledPhotographs
from dinov2.data.shards import TarShards
from dinov2.data.shards.storage import Storage
from dinov2.extras import require

if TYPE_CHECKING:
    from dinov2.data.loader import ImageDataset

SAVED_DATASET = frozenset({"state", "dataset_dict"})
"""JSON files of ``save_to_disk``: ``state`` marks a single split, ``dataset_dict`` a folder of splits."""
PURPOSE = "HuggingFaceImages"


def open_dataset(config: DataConfig) -> ImageDataset:
    """Open the images that ``config.root`` names, with the number of channels of the augmentation.

    - None: :class:`BundledPhotographs`.
    - A folder or URL that ``save_to_disk`` of Hugging Face's ``datasets`` has written: :class:`HuggingFaceImages`.
    - A folder or URL that a curation has written: the :class:`TarShards` of its final set.
    - A folder or URL of tars, directly or in ``images``: :class:`TarShards`.
    - Any other folder: :class:`ImageFolder`, also if tars without an index lie beside the images.

    Raises:
        ValueError: the root holds no such images, or a curation that has not ended.
        ImportError: the source needs an extra that is not installed; the message names it.

    Warns:
        SourceWarning: the final set of a curation is read, or something under the root is left out.
    """
    root, channels = config.root, config.augmentation.channels
    if root is None:
        if channels != 3:
            raise ValueError(
                f"data.root: expected a source of images with {channels} channels, got None, which takes the bundled"
                " photographs of 3 channels"
            )
        return BundledPhotographs()
    is_url = "://" in os.fspath(root)
    if is_url or Path(root).is_dir():
        root = located(os.fspath(root), "data.root")
        storage = Storage(root)
        if not SAVED_DATASET.isdisjoint(storage.files("", ".json")):
            datasets = require("datasets", extra="hf", purpose=PURPOSE)
            return HuggingFaceImages(datasets.load_from_disk(root), channels=channels)
        has_tars = bool(storage.shards() or storage.indices())
        if is_url and not has_tars and (images := images_among(storage.paths(), storage).images):
            raise ValueError(
                f"root: expected tar shards in a URL, got {quoted(root)}, which has {len(images)} image files"
            )
        if is_url or (has_tars and is_of_tars(storage, root, storage.paths())):
            return TarShards(root, channels)  # a URL is not searched for images beside tars: that may take minutes
    return ImageFolder(root, channels)


def check_folder(root: str | os.PathLike[str]) -> None:
    """Raise a ValueError unless there is a folder."""
    if not Path(root).is_dir():
        raise ValueError(f"root: expected a folder of images, got {quoted(root)}, which is not a folder")


def image_names(dataset: ImageDataset) -> list[str]:
    r"""A name for each image: its path in a folder, ``SHARD/KEY`` in tars, a photograph's name, or else its number.

    If a name is not UTF-8, its other bytes are ``\xNN``; :func:`~dinov2.data.unescaped` returns the name of the file.
    """
    if isinstance(dataset, ImageFolder):
        return list(map(escaped, dataset.paths))
    if isinstance(dataset, TarShards):
        return dataset.names()
    if isinstance(dataset, BundledPhotographs):
        return list(dataset.names)
    return [str(index) for index in range(len(dataset))]


class ImageFolder:
    """All images under a folder, in sorted order of their relative paths.

    A map-style dataset: ``len(folder)``, ``folder[i]`` -> uint8 RGB ``[H, W, 3]``, or as
    :func:`read_image` says for other numbers of channels; ``folder.paths[i]``. Files count by the ending of an image,
    or else by their content. Hidden files and folders (a name with a dot in front), folders of systems such as
    ``@eaDir``, and outputs of this library are left out. A :class:`~dinov2.data.SourceWarning` counts all that is left
    out, by ending. Links to folders are followed, and each folder counts once, however many links lead to it. Links to
    files count as images. A :class:`~dinov2.data.BrokenLinkWarning` names links that lead nowhere.

    Args:
        root: the folder.
        channels: number of channels of every image.

    Raises:
        ValueError: ``root`` is not a folder, or there is no image under it.
        OSError: a folder under it cannot be listed.
    """

    def __init__(self, root: str | os.PathLike[str], channels: int = 3) -> None:
        self.root = Path(root)
        self.channels = channels
        check_folder(root)
        storage = Storage(self.root)
        contents = images_among(storage.paths(), storage)
        self.paths = contents.images
        if not self.paths:
            left_out = f"; left out {contents}" if contents.left_out else ""
            raise ValueError(
                f"root: expected a folder with images ({', '.join(sorted(image_extensions()))}) at any depth, got"
                f" {quoted(root)}, which has none{left_out}"
            )
        warn_of_left_out(quoted(root), contents)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Pixels:
        """Image ``index``, ``[H, W, channels]``.

        Raises:
            UnreadableImageError: the file cannot be decoded; the message names it.
        """
        return read_image(self.root / self.paths[index], self.channels)


class HuggingFaceImages:
    """One column of a ``datasets.Dataset`` as images; the other columns are not read.

    A map-style dataset: ``len(images)``, ``images[i]`` -> uint8 RGB ``[H, W, 3]``, or as
    :func:`~dinov2.data.read_image` says for other numbers of channels. :func:`~dinov2.data.read_image` decodes the
    bytes in the dataset or the file that it names.

    Args:
        dataset: one split, as ``load_dataset(..., split="train")`` or ``load_from_disk`` returns it.
        column: name of a column of images, or of the bytes of image files.
        channels: number of channels of every image.

    Raises:
        ValueError: the dataset has several splits, is iterable only, or has no such column.
        ImportError: ``datasets`` is missing (extra ``hf``).
    """

    def __init__(self, dataset: Any, column: str = "image", channels: int = 3) -> None:
        datasets = require("datasets", extra="hf", purpose=PURPOSE)
        if isinstance(dataset, datasets.DatasetDict):
            raise ValueError(
                f"dataset: expected one split (a folder of its own on disk), got several: {', '.join(dataset)}"
            )
        if not isinstance(dataset, datasets.Dataset):
            raise ValueError(f"dataset: expected a datasets.Dataset, got {type(dataset).__name__}")
        of_bytes = (datasets.Value("binary"), datasets.Value("large_binary"))
        of_files = {
            name
            for name, feature in dataset.features.items()
            if isinstance(feature, datasets.Image) or feature in of_bytes
        }
        if column not in of_files:
            raise ValueError(
                f"column: expected a column of images or bytes ({', '.join(sorted(of_files)) or 'there is none'}),"
                f" got {column!r}; the columns are {', '.join(dataset.column_names)}"
            )
        self.column = column
        self.channels = channels
        self._rows = dataset.with_format(None).select_columns([column])
        if isinstance(dataset.features[column], datasets.Image):
            self._rows = self._rows.cast_column(column, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Pixels:
        """Image ``index``, ``[H, W, channels]``.

        Raises:
            UnreadableImageError: the row has no image, or it cannot be decoded.
        """
        value = self._rows[index][self.column]
        name = f"{index} of the dataset's column {self.column!r}"
        content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if content is not None:
            return decode_image(content, name, self.channels)
        if path is not None:
            return read_image(path, self.channels)
        raise UnreadableImageError(f"cannot read image {name}: it is null")
