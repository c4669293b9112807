"""Images, their random views and the masks: everything between files and the training step."""

from dinov2.data.augmentation import AugmentationConfig, MultiCropAugmentation
from dinov2.data.batch import Batch, RawBatch, RawCrops, finish, finishes_crops
from dinov2.data.decoding import UnreadableImageError, decode_image, read_image
from dinov2.data.decoding_reduced import Reduced, decode_reduced
from dinov2.data.files import BrokenLinkWarning, escaped, unescaped
from dinov2.data.folders import SourceWarning
from dinov2.data.loader import DataConfig, ImageDataset, UnreadableDatasetError, UnreadableImageWarning, batches
from dinov2.data.masking import MaskConfig, batch_masks, mask_counts, sample_block_masks
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
