"""Two images are compared: copies of any kind are the same picture; frames, watermarks and scenes in common are not."""

from __future__ import annotations

import io
import itertools
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance

from dinov2.curate.copies import compare, is_plain, sketch
from dinov2.curate.copies.features import describe_copies, describe_points
from dinov2.curate.copies.points import Sketch, mirrored, packed, unpacked
from dinov2.data import BundledPhotographs
from dinov2.data.decoding import Pixels

NAMES = ("cat", "coffee", "rocket", "china")
PHOTOGRAPHS = BundledPhotographs()
PICTURES = [Image.fromarray(PHOTOGRAPHS[PHOTOGRAPHS.names.index(name)]).convert("RGB") for name in NAMES]


def of(picture: Image.Image) -> Sketch:
    return sketch(np.asarray(picture.convert("RGB")))


def parts(picture: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    """A part of a picture, in shares of its sides."""
    width, height = picture.size
    return picture.crop((round(left * width), round(top * height), round(right * width), round(bottom * height)))


def compressed(picture: Image.Image) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=20)
    return Image.open(file)


def with_banner(picture: Image.Image) -> Image.Image:
    picture = picture.copy()
    ImageDraw.Draw(picture).rectangle((0, 0, picture.width, round(0.18 * picture.height)), fill=(250, 220, 40))
    return picture


