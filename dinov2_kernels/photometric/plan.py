"""The augmentation of each image in a batch: :class:`ImagePlan` for one image, :class:`PhotometricPlan` for N images.

A plan is one small table with a row per image, so one copy brings it to a device, and kernels need no host to read it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor


class Jitter(IntEnum):
    """The four colour jitters, and no jitter. The plan's table has these numbers."""

    NONE = 0
    BRIGHTNESS = 1
    CONTRAST = 2
    SATURATION = 3
    HUE = 4


class Column(IntEnum):
    """Columns of a plan's table. At ``JITTERS`` begin four pairs of a jitter and its strength, in order of use."""

    FLIP = 0  # 0 or 1
    JITTERS = 1  # jitter, strength, jitter, strength, ...
    GRAYSCALE = 9  # 0 or 1
    BLUR_SIGMA = 10  # pixels; 0 for no blur
    SOLARIZE_THRESHOLD = 11  # a level; infinite for no solarisation


MAX_JITTERS = 4
COLUMNS = 12


@dataclass(frozen=True, kw_only=True)
class ImagePlan:
    """The steps for one image, in this order. The defaults do nothing.

    Attributes:
        flip: mirror left and right.
        jitters: pairs of a jitter and its strength, in order of use, each jitter at most once. For brightness, contrast
            and saturation the strength is a factor >= 0, and 1 changes nothing. For hue it is the part of the circle
            by which the hue turns.
        grayscale: replace every colour by its luma.
        blur_sigma: standard deviation of the Gaussian blur, in pixels; 0 for no blur.
        solarize_threshold: invert levels (0 to 255) that are at least this one; infinite for no solarisation.

    Raises:
        ValueError: a value is not as described.
    """

    flip: bool = False
    jitters: tuple[tuple[Jitter, float], ...] = ()
    grayscale: bool = False
    blur_sigma: float = 0.0
    solarize_threshold: float = math.inf

    def __post_init__(self) -> None:
        kinds = [jitter for jitter, _ in self.jitters]
        if len(set(kinds)) < len(kinds) or not set(kinds) <= set(Jitter) - {Jitter.NONE}:
            raise ValueError(f"jitters: expected each of the four jitters at most once, got {self.jitters}")
        for jitter, strength in self.jitters:
            if not math.isfinite(strength) or (jitter != Jitter.HUE and strength < 0):
                expected = "a finite turn" if jitter == Jitter.HUE else "a finite factor >= 0"
                raise ValueError(f"jitters: expected {expected} for {Jitter(jitter).name.lower()}, got {strength}")
        if not 0 <= self.blur_sigma < math.inf:
            raise ValueError(f"blur_sigma: expected a finite number >= 0, got {self.blur_sigma}")
        if math.isnan(self.solarize_threshold):
            raise ValueError(f"solarize_threshold: expected a number, got {self.solarize_threshold}")

    def as_row(self) -> list[float]:
        """The image's row of the table, [12]."""
        unused = ((Jitter.NONE, 0.0),) * (MAX_JITTERS - len(self.jitters))
        pairs = [float(value) for pair in (*self.jitters, *unused) for value in pair]
        return [float(self.flip), *pairs, float(self.grayscale), self.blur_sigma, self.solarize_threshold]

    @classmethod
    def from_row(cls, row: list[float]) -> ImagePlan:
        """The inverse of :meth:`as_row`."""
        pairs = row[Column.JITTERS : Column.GRAYSCALE]
        jitters = zip((Jitter(int(kind)) for kind in pairs[::2]), pairs[1::2], strict=True)
        return cls(
            flip=bool(row[Column.FLIP]),
            jitters=tuple((jitter, strength) for jitter, strength in jitters if jitter != Jitter.NONE),
            grayscale=bool(row[Column.GRAYSCALE]),
            blur_sigma=row[Column.BLUR_SIGMA],
            solarize_threshold=row[Column.SOLARIZE_THRESHOLD],
        )


@dataclass(frozen=True, eq=False)
class PhotometricPlan:
    """The steps for each of N images.

    Attributes:
        table: [N, 12] float32 on any device; rows as :meth:`ImagePlan.as_row` makes them, columns as :class:`Column`
            names them. Data workers may pass on this tensor alone, and slice or concatenate it.

    Raises:
        TypeError, ValueError: the table has another shape or dtype. Its values are not checked, because they may lie
            on a GPU.

    Examples:
        >>> plan = PhotometricPlan.of([ImagePlan(flip=True), ImagePlan(jitters=((Jitter.HUE, 0.25),))])
        >>> len(plan), plan.table.shape
        (2, torch.Size([2, 12]))
        >>> plan.images()[0].flip
        True
    """

    table: Tensor

    def __post_init__(self) -> None:
        if self.table.dim() != 2 or self.table.shape[1] != COLUMNS:
            raise ValueError(f"table: expected shape [N, {COLUMNS}], got {list(self.table.shape)}")
        if self.table.dtype != torch.float32:
            raise TypeError(f"table: expected torch.float32, got {self.table.dtype}")

    @classmethod
    def of(cls, images: Iterable[ImagePlan]) -> PhotometricPlan:
        """The plan of these images, on the host."""
        rows = [image.as_row() for image in images]
        return cls(torch.tensor(rows, dtype=torch.float32).view(-1, COLUMNS))

    def __len__(self) -> int:
        return len(self.table)

    def images(self) -> list[ImagePlan]:
        """The plan of each image. If the table is on a GPU, this waits for the GPU."""
        return [ImagePlan.from_row(row) for row in self.table.tolist()]

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PhotometricPlan:
        """The plan with its table on a device; ``non_blocking`` as for ``Tensor.to``, for a table in pinned memory."""
        return PhotometricPlan(self.table.to(device, non_blocking=non_blocking))
