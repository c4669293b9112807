"""Images, their random views and the masks: everything between files and the training step."""

from dinov2.data.augmentation import AugmentationConfig, MultiCropAugmentation, normalize
from dinov2.data.decoding import UnreadableImageError, decode_image, read_image
from dinov2.data.hugging_face import HuggingFaceImages
from dinov2.data.image_folder import ImageFolder
from dinov2.data.loader import Batch, DataConfig, ImageDataset, WorkerError, batches, lost_workers_named
from dinov2.data.masking import MaskConfig, batch_masks, mask_counts, sample_block_masks
from dinov2.data.patches import Patches, cut_patches
from dinov2.data.photographs import BundledPhotographs
from dinov2.data.shards import ShardImage, ShardReport, TarShards, index_shards, write_shard, write_shards
from dinov2.data.sources import open_dataset

__all__ = [
    "AugmentationConfig",
    "Batch",
    "BundledPhotographs",
    "DataConfig",
    "HuggingFaceImages",
    "ImageDataset",
    "ImageFolder",
    "MaskConfig",
    "MultiCropAugmentation",
    "Patches",
    "ShardImage",
    "ShardReport",
    "TarShards",
    "UnreadableImageError",
    "WorkerError",
    "batch_masks",
    "batches",
    "cut_patches",
    "decode_image",
    "index_shards",
    "lost_workers_named",
    "mask_counts",
    "normalize",
    "open_dataset",
    "read_image",
    "sample_block_masks",
    "write_shard",
    "write_shards",
]
