"""Whether two images show the same picture: points of one are found again in the other, and the pixels agree there.

Points alone are not enough. Photographs of one agency share their watermark and pages of one site share their frame, so
many points are found again although the pictures differ. So one image is laid on the other, and the detail of both is
compared cell by cell.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dinov2.curate.copies.points import COARSE, Floats, Sketch, mirrored
from dinov2.extras import require

RATIO = 0.8
"""A point's nearest match counts if it is nearer than this share of the distance to the next (Lowe's ratio)."""
TOLERANCE, TRIALS = 4.0, 500
"""Pixels by which a matched point may miss its place, and trials of RANSAC."""
SMALLEST_SCALE, LARGEST_SCALE = 0.2, 5.0
INLIERS, SOME_INLIERS, MANY_INLIERS = 4, 10, 15
"""Matched points that agree about a shift, turn and scale. Two points are enough to define one, and wrong matches
seldom give four."""
FEW_POINTS = 100
"""An image with fewer points, such as a drawing or a sky, is also laid on the whole other image, and looked for in
it."""
SCALES = tuple(0.97**power for power in range(17))
"""Sizes at which it is looked for, as parts of the other image's size."""
COARSER = 4
"""It is looked for at a quarter of the size."""
ACROSS, SMALLEST_CELL, CELLS = 16, 8, 8
"""The longer side has this many cells; a cell has at least this many pixels; at least this many must have detail."""
DETAIL, NOISE = 1.5, 3.0
"""Standard deviation of the detail of a cell, in grey levels, below which it tells nothing, and below which it may be
mostly noise."""
CORRELATION = 0.5
"""Two cells agree above this correlation."""
MARGIN = 3 * COARSE
"""Pixels along the sides whose cells do not count, or a sixth of a short side: what lies beyond a side changes the
detail here, and a crop or a turned copy shows something else there."""
OVERLAP = 0.5
"""Share of one of the images that the other must cover. Two views of one scene may share a strip and are no copies."""
AGREEMENT, AGREEMENT_OF_FEW = 0.8, 0.9
"""Share of the cells with detail that must agree: where many points were found again, and where few or none were. A
large watermark leaves 0.8. Cartons of one brand agree in 0.6 to 0.9, and so do two photographs of one shelf."""
CELLS_OF_WHOLE, CELLS_OF_FOUND = 16, 30
"""Numbers of cells that must have detail without points: where whole images are laid on each other, and where the place
was looked for; these are more, because the best of many places may agree by chance."""
STRIP, AGREEMENT_OUTSIDE = 0.25, 0.95
"""A banner may cover a strip along the top or the bottom, of this share of the height, if some points were found again,
or whole images are laid on each other, and all else agrees."""
CENTRE, AGREEMENT_AT_CENTRE = 0.2, 0.5
"""The middle must agree, too, or the images share no more than a frame. It begins at the first number, as a share of
the sides. The second is the share of its cells with detail that must agree."""

Map = npt.NDArray[np.float64]  # [2, 3], from places in one image to places in another


class Place(NamedTuple):
    """Where one image may lie on another, and what must agree to believe it: less where more speaks for the place."""

    map: Map
    inliers: int
    cells: int
    agreement: float
    banner: bool  # whether a banner may cover a part


class Comparison(NamedTuple):
    """How two images fit when one is laid on the other.

    Attributes:
        same: whether they show the same picture.
        inliers: points of one image that are found in the other, where they should be.
        overlap: share that is covered by the other image, for the image with the larger share.
        cells: number of covered cells in which an image has detail.
        agreement: share of these cells in which the images agree.
        centre: the same for the cells in the middle.
        outside: the same for the cells outside of a strip along the top or the bottom, for the side where more agree.
    """

    same: bool = False
    inliers: int = 0
    overlap: float = 0.0
    cells: int = 0
    agreement: float = 0.0
    centre: float = 0.0
    outside: float = 0.0


def compare(first: Sketch, second: Sketch) -> Comparison:
    """Decide whether two images show the same picture, or one shows a part of the other's.

    The second may be cropped, mirrored, turned, scaled, recoloured, compressed, or have something pasted on it.

    Example:
        >>> import numpy as np
        >>> from dinov2.curate.copies import compare, sketch
        >>> image = np.random.default_rng(0).integers(0, 256, (24, 32, 3)).repeat(10, 0).repeat(10, 1).astype(np.uint8)
        >>> compare(sketch(image), sketch(image[20:200, 280:40:-1])).same  # a part of the mirror image
        True
    """
    best = Comparison()
    both = (first, mirrored(first))
    for own in both:
        for place in _places(own, second):
            best = max(best, _judged(own, second, place))
            if best.same:
                return best
    return best


