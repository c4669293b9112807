"""The photometric augmentation of a batch: one operator, and the function that users call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dinov2_kernels._library import contiguous, define
from dinov2_kernels.photometric import reference
from dinov2_kernels.photometric.plan import PhotometricPlan

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _fake(images: Tensor, plan: Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    N, H, W, _ = images.shape
    return images.new_empty(N, 3, H, W, dtype=dtype)


_photometric = define(
    "photometric(Tensor images, Tensor plan, float[] mean, float[] std, ScalarType dtype) -> Tensor",
    reference=reference.photometric,
    fake=_fake,
    triton="dinov2_kernels.photometric.triton_kernel:photometric",
).call


def photometric(
    images: Tensor,
    plan: PhotometricPlan,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Flip, recolour, blur, solarise and normalise each image by its plan, see :mod:`.reference`.

    Images have their channels last, as decoders and crops make them. Workers need not transpose them: the kernels
    separate the channels in registers. There are no gradients.

    Bytes per pixel: reads 3, and 3 more for images with a contrast jitter; writes 3 elements of `dtype`. On a GPU,
    images with a blur also write their levels in float32, 12 bytes, and read them 1.25 times.

    Args:
        images: uint8 [N, H, W, 3]; N, H and W may be 0.
        plan: plan of the N images, with its table on the device of the images; see :func:`draw_plan`.
        mean: three numbers, subtracted from red, green and blue on a scale from 0 to 1.
        std: three numbers above 0; each channel is divided by its number after the subtraction.
        dtype: dtype of the result: float32, bfloat16 or float16. Arithmetic is in float32.

    Returns:
        [N, 3, H, W] contiguous.

    Raises:
        TypeError, ValueError: an argument is not as described.

    Examples:
        >>> images = torch.randint(256, (2, 32, 32, 3), dtype=torch.uint8)
        >>> plan = draw_plan(PhotometricDistribution(), [np.random.default_rng(seed) for seed in range(2)])
        >>> mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        >>> photometric(images, plan, mean=mean, std=std).shape
        torch.Size([2, 3, 32, 32])
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images: expected torch.uint8, got {images.dtype}")
    if images.dim() != 4 or images.shape[3] != 3:
        raise ValueError(f"images: expected shape [N, H, W, 3], got {list(images.shape)}")
    if len(plan.table) != len(images):
        raise ValueError(f"plan: expected a plan of {len(images)} images, got one of {len(plan.table)}")
    if plan.table.device != images.device:
        raise ValueError(f"plan: expected a table on the device of images, {images.device}, got {plan.table.device}")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3:
            raise ValueError(f"{name}: expected three numbers, got {values}")
    if not min(std) > 0:
        raise ValueError(f"std: expected three numbers above 0, got {std}")
    if dtype not in _DTYPES:
        raise TypeError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    y: Tensor = _photometric(contiguous(images), contiguous(plan.table), list(mean), list(std), dtype)
    return y
