"""Images, their random views and the masks: everything between files and the training step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dinov2.data.config import AugmentationConfig, DataConfig, MaskConfig
from dinov2.lazily import names_from

if TYPE_CHECKING:
    from dinov2.data.augmentation import MultiCropAugmentation
    from dinov2.data.batch import Batch, RawBatch, RawCrops, finish, finishes_crops
    from dinov2.data.decoding import UnreadableImageError, decode_image, read_image
    from dinov2.data.decoding_reduced import Reduced, decode_reduced
    from dinov2.data.files import BrokenLinkWarning, escaped, unescaped
    from dinov2.data.folders import SourceWarning
    from dinov2.data.loader import ImageDataset, UnreadableDatasetError, UnreadableImageWarning, batches
    from dinov2.data.masking import batch_masks, mask_counts, sample_block_masks
    from dinov2.data.multichannel import normalize
    from dinov2.data.photographs import BundledPhotographs
    from dinov2.data.shards import (
        DamagedTarsError,
        DamagedTarWarning,
        ShardImage,
        ShardReport,
        TarShards,
        index_shards,
        write_shard,
        write_shards,
    )
    from dinov2.data.sources import HuggingFaceImages, ImageFolder, image_names, open_dataset
    from dinov2.data.workers import LostWorkerError, lost_workers_explained
else:
    __getattr__ = names_from(
        __name__,
        {
            "augmentation": ("MultiCropAugmentation",),
            "batch": ("Batch", "RawBatch", "RawCrops", "finish", "finishes_crops"),
            "decoding": ("UnreadableImageError", "decode_image", "read_image"),
            "decoding_reduced": ("Reduced", "decode_reduced"),
            "files": ("BrokenLinkWarning", "escaped", "unescaped"),
            "folders": ("SourceWarning",),
            "loader": ("ImageDataset", "UnreadableDatasetError", "UnreadableImageWarning", "batches"),
            "masking": ("batch_masks", "mask_counts", "sample_block_masks"),
            "multichannel": ("normalize",),
            "photographs": ("BundledPhotographs",),
            "shards": (
                "DamagedTarsError",
                "DamagedTarWarning",
                "ShardImage",
                "ShardReport",
                "TarShards",
                "index_shards",
                "write_shard",
                "write_shards",
            ),
            "sources": ("HuggingFaceImages", "ImageFolder", "image_names", "open_dataset"),
            "workers": ("LostWorkerError", "lost_workers_explained"),
        },
    )

__all__ = [
    "AugmentationConfig",
    "Batch",
    "BrokenLinkWarning",
    "BundledPhotographs",
    "DamagedTarWarning",
    "DamagedTarsError",
    "DataConfig",
    "HuggingFaceImages",
    "ImageDataset",
    "ImageFolder",
    "LostWorkerError",
    "MaskConfig",
    "MultiCropAugmentation",
    "RawBatch",
    "RawCrops",
    "Reduced",
    "ShardImage",
    "ShardReport",
    "SourceWarning",
    "TarShards",
    "UnreadableDatasetError",
    "UnreadableImageError",
    "UnreadableImageWarning",
    "batch_masks",
    "batches",
    "decode_image",
    "decode_reduced",
    "escaped",
    "finish",
    "finishes_crops",
    "image_names",
    "index_shards",
    "lost_workers_explained",
    "mask_counts",
    "normalize",
    "open_dataset",
    "read_image",
    "sample_block_masks",
    "unescaped",
    "write_shard",
    "write_shards",
]