def _places(first: Sketch, second: Sketch) -> Iterator[Place]:
    """Where the first image may lie on the second: by their points and, if they have few, as a whole."""
    for found, inliers in _alignments(first, second):
        agreement = AGREEMENT if inliers >= MANY_INLIERS else AGREEMENT_OF_FEW
        yield Place(found, inliers, CELLS, agreement, inliers >= SOME_INLIERS)
    if min(len(first.places), len(second.places)) < FEW_POINTS:
        down, across = np.divide(second.detail.shape, first.detail.shape)
        yield Place(np.array([[across, 0, 0], [0, down, 0]]), 0, CELLS_OF_WHOLE, AGREEMENT_OF_FEW, True)
        scale, x, y = _place_of(first.detail, second.detail)
        yield Place(np.array([[scale, 0, x], [0, scale, y]]), 0, CELLS_OF_FOUND, AGREEMENT_OF_FEW, False)
        scale, x, y = _place_of(second.detail, first.detail)
        yield Place(np.array([[1, 0, -x], [0, 1, -y]]) / scale, 0, CELLS_OF_FOUND, AGREEMENT_OF_FEW, False)


def _place_of(whole: Floats, other: Floats) -> tuple[float, float, float]:
    """The scale at which an image fits best into another, and the x and y of its corner there."""
    cv2 = require("cv2", extra="curate", purpose="comparing images")
    best, found = -np.inf, (1.0, 0.0, 0.0)
    size = [max(1, side // COARSER) for side in other.shape[::-1]]
    coarse = cv2.resize(other, size, interpolation=cv2.INTER_AREA)
    for share in SCALES:
        scale = share * min(b / a for a, b in zip(whole.shape, other.shape, strict=True))
        size = [max(1, int(side * scale / COARSER)) for side in whole.shape[::-1]]
        size = [min(side, limit) for side, limit in zip(size, coarse.shape[::-1], strict=True)]
        part = cv2.resize(whole, size, interpolation=cv2.INTER_AREA)
        fits = np.nan_to_num(cv2.matchTemplate(coarse, part, cv2.TM_CCOEFF_NORMED), posinf=0)
        row, column = np.unravel_index(fits.argmax(), fits.shape)
        if fits[row, column] > best:
            best, found = fits[row, column], (scale, float(column * COARSER), float(row * COARSER))
    return found


def is_plain(of: Sketch) -> bool:
    """Whether an image has too little detail to be compared: a clear sky, or a blurred wall."""
    cv2 = require("cv2", extra="curate", purpose="comparing images")
    size = _grid(of.detail.shape)
    pixels = of.detail, of.detail * of.detail, _inner(of.detail)
    mean, squares, inner = (cv2.resize(values, size, interpolation=cv2.INTER_AREA) for values in pixels)
    return int(((squares - mean**2 > NOISE**2) & (inner > 0.5)).sum()) < CELLS


def _alignments(first: Sketch, second: Sketch) -> Iterator[tuple[Map, int]]:
    """Maps that most matched points agree about, and their number: first a shift, turn and scale; then, if many agree,
    also other changes of the sides."""
    cv2 = require("cv2", extra="curate", purpose="comparing images")
    pairs = _matches(first.descriptors, second.descriptors)
    places = first.places[pairs[:, 0]], second.places[pairs[:, 1]]
    for estimate, enough in ((cv2.estimateAffinePartial2D, INLIERS), (cv2.estimateAffine2D, MANY_INLIERS)):
        if len(pairs) < enough:
            return
        found, is_inlier = estimate(*places, method=cv2.RANSAC, ransacReprojThreshold=TOLERANCE, maxIters=TRIALS)
        inliers = 0 if found is None else int(is_inlier.sum())
        if inliers < enough:
            continue
        scale = float(np.sqrt(abs(np.linalg.det(found[:, :2]))))
        if SMALLEST_SCALE <= scale <= LARGEST_SCALE:
            yield found, inliers


def _matches(first: Floats, second: Floats) -> npt.NDArray[np.int64]:
    """Pairs [m, 2] of points that are nearest to each other, and clearly nearer than the next."""
    if min(len(first), len(second)) < 2:
        return np.zeros((0, 2), np.int64)
    cosine = first @ second.T
    own = np.arange(len(first))
    nearest, back = cosine.argmax(axis=1), cosine.argmax(axis=0)
    largest = cosine[own, nearest]
    cosine[own, nearest] = -1
    clear = 1 - largest < RATIO**2 * (1 - cosine.max(axis=1))  # squared distances of unit vectors are 2 - 2 cosine
    good = clear & (back[nearest] == own)
    return np.stack([own[good], nearest[good]], axis=1)


def _judged(first: Sketch, second: Sketch, place: Place) -> Comparison:
    """Lay the first image on the second, and compare them."""
    fit = _fit(first.detail, second.detail, place.map)
    same = (
        fit.overlap >= OVERLAP
        and fit.cells >= place.cells
        and fit.centre >= AGREEMENT_AT_CENTRE
        and (fit.agreement >= place.agreement or (place.banner and fit.outside >= AGREEMENT_OUTSIDE))
    )
    return fit._replace(same=same, inliers=place.inliers)


def _grid(shape: tuple[int, ...]) -> tuple[int, int]:
    """The number of cells across and down."""
    height, width = shape
    side = max(max(height, width) / ACROSS, SMALLEST_CELL)
    return max(1, round(width / side)), max(1, round(height / side))


def _fit(first: Floats, second: Floats, place: Map) -> Comparison:
    """Overlap and agreement of two images, with no judgement yet."""
    cv2 = require("cv2", extra="curate", purpose="comparing images")
    height, width = second.shape
    size = _grid(second.shape)

    def mean(pixels: Floats) -> Any:
        return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)

    laid, cover = (cv2.warpAffine(pixels, place, (width, height)) for pixels in (first, np.ones_like(first)))
    share = float(cover.mean())
    area = abs(float(np.linalg.det(place[:, :2]))) * first.size
    overlap = max(share, min(share * second.size / area, 1.0))
    means = mean(laid), mean(second)
    variances = mean(laid * laid) - means[0] ** 2, mean(second * second) - means[1] ** 2
    covered = mean(_inner(second) * cv2.warpAffine(_inner(first), place, (width, height))) > 0.5
    either = covered & (np.maximum(*variances) > DETAIL**2)
    if not either.any():
        return Comparison(overlap=overlap)
    lengths = np.sqrt(np.maximum(variances[0], 1e-3) * np.maximum(variances[1], 1e-3))
    agree = mean(laid * second) - means[0] * means[1] > CORRELATION * lengths
    middle = either & _middle(covered)
    centre = float(agree[middle].mean()) if middle.any() else 1.0
    outside = max(float(agree[part].mean()) if part.sum() >= CELLS else 0.0 for part in _without_strips(either))
    return Comparison(False, 0, overlap, int(either.sum()), float(agree[either].mean()), centre, outside)


def _inner(detail: Floats) -> Floats:
    """Ones for the pixels [H, W] that are not along the sides."""
    inner = np.zeros_like(detail)
    down, across = (round(min(MARGIN, side / 6)) for side in detail.shape)
    inner[down : detail.shape[0] - down, across : detail.shape[1] - across] = 1
    return inner


def _without_strips(cells: npt.NDArray[np.bool_]) -> list[npt.NDArray[np.bool_]]:
    """The cells [h, w] without those of a strip along the top, and without those of one along the bottom."""
    rows = np.flatnonzero(cells.any(axis=1))
    height, row = math.ceil(STRIP * (rows[-1] + 1 - rows[0])), np.arange(len(cells))[:, None]
    return [cells & (row >= rows[0] + height), cells & (row <= rows[-1] - height)]


def _middle(covered: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The cells [h, w] in the middle of the box around the covered ones."""
    middle = np.zeros_like(covered)
    spans = [np.flatnonzero(covered.any(axis=axis)) for axis in (1, 0)]
    (top, bottom), (left, right) = ((span[0], span[-1] + 1) for span in spans)
    margins = round(CENTRE * (bottom - top)), round(CENTRE * (right - left))
    middle[top + margins[0] : bottom - margins[0], left + margins[1] : right - margins[1]] = True
    return middle
