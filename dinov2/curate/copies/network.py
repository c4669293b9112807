"""A small convolutional network that tells copies of an image from images that merely look alike.

It replaces SSCD (Pizzi et al., arXiv:2202.10261), whose weights cannot be had offline, and was trained like it: the
network tells two views of a patch from all other patches, and KoLeo spreads the vectors of different patches.
``examples/copy_network.py`` trained its weights on the left halves of the bundled photographs.
"""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from dinov2.data.cropping import resized
from dinov2.data.decoding import Pixels

SIZE = 64
WIDTH = 128
CHANNELS = (24, 48, 96, 192)
WEIGHTS = Path(__file__).parent / "copies.safetensors"
CONTRAST_FLOOR = 0.02  # added to the standard deviation of an image, on a scale of 0 to 1


class CopyNetwork(nn.Module):
    """Maps images float32 [b, 3, 64, 64] on a scale from 0 to 1 to unit vectors [b, 128]."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, *CHANNELS)
        self.stages = nn.Sequential(*(_stage(a, b) for a, b in itertools.pairwise(widths)))
        self.head = nn.Linear(5 * CHANNELS[-1], WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Vectors of views."""
        # A copy may change the brightness and contrast of all channels together.
        x = (x - x.mean(dim=(1, 2, 3), keepdim=True)) / (x.std(dim=(1, 2, 3), keepdim=True) + CONTRAST_FLOOR)
        y = self.stages(x.contiguous(memory_format=torch.channels_last))  # [b, C, 4, 4]
        pooled = y.clamp_min(1e-6).pow(3).mean(dim=(2, 3)).pow(1 / 3)  # GeM (arXiv:1711.02512), [b, C]
        places = F.adaptive_avg_pool2d(y, 2).flatten(1)  # [b, 4 C]: coarse positions
        return F.normalize(self.head(torch.cat([pooled, places], dim=1)), dim=1)

    def describe(self, x: Tensor) -> Tensor:
        """Vectors that an image and its mirror image share."""
        return F.normalize(self(x) + self(x.flip(3)), dim=1)


def _stage(a: int, b: int) -> nn.Sequential:
    """A stage that halves the size: [n, a, h, w] to [n, b, h / 2, w / 2]."""
    return nn.Sequential(
        nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(b),
        nn.ReLU(),
        nn.Conv2d(b, b, 3, padding=1, bias=False),
        nn.BatchNorm2d(b),
        nn.ReLU(),
    )


@torch.inference_mode()
def describe(images: list[Pixels]) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """Features [b, 128] of uint8 RGB images [H, W, 3], each squashed to a square as a whole."""
    views = np.stack([resized(image, SIZE, SIZE).transpose(2, 0, 1) for image in images])  # [b, 3, SIZE, SIZE]
    return _network().describe(torch.from_numpy(views).float() / 255).numpy()


@functools.cache
def _network() -> CopyNetwork:
    network = CopyNetwork()
    network.load_state_dict({name: tensor.float() for name, tensor in load_file(WEIGHTS).items()}, strict=False)
    return network.eval()
