"""The part of DINOv2's augmentation that follows the crop: flip, colour, blur, solarisation and normalisation."""

from dinov2_kernels.photometric.op import photometric
from dinov2_kernels.photometric.plan import ImagePlan, Jitter, PhotometricPlan
from dinov2_kernels.photometric.sampling import PhotometricDistribution, draw_plan

__all__ = [
    "ImagePlan",
    "Jitter",
    "PhotometricDistribution",
    "PhotometricPlan",
    "draw_plan",
    "photometric",
]
