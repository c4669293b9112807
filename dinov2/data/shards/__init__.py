"""Images in tar shards, each with an index of its images: ``images/00042.tar`` and ``index/00042.parquet``."""

from dinov2.data.shards.dataset import TarShards
from dinov2.data.shards.indexing import DamagedTarsError, DamagedTarWarning, index_shards
from dinov2.data.shards.writing import ShardImage, ShardReport, write_shard, write_shards

__all__ = [
    "DamagedTarWarning",
    "DamagedTarsError",
    "ShardImage",
    "ShardReport",
    "TarShards",
    "index_shards",
    "write_shard",
    "write_shards",
]
