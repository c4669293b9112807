"""The photometric augmentation of a batch: one operator, and the function that users call."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dinov2_kernels._library import define
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

    Images come channels last, as decoders and crops leave them: every step but the blur needs all three channels of a
    pixel, so that no worker has to move them apart, and the kernels do it in registers. There are no gradients.

    Bytes: reads 3 a pixel, and for images with a contrast jitter 3 more; writes 3 elements of `dtype`. On a GPU, images
    with a blur also write their levels in float32, 12 bytes a pixel, and read them once and a quarter.

    Args:
        images: uint8 [N, H, W, 3]; N, H and W may be 0.
        plan: of N images, with its table on the device of the images; see :func:`draw_plan`.
        mean: three numbers, subtracted from red, green and blue on a scale from 0 to 1.
        std: three numbers above 0, by which the channels are divided then.
        dtype: of the result: float32, bfloat16 or float16. Arithmetic is in float32.

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
        raise ValueError(f"plan: expected one of {len(images)} images, got one of {len(plan.table)}")
    if plan.table.device != images.device:
        raise ValueError(f"plan: expected its table on {images.device}, as the images, got {plan.table.device}")
    for name, values in (("mean", mean), ("std", std)):
        if len(values) != 3:
            raise ValueError(f"{name}: expected three numbers, got {values}")
    if not min(std) > 0:
        raise ValueError(f"std: expected three numbers above 0, got {std}")
    if dtype not in _DTYPES:
        raise TypeError(f"dtype: expected float32, bfloat16 or float16, got {dtype}")
    y: Tensor = _photometric(images.contiguous(), plan.table.contiguous(), list(mean), list(std), dtype)
    return y
