"""Datasets of Hugging Face's ``datasets`` as images."""

from __future__ import annotations

from typing import Any

from dinov2.data.decoding import Pixels, UnreadableImageError, decode_image, read_image
from dinov2_kernels._extras import require

PURPOSE = "HuggingFaceImages"


class HuggingFaceImages:
    """One column of a ``datasets.Dataset`` as images; the other columns are never touched.

    A map-style dataset: ``len(images)``, ``images[i]`` -> uint8 RGB ``[H, W, 3]``, or as
    :func:`~dinov2.data.read_image` says for other numbers of channels. Files are decoded as everywhere in this package,
    from the bytes in the dataset or from the path that it names.

    Args:
        dataset: one split, as ``load_dataset(..., split="train")`` or ``load_from_disk`` returns it.
        column: its name; a column of images, or of the bytes of image files.
        channels: of every image.

    Raises:
        ValueError: the dataset holds several splits or is an iterable one, or there is no such column.
        ImportError: ``datasets`` is missing (extra ``hf``).
    """

    def __init__(self, dataset: Any, column: str = "image", channels: int = 3) -> None:
        datasets = require("datasets", extra="hf", purpose=PURPOSE)
        if isinstance(dataset, datasets.DatasetDict):
            raise ValueError(
                f"dataset must be one split (a folder of its own on disk), but holds several: {', '.join(dataset)}"
            )
        if not isinstance(dataset, datasets.Dataset):
            raise ValueError(f"dataset must be a datasets.Dataset, but is a {type(dataset).__name__}")
        of_bytes = (datasets.Value("binary"), datasets.Value("large_binary"))
        of_files = {
            name
            for name, feature in dataset.features.items()
            if isinstance(feature, datasets.Image) or feature in of_bytes
        }
        if column not in of_files:
            raise ValueError(
                f"column must be one of images or of bytes, but is {column!r}; of the columns"
                f" {', '.join(dataset.column_names)} these are: {', '.join(sorted(of_files)) or 'none'}"
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
            UnreadableImageError: there is none in this row, or it cannot be decoded.
        """
        value = self._rows[index][self.column]
        name = f"{index} of the dataset's column {self.column!r}"
        content, path = (value.get("bytes"), value.get("path")) if isinstance(value, dict) else (value, None)
        if content is not None:
            return decode_image(content, name, self.channels)
        if path is not None:
            return read_image(path, self.channels)
        raise UnreadableImageError(f"cannot read image {name}: it is null")
