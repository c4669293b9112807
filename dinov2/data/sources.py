"""What ``data.root`` may name, recognised by what is there."""

from __future__ import annotations

import os
from pathlib import Path

from dinov2.data.hugging_face import PURPOSE, HuggingFaceImages
from dinov2.data.image_folder import ImageFolder
from dinov2.data.loader import DataConfig, ImageDataset
from dinov2.data.photographs import BundledPhotographs
from dinov2.data.shards import TarShards
from dinov2.data.shards.storage import Storage
from dinov2_kernels._extras import require

SAVED_DATASET = frozenset({"state", "dataset_dict"})
"""JSON files that ``save_to_disk`` leaves beside the data of one split, and beside the folders of several."""


def open_dataset(config: DataConfig) -> ImageDataset:
    """The images that ``config.root`` names, of as many channels as the augmentation has.

    - None: :class:`BundledPhotographs`.
    - A folder or URL that ``save_to_disk`` of Hugging Face's ``datasets`` has written: :class:`HuggingFaceImages`.
    - One with tars, in itself or in ``images``, or any other URL: :class:`TarShards`.
    - Any other folder: :class:`ImageFolder`.

    Raises:
        ValueError: there is nothing of this kind.
        ImportError: what is there needs an extra that is not installed; the message names it.
    """
    root, channels = config.root, config.augmentation.channels
    if root is None:
        if channels != 3:
            raise ValueError(f"root must be given for images of {channels} channels: the bundled photographs have 3")
        return BundledPhotographs()
    is_url = "://" in os.fspath(root)
    if is_url or Path(root).is_dir():
        storage = Storage(root)
        if not SAVED_DATASET.isdisjoint(storage.files("", ".json")):
            datasets = require("datasets", extra="hf", purpose=PURPOSE)
            return HuggingFaceImages(datasets.load_from_disk(os.fspath(root)), channels=channels)
        if is_url or storage.shards() or storage.indices():
            return TarShards(root, channels)
    return ImageFolder(root, channels)


def image_names(dataset: ImageDataset) -> list[str]:
    """A name for each image: its path in a folder, ``SHARD/KEY`` in tars, a photograph's name; elsewhere its number."""
    if isinstance(dataset, ImageFolder):
        return dataset.paths
    if isinstance(dataset, TarShards):
        return dataset.names()
    if isinstance(dataset, BundledPhotographs):
        return list(dataset.names)
    return [str(index) for index in range(len(dataset))]