def in_frame(picture: Image.Image, frame: Image.Image, share: float) -> Image.Image:
    """A picture in the middle of another one, with a share of its sides."""
    frame, size = frame.copy(), (round(share * frame.width), round(share * frame.height))
    frame.paste(picture.resize(size), ((frame.width - size[0]) // 2, (frame.height - size[1]) // 2))
    return frame


def watermarked(picture: Image.Image) -> Image.Image:
    picture = picture.resize((500, 400))
    ImageDraw.Draw(picture).text((70, 150), "stock photo", fill=(255, 255, 255), font_size=70)
    return picture


KINDS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "compressed": compressed,
    "half the size": lambda picture: picture.resize((picture.width // 2, picture.height // 2)),
    "70 % of the area": lambda picture: parts(picture, 0.1, 0.05, 0.94, 0.89),
    "40 % of the area": lambda picture: parts(picture, 0.3, 0.2, 0.93, 0.83),
    "mirrored": lambda picture: picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "recoloured": lambda picture: ImageEnhance.Contrast(ImageEnhance.Brightness(picture).enhance(0.7)).enhance(1.3),
    "grey": lambda picture: picture.convert("L"),
    "with a banner": with_banner,
    "turned": lambda picture: picture.rotate(8, Image.Resampling.BICUBIC, expand=True, fillcolor=(255, 255, 255)),
    "two at once": lambda picture: compressed(parts(with_banner(picture), 0.1, 0, 0.9, 0.8)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_the_same_picture(kind: str) -> None:
    for name, picture in zip(NAMES, PICTURES, strict=True):
        copy = KINDS[kind](picture)
        assert compare(of(picture), of(copy)).same, name
        assert compare(of(copy), of(picture)).same, name


def test_other_photographs_are_other_pictures() -> None:
    sketches = [sketch(PHOTOGRAPHS[number]) for number in range(len(PHOTOGRAPHS))]
    fits = [compare(first, second) for first, second in itertools.combinations(sketches, 2)]
    assert not any(fit.same for fit in fits)
    assert max(fit.agreement for fit in fits) < 0.5


@pytest.mark.parametrize("share", [0.5, 0.6, 0.75])
def test_a_frame_in_common_makes_no_copy(share: float) -> None:
    frame, *pictures = PICTURES
    first, second, third = (of(in_frame(picture, frame, share)) for picture in pictures[:3])
    for one, other in ((first, second), (first, third), (second, third)):
        fit = compare(one, other)
        assert not fit.same
    if share < 0.7:
        assert compare(first, second).inliers >= 7  # points alone would call them copies


def test_a_watermark_in_common_makes_no_copy() -> None:
    first, second = (of(watermarked(picture)) for picture in PICTURES[:2])
    assert not compare(first, second).same
    assert compare(of(watermarked(PICTURES[0])), of(PICTURES[0])).same


def test_one_design_around_other_contents_makes_no_copy() -> None:
    def carton(content: Image.Image) -> Image.Image:
        design = PICTURES[3].copy()
        size = round(0.3 * design.width), round(0.4 * design.height)
        design.paste(content.resize(size), (round(0.35 * design.width), round(0.4 * design.height)))
        return design

    first, second, third = (of(carton(picture)) for picture in PICTURES[:3])
    for one, other in ((first, second), (first, third), (second, third)):
        fit = compare(one, other)
        assert fit.inliers >= 200
        assert fit.centre > 0.5  # the frame's rule does not see it
        assert not fit.same
    assert compare(first, of(compressed(carton(PICTURES[0])))).same


def test_views_that_share_a_strip_are_no_copies() -> None:
    left, right = (of(parts(PICTURES[3], start, 0, start + 0.6, 1)) for start in (0, 0.4))  # a third of each
    fit = compare(left, right)
    assert fit.inliers >= 15
    assert fit.agreement > 0.9
    assert not fit.same
    near = of(parts(PICTURES[3], 0.2, 0, 0.8, 1))  # two thirds of each
    assert compare(left, near).same


def drawing(seed: int) -> Image.Image:
    """Smooth colours with a few soft edges, where no points are found."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:480, 0:640] / 640
    waves = sum(np.tanh(20 * np.sin(a * x + b * y + c)) for a, b, c in rng.uniform(-9, 9, (3, 3)))
    return Image.fromarray((127 + 40 * np.stack([waves, waves * 0.8, -waves], axis=2)).astype(np.uint8))


def test_drawings_with_few_points_are_compared_as_a_whole() -> None:
    for seed in range(2):
        whole = drawing(seed)
        assert len(of(whole).places) < 100
        for kind in ("compressed", "half the size", "70 % of the area", "mirrored", "recoloured", "with a banner"):
            assert compare(of(whole), of(KINDS[kind](whole))).same, (seed, kind)
            assert compare(of(KINDS[kind](whole)), of(whole)).same, (seed, kind)
        assert not any(compare(of(whole), of(drawing(other))).same for other in range(4, 7))


@pytest.mark.parametrize("shape", [(1, 1), (3, 400), (8, 8), (64, 64), (320, 240)])
def test_images_without_detail_show_no_picture(shape: tuple[int, int]) -> None:
    plain = sketch(np.full((*shape, 3), 200, np.uint8))
    assert plain.descriptors.shape == (0, 128)
    assert not compare(plain, plain).same
    assert not compare(plain, of(PICTURES[0])).same
    assert not compare(of(PICTURES[0]), plain).same


def test_noise_is_no_detail() -> None:
    """A wall with the noise of a sensor cannot be compared, although its cells are not flat."""
    wall = np.random.default_rng(0).normal(128, 16, (300, 400, 1)).repeat(3, axis=2).clip(0, 255).astype(np.uint8)
    assert is_plain(sketch(wall))
    assert not is_plain(of(PICTURES[0]))


def test_the_sketch_of_the_mirror_image_is_the_mirrored_sketch() -> None:
    picture = np.asarray(PICTURES[1])
    expected, found = sketch(np.ascontiguousarray(picture[:, ::-1])), mirrored(sketch(picture))
    np.testing.assert_allclose(found.detail, expected.detail, atol=3)  # JPEG cuts the image into other blocks
    nearest = (expected.descriptors @ found.descriptors.T).argmax(axis=1)
    moved = np.abs(expected.places - found.places[nearest]).max(axis=1)
    assert (moved < 1.5).mean() > 0.8
    assert ((expected.descriptors * found.descriptors[nearest]).sum(axis=1) > 0.95).mean() > 0.8


def test_a_sketch_is_packed_without_loss() -> None:
    pixels = np.asarray(PICTURES[0])
    content = packed(pixels)
    assert len(content) < 100_000
    made, again = sketch(pixels), unpacked(content)
    assert all(np.array_equal(one, other) for one, other in zip(made, again, strict=True))
    np.testing.assert_allclose(np.linalg.norm(made.descriptors, axis=1), 1, rtol=1e-5)


def test_copies_have_the_nearest_features() -> None:
    pictures = [np.asarray(picture.convert("RGB")) for picture in PICTURES]
    features = describe_copies(pictures)
    assert features.shape == (len(pictures), 512)
    assert features.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-5)
    for kind in ("40 % of the area", "mirrored", "turned", "two at once"):
        copies = describe_copies([np.asarray(KINDS[kind](picture).convert("RGB")) for picture in PICTURES])
        assert ((copies @ features.T).argmax(axis=1) == np.arange(len(pictures))).all(), kind


def test_features_of_images_without_points_are_those_of_the_network() -> None:
    plain: Pixels = np.full((40, 50, 3), 90, np.uint8)
    assert not describe_points(sketch(plain)).any()
    features = describe_copies([plain])
    assert not features[0, :384].any()
    assert np.isclose(np.linalg.norm(features[0, 384:]), 1)
