"""How many tokens and rows one forward and backward pass of one process takes through each part of the networks."""

from __future__ import annotations

from dataclasses import dataclass

from dinov2.train.config import PretrainConfig
from dinov2.train.flops import masked_patches
from dinov2_kernels.packing import PackedLayout
from dinov2_kernels.residual.sampling import num_kept_samples


@dataclass(frozen=True)
class Rows:
    """What goes through the networks in one pass of one process.

    Attributes:
        images: B.
        crops: the student's crops, 2 B global and L B local ones, as runs of sequences.
        teacher: the teacher's, 2 B global ones.
        local: L B local crops.
        masked: masked patches, an expected number.
    """

    images: int
    crops: PackedLayout
    teacher: PackedLayout
    local: int
    masked: float

    @classmethod
    def of(cls, config: PretrainConfig, images: int) -> Rows:
        """Those of a process that takes ``images`` images in one pass."""
        views, vit = config.data.augmentation, config.vit
        prefix = 1 + vit.num_register_tokens
        patches = (views.global_size // vit.patch_size) ** 2
        local_patches = (views.local_size // vit.patch_size) ** 2
        local = views.local_crops * images
        runs = [(2 * images, prefix + patches)]
        return cls(
            images=images,
            crops=PackedLayout([*runs, (local, prefix + local_patches)] if local else runs),
            teacher=PackedLayout(runs),
            local=local,
            masked=masked_patches(config.data.masks, 2 * images, patches),
        )

    @property
    def class_tokens(self) -> int:
        """Rows of the student's head of class tokens."""
        return self.crops.num_sequences

    def kept(self, rate: float) -> int:
        """Tokens that stochastic depth at this rate sends through a residual branch."""
        return sum(num_kept_samples(count, rate) * length for count, length in self.crops.runs)
