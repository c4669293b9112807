"""Images, their random views and the masks: everything between files and the training step."""

from dinov2.data.augmentation import AugmentationConfig, MultiCropAugmentation, normalize
from dinov2.data.image_folder import ImageFolder, UnreadableImageError, read_image
from dinov2.data.loader import Batch, DataConfig, ImageDataset, batches, open_dataset
from dinov2.data.masking import MaskConfig, batch_masks, mask_counts, sample_block_masks
from dinov2.data.patches import Patches, cut_patches
from dinov2.data.photographs import BundledPhotographs

__all__ = [
    "AugmentationConfig",
    "Batch",
    "BundledPhotographs",
    "DataConfig",
    "ImageDataset",
    "ImageFolder",
    "MaskConfig",
    "MultiCropAugmentation",
    "Patches",
    "UnreadableImageError",
    "batch_masks",
    "batches",
    "cut_patches",
    "mask_counts",
    "normalize",
    "open_dataset",
    "read_image",
    "sample_block_masks",
]
