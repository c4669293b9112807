"""How many floating-point operations a step takes, from its configuration, and how many a GPU could do.

A product of [m, k] and [k, n] takes 2 m k n operations. Counted are products and attention, which are all but some per
cent, and only what the step needs: no recomputation, and no branches that stochastic depth skips. Per block, with D the
width of T tokens in sequences of N, H hidden features:

    queries, keys, values, output         2 T D (3 D + D)
    scores and weighted values            4 T N D
    feed-forward layer                    4 T D H    (6 T D H for SwiGLU)

and 2 T D P^2 C for patches of P^2 pixels of C channels. A head takes 2 per weight of its linear layers and row, and its
prototypes as much. The teacher runs forward on the global crops; the student forward on all crops and backward, which
is two products for each of the forward pass.

``torch.utils.flop_counter.FlopCounterMode`` does not take the place of these formulas: it counts what runs, with all
that is computed again, and it needs a step. A test holds the formulas against it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import cast

import torch
from torch import nn

from dinov2.data import MaskConfig
from dinov2.models import HeadConfig, VisionTransformer, ViTConfig
from dinov2.models.checkpoints.weights import head_config_of
from dinov2.train.config import DistillConfig, RunConfig
from dinov2_kernels.nn import swiglu_hidden_features
from dinov2_kernels.residual.sampling import num_kept_samples

FORWARD_AND_BACKWARD = 3

PEAK_TFLOPS = {
    "A100": 312.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "B200": 2250.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
    "V100": 125.0,
    "T4": 65.0,
}
"""Dense products in bfloat16 or float16 with float32 sums, 10^12 operations a second, from NVIDIA's data sheets. The
first name that a device's name contains counts."""


def step_flops(config: RunConfig, teacher: nn.ModuleDict) -> float:
    """Floating-point operations of one optimiser step, over all processes.

    Args:
        config: the run.
        teacher: its teacher; the architecture of a frozen one is not in the configuration.
    """
    views, masks = config.data.augmentation, config.data.masks
    B, patches = config.micro_batch_size, (views.global_size // config.patch_size) ** 2
    if isinstance(config, DistillConfig):  # compares every patch
        masks = replace(masks, probability=1.0, ratio=(1.0, 1.0))
    compared = masked_patches(masks, 2 * B, patches)
    crops = [(2 * B, views.global_size), (views.local_crops * B, views.local_size)]
    own_heads = [config.dino_head, config.ibot_head or config.dino_head]
    students = sum(
        backbone_flops(vit, crops) + heads_flops(vit, own_heads, sum(count for count, _ in crops), compared)
        for vit in config.networks.values()
    )
    vit = cast(VisionTransformer, teacher["backbone"]).config
    heads = [head_config_of(teacher[name].state_dict()) for name in teacher if name != "backbone"]
    forward = backbone_flops(vit, crops[:1]) + heads_flops(vit, [heads[0], heads[-1]], 2 * B, compared)
    return config.accumulation_steps * (FORWARD_AND_BACKWARD * students + forward)


def backbone_flops(vit: ViTConfig, crops: list[tuple[int, int]]) -> float:
    """One forward pass over ``(images, side in pixels)`` of each kind of crop."""
    D = vit.embed_dim
    H = int(D * vit.mlp_ratio)
    feed_forward = 6 * D * swiglu_hidden_features(H) if vit.ffn == "swiglu" else 4 * D * H
    total = 0.0
    for images, side in crops:
        patches = (side // vit.patch_size) ** 2
        N = 1 + vit.num_register_tokens + patches
        total += images * patches * 2 * D * vit.patch_size**2 * vit.in_chans
        per_sample = N * (8 * D * D + 4 * N * D + feed_forward)
        total += sum(num_kept_samples(images, rate) for rate in vit.drop_path_rates) * per_sample
    return total


def heads_flops(vit: ViTConfig, heads: Sequence[HeadConfig], class_rows: int, patch_rows: float) -> float:
    """One forward pass of class tokens and compared patches through the head of each."""
    class_head, patch_head = heads
    return class_rows * head_flops(vit.embed_dim, class_head) + patch_rows * head_flops(vit.embed_dim, patch_head)


def head_flops(in_dim: int, head: HeadConfig) -> float:
    """One row through a head and its prototypes."""
    widths = [in_dim, *[head.hidden_dim] * (head.num_layers - 1), head.bottleneck_dim, head.out_dim]
    return 2.0 * sum(i * o for i, o in pairwise(widths))


def masked_patches(masks: MaskConfig, crops: int, patches: int) -> float:
    """Masked patches of so many global crops, on average."""
    return int(crops * masks.probability) * sum(masks.ratio) / 2 * patches


def peak_flops(config: RunConfig, device: torch.device) -> float | None:
    """Operations a second of one device at best; None where nobody said and the device is not known.

    float32 runs have none but what the configuration says: it depends on how PyTorch is told to multiply.
    """
    if config.peak_tflops is not None:
        return config.peak_tflops * 1e12
    if device.type != "cuda" or config.precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for known, tflops in PEAK_TFLOPS.items() if known in name), None)
