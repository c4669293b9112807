"""Settings of the embed stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class EmbedConfig:
    """Which features images get, and what of an image the model sees."""

    model: str = "copies"
    """copies or colour-texture, which are built in; weights of any kind that load_pretrained reads; an ONNX (.onnx) or
    TorchScript (.pt, .torchscript) file that maps [b, 3, size, size] to [b, D]; or MODULE:FUNCTION, called with a list
    of uint8 RGB images [H, W, 3] and giving an array [b, D]."""
    size: int = 0
    """Side of what the model sees, in pixels; 0 is a model's own, or 224 where it does not say."""
    view: Literal["centre", "squash"] = "centre"
    """centre: the middle, after the shorter side was made 8/7 of the size. squash: all of the image, its aspect lost,
    as copy detection wants it."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Of each channel, on a scale of 0 to 1."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Of each channel."""
    batch_size: int = 32
    """Images of a forward pass."""
    device: str = "auto"
    """cpu, cuda, ...; auto is a GPU if there is one."""

    def __post_init__(self) -> None:
        if self.size < 0:
            raise ValueError(f"embed.size must be 0 or more, but is {self.size}")
        if self.batch_size < 1:
            raise ValueError(f"embed.batch_size must be positive, but is {self.batch_size}")
        if not len(self.mean) == len(self.std) == 3:
            raise ValueError(f"embed.mean and std must have 3 values each, but are {self.mean} and {self.std}")
