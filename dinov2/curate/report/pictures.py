"""Small pictures of a pool's images for the page."""

from __future__ import annotations

import base64
import io

from PIL import Image

from dinov2.curate.pool import Pool, ShardBytes
from dinov2.curate.screen.faces import Box, blur_faces
from dinov2.data.decoding import Pixels, UnreadableImageError, decode_image
from dinov2.data.shards.storage import Storage
from dinov2_kernels._extras import require

SIDE = 112
EMPTY = "data:image/gif;base64,R0lGODlhAQABAAAAACH5BAEKAAEALAAAAAABAAEAAAICTAEAOw=="


class Pictures:
    """The images of a pool as data URLs.

    Args:
        pool: images.
    """

    def __init__(self, pool: Pool) -> None:
        self.pool = pool
        self._files: dict[str, ShardBytes] = {}
        self._ends: list[tuple[int, str]] = []  # first position behind each shard

    def at(self, shard: str, row: int, faces: list[Box] | None = None) -> str:
        """An image, with the faces blurred that are given; an empty picture where it cannot be read."""
        if shard not in self._files:
            self._files[shard] = self.pool.open_images(shard)
        try:
            pixels = decode_image(self._files[shard][row], "")
        except UnreadableImageError:
            return EMPTY
        return data_url(blur_faces(pixels, faces) if faces else pixels)

    def at_position(self, position: int) -> str:
        """An image by its number in all shards."""
        if not self._ends:
            parquet, end = require("pyarrow.parquet", extra="curate", purpose="curation"), 0
            storage = Storage(self.pool.images)
            for shard, path in storage.indices().items():
                with storage.filesystem.open(path, "rb") as file:
                    end += parquet.ParquetFile(file).metadata.num_rows
                self._ends.append((end, shard))
        start = 0
        for end, shard in self._ends:
            if position < end:
                return self.at(shard, position - start)
            start = end
        return EMPTY


def data_url(pixels: Pixels) -> str:
    """A small JPEG of a uint8 image [H, W, 3], as a data URL."""
    image, file = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((SIDE, SIDE))
    image.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
