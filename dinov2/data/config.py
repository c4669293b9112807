"""The images of a run, their augmentation and their masks: settings, in a module that needs no PyTorch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from dinov2.configuration import Config, Count, CountOr0, PartRange, Positive, Range, Rules, Share, ShareRange

if TYPE_CHECKING:
    from dinov2_kernels.photometric import PhotometricDistribution

BLUR_TAPS = 9  # the side of the only kernel that dinov2_kernels blurs RGB images with
# Settings that only RGB images have, with their defaults.
COLOUR = {"saturation": 0.2, "hue": 0.1, "grayscale": 0.2}


@dataclass(frozen=True, kw_only=True)
class AugmentationConfig(Config, at="data.augmentation"):
    """Random views of an image. The defaults are DINOv2's."""

    global_size: Count = 224
    """The two global crops have sides of this many pixels."""
    local_size: Count = 96
    """The local crops have sides of this many pixels."""
    local_crops: CountOr0 = 8
    """An image has this many local crops."""
    global_scale: PartRange = (0.32, 1.0)
    """A global crop covers a share of the image's area between these."""
    local_scale: PartRange = (0.05, 0.32)
    """A local crop covers a share of the image's area between these."""
    ratio: Range = (3 / 4, 4 / 3)
    """A crop has a ratio of width to height between these before it is resized."""
    flip: Share = 0.5
    """A crop is flipped left to right with this chance."""
    jitter: Share = 0.8
    """Brightness, contrast, saturation and hue of a crop change, in random order, with this chance."""
    brightness: Share = 0.4
    """Brightness is multiplied by a factor between 1 - brightness and 1 + brightness."""
    contrast: Share = 0.4
    """Contrast is multiplied by a factor between 1 - contrast and 1 + contrast."""
    saturation: Share | None = None
    """Saturation is multiplied by a factor between 1 - saturation and 1 + saturation. None is 0.2 for images of three
    channels and 0, the only choice, for others."""
    hue: Share | None = None
    """The hue turns by up to this share of the circle, either way; it is at most 0.5. None is 0.1 for images of three
    channels and 0, the only choice, for others."""
    grayscale: Share | None = None
    """A crop loses all colour with this chance. None is 0.2 for images of three channels and 0, the only choice, for
    others."""
    blur: Literal["released", "paper"] = "released"
    """released blurs the first global crop never, the second with chance 0.9 and local crops with 0.5, as the published
    weights were trained. paper takes 1, 0.1 and 0.5, as the paper says."""
    blur_sigma: Range = (0.1, 2.0)
    """The blur has a standard deviation between these, in pixels."""
    blur_kernel: Count = 9
    """The blur's kernel has this side in pixels. It is odd, and 9 for images of three channels."""
    solarize: Share = 0.2
    """The second global crop is solarised with this chance."""
    solarize_threshold: CountOr0 = 128
    """Solarisation inverts levels from this one on (0 to 255)."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """These are subtracted from the channels, on a scale where 1 is level 255 of 8 bits, 65535 of 16 bits, and 1 of
    float32. There is one number for each channel of the images."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """The channels are divided by these after the subtraction."""

    def rules(self) -> Rules:
        """Rules between fields; most depend on the number of channels."""
        yield "mean", bool(self.mean), "one value for each channel"
        is_std = len(self.std) == self.channels and min(self.std) > 0
        yield "std", is_std, f"{self.channels} values above 0, one for each of mean"
        for name in COLOUR:
            is_colour = self.channels == 3 or not getattr(self, name)
            yield name, is_colour, f"0 for the {self.channels} channels of mean, because only RGB has it"
        yield "hue", self.colour("hue") <= 0.5, "a number from 0 to 0.5"
        yield "blur_kernel", self.blur_kernel % 2 == 1, "an odd number"
        is_kernel = self.channels != 3 or self.blur_kernel == BLUR_TAPS
        yield "blur_kernel", is_kernel, f"{BLUR_TAPS} for images of three channels"

    @property
    def channels(self) -> int:
        """Number of channels of the images."""
        return len(self.mean)

    def colour(self, name: str) -> float:
        """The value of ``saturation``, ``hue`` or ``grayscale``, with None replaced by its default."""
        given: float | None = getattr(self, name)
        if given is not None:
            return given
        return COLOUR[name] if self.channels == 3 else 0.0

    def plans(self, *, blur: float, solarize: float = 0.0) -> PhotometricDistribution:
        """The distribution of plans for crops with these chances of a blur and of solarisation."""
        from dinov2_kernels.photometric import PhotometricDistribution

        return PhotometricDistribution(
            flip=self.flip,
            jitter=self.jitter,
            brightness=self.brightness,
            contrast=self.contrast,
            saturation=self.colour("saturation"),
            hue=self.colour("hue"),
            grayscale=self.colour("grayscale"),
            blur=blur,
            blur_sigma=self.blur_sigma,
            solarize=solarize,
            solarize_threshold=self.solarize_threshold,
        )


@dataclass(frozen=True, kw_only=True)
class MaskConfig(Config, at="data.masks"):
    """These fields decide how many global crops are masked, and how much of each."""

    probability: Share = 0.5
    """This share of the global crops of a batch is masked at all."""
    ratio: ShareRange = (0.1, 0.5)
    """A masked crop has a share of its patches masked between these; the crops of a batch spread evenly over them."""
    min_patches: Count = 4
    """A block covers at least this many patches, before it is clipped to what is left to mask."""
    max_block_share: Positive = 0.5
    """A block covers at most this share of the grid."""
    aspect: Range = (0.3, 1 / 0.3)
    """A block has a ratio of height to width between these, drawn log-uniformly."""
    same_total: bool = False
    """Every batch masks equally many patches, so that no shape of a training step changes. Each masked crop then takes
    the middle of its share of ratio; where blocks do not reach it, single patches do."""

    def rules(self) -> Rules:
        """A block is no larger than the grid."""
        yield "max_block_share", self.max_block_share <= 1, "a number in (0, 1]"


@dataclass(frozen=True, kw_only=True)
class DataConfig(Config, at="data"):
    """These fields describe the images, their augmentation and their masks."""

    root: str | Path | None = None
    """Images come from this folder, nested in any way, or from this folder or URL of tar shards or of a saved Hugging
    Face dataset. None takes the bundled photographs."""
    num_workers: CountOr0 = 2
    """This many processes prepare batches; 0 prepares them in the training process. Results do not depend on it."""
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    """Random views are drawn like this."""
    masks: MaskConfig = field(default_factory=MaskConfig)
    """Patches that the student must predict are masked like this."""

    def rules(self) -> Rules:
        """An empty name would be the working folder."""
        yield "root", self.root != "", "a folder or URL, or None"
