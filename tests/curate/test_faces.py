"""Faces are found where they are, and cannot be recognised afterwards; nothing else changes."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
from PIL import Image
from skimage import data

from dinov2.curate.faces import FINEST_SIGMA, Box, blur_faces, blurred_file, bundled_detector, open_detector
from dinov2.data import BundledPhotographs
from dinov2.data.decoding import decode_image
from tests.curate.pictures import encoded, picture


def test_the_astronaut_has_a_face() -> None:
    photograph = data.astronaut()
    (boxes,) = bundled_detector([photograph])
    assert len(boxes) == 1
    assert 150 < boxes[0].x < 230
    assert 60 < boxes[0].y < 140
    assert 60 < boxes[0].width < 160


def test_photographs_without_people_have_none() -> None:
    photographs = BundledPhotographs()
    found = {
        name: len(bundled_detector([photographs[number]])[0])
        for number, name in enumerate(photographs.names)
        if name in ("cat", "coffee", "china", "flower", "rocket", "hubble", "brick", "grass")
    }
    assert sum(found.values()) <= 1, found


def test_blurring_changes_the_face_and_nothing_else() -> None:
    image, box = picture(0, 200, 160), Box(60, 40, 50, 60)
    blurred = blur_faces(image, [box])
    assert blurred.dtype == np.uint8
    assert np.array_equal(image, picture(0, 200, 160))
    detail = np.abs(np.diff(image[50:90, 70:100].astype(int), axis=1)).mean()
    assert np.abs(np.diff(blurred[50:90, 70:100].astype(int), axis=1)).mean() < 0.4 * detail
    assert np.array_equal(blurred[:, 150:], image[:, 150:])
    assert np.array_equal(blur_faces(image, []), image)


@pytest.mark.parametrize("box", [Box(420, 300, 20, 25), Box(300, 100, 520, 480), Box(-50, 400, 500, 500)])
def test_blurring_a_part_is_blurring_the_whole_by_the_rule(box: Box) -> None:
    image = picture(3, 1000, 800)
    side = 0.1 * max(box.width, box.height)
    mask = np.zeros(image.shape[:2], np.float32)
    top, left = (max(round(start - side), 0) for start in (box.y, box.x))
    mask[top : round(box.y + box.height + side), left : round(box.x + box.width + side)] = 1
    mask = cv2.GaussianBlur(mask, (0, 0), side)[..., None]
    whole = cv2.GaussianBlur(image.astype(np.float32), (0, 0), side)
    expected = mask * whole + (1 - mask) * image
    # Half a level is rounding; wide ones, which are blurred at a smaller size, are half a level off at most.
    assert np.abs(blur_faces(image, [box]) - expected).max() < (0.51 if side < FINEST_SIGMA else 1.0)


@pytest.mark.parametrize(
    "box", [Box(-20, -20, 50, 50), Box(190, 150, 60, 60), Box(0, 0, 200, 160), Box(5, 5, 0, 0), Box(900, 9, 9, 9)]
)
def test_boxes_beyond_the_edge(box: Box) -> None:
    assert blur_faces(picture(0, 200, 160), [box]).shape == (160, 200, 3)


def test_files_are_blurred_upright() -> None:
    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(0, 120, 80)).save(file, "JPEG", exif=exif, quality=95, comment=b"where it was taken")
    with Image.open(io.BytesIO(blurred_file(file.getvalue(), [Box(0, 0, 30, 30)]))) as image:
        assert (image.format, image.size) == ("JPEG", (80, 120))
        assert not image.getexif()
        assert not {"comment", "exif"} & image.info.keys()
    with Image.open(io.BytesIO(blurred_file(encoded(picture(1)), [Box(0, 0, 30, 30)]))) as image:
        assert image.format == "PNG"


def test_files_of_any_depth_are_blurred_as_they_are_read() -> None:
    deep, array = picture(0, 120, 80)[..., 0].astype(np.uint16) * 256, io.BytesIO()
    np.save(array, picture(0, 120, 80))
    for content in (encoded(deep), array.getvalue()):
        whole = decode_image(content, "")
        blurred = decode_image(blurred_file(content, [Box(0, 0, 20, 20)]), "")
        assert np.array_equal(blurred[60:], whole[60:])
        assert not np.array_equal(blurred[:20, :20], whole[:20, :20])


def test_detectors_by_their_name() -> None:
    assert open_detector("none") is None
    detect = open_detector("tests.curate.plugged_in:corner")
    assert detect is not None
    assert detect([picture(0, 100, 50), picture(0, 50, 100)]) == [[Box(0, 0, 20, 30)], []]
    with pytest.raises(ValueError, match="MODULE:FUNCTION"):
        open_detector("nowhere:f")
