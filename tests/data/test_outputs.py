"""Outputs of this library among images, and the final set of a curation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dinov2.data import DataConfig, ImageFolder, SourceWarning, TarShards, image_names, open_dataset, write_shards
from dinov2.data.folders import images_among
from dinov2.data.outputs import final_set, forget_final_set, save_final_set
from dinov2.data.shards.storage import Storage
from tests.data.files import encode, encode_array, noise, shard_images
from tests.data.test_folders import left_out_of, write

CURATION = {"output": "curated", "collect": {}, "screen": {}, "materialize": {}, "engine": {}}


def curation(root: Path, files: tuple[str, ...] = ("report.html",)) -> Path:
    """An output of a curation, with images among its results."""
    step = {"screen-hashes-0123456789/about/step.json": b"{}", "screen-hashes-0123456789/0.npy": encode_array(noise(0))}
    own = dict.fromkeys(files, b"<html>")
    return write(root, {"config.json": json.dumps(CURATION).encode(), **step, **own})


# --- outputs of this library among images


def test_outputs_are_not_images(tmp_path: Path) -> None:
    curation(tmp_path / "curated")
    write(
        tmp_path,
        {
            "1.png": encode(noise(0)),
            "deep/curated/config.json": json.dumps(CURATION).encode(),  # it was stopped at once
            "deep/curated/mine.png": encode(noise(1)),  # it lies beside the results of the curation
            f"deep/curated/about/screen-pieces-0123456789-{'0' * 32}.json": b"[]",
            "deep/curated/about/mine.json": b"[]",
            "deep/curated/report.html.01234567.partial": b"",
            "runs/first/config.json": b'{"output": "runs/first", "optim": {}}',
            "runs/first/plots/loss.png": encode(noise(2)),
            "features/features.npy": encode_array(np.zeros((4, 5), np.float32)),
            "features/images.csv": b"image",
            "step/embed-features-0123456789/about/step.json": b"{}",
            "step/embed-features-0123456789/0.npy": encode_array(noise(3)),
            "mine/config.json": b'{"my": "own"}',
            "mine/2.png": encode(noise(4)),
            "features/mine/3.npy": encode_array(noise(5)),
            "collect-images-0123456789/4.png": encode(noise(6)),  # only its name is that of a step
        },
    )
    with pytest.warns(SourceWarning, match=r"4 in curated \(a curation\).*in runs/first \(a run\)"):
        folder = ImageFolder(tmp_path)
    assert folder.paths == ["1.png", "collect-images-0123456789/4.png", "deep/curated/mine.png", "mine/2.png"]
    left_out = left_out_of(tmp_path)
    assert left_out["step/embed-features-0123456789/0.npy"] == "in step (a curation)"
    own = [path for path, why in left_out.items() if why == "in deep/curated (a curation)"]
    assert [path.removeprefix("deep/curated/")[:12] for path in own] == ["about/screen", "config.json", "report.html."]
    assert left_out["deep/curated/about/mine.json"] == ".json"
    assert left_out["features/mine/3.npy"] == "in features (features)"


def test_a_curation_that_is_the_folder_itself(tmp_path: Path) -> None:
    curation(tmp_path)
    write(tmp_path, {"1.png": encode(noise(0)), "2.png": encode(noise(1))})
    storage = Storage(tmp_path)
    contents = images_among(storage.paths(), storage)
    assert contents.images == ["1.png", "2.png"]
    assert set(contents.left_out) == set(storage.paths()) - {"1.png", "2.png"}


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b"[" * 100_000, b"\xff"], ids=["empty", "list", "cut", "deep", "no text"]
)
def test_any_config_json(tmp_path: Path, content: bytes) -> None:
    write(tmp_path, {"a/config.json": content, "a/1.png": encode(noise(0)), "config.json": content})
    assert ImageFolder(tmp_path).paths == ["a/1.png"]
    assert final_set(str(tmp_path)) is None


# --- the final set of a curation


def ended(root: Path, seed: int = 0) -> None:
    curation(root)
    write_shards(shard_images(2, seed), root / f"materialize-set-000000000{seed}")
    save_final_set(str(root), CURATION, f"materialize-set-000000000{seed}")


def test_a_curation_stands_for_its_final_set(tmp_path: Path) -> None:
    root = tmp_path / "curated"
    ended(root)
    ended(root, 7)  # the older set is still there
    with pytest.warns(SourceWarning, match=r"^'.*curated' is a curation; its final set is read: '.*0007'$"):
        images = open_dataset(DataConfig(root=root))
    assert isinstance(images, TarShards)
    np.testing.assert_array_equal(images[0], noise(7))
    assert len(image_names(images)) == 2


@pytest.mark.parametrize("change", ["begun again", "other settings", "set is gone", "no set yet", "damaged note"])
def test_an_unfinished_curation_is_one_error(tmp_path: Path, change: str) -> None:
    root = tmp_path / "curated"
    ended(root)
    if change == "begun again":
        forget_final_set(str(root))
    elif change == "other settings":
        write(root, {"config.json": json.dumps(CURATION | {"screen": {"min_side": 9}}).encode()})
    elif change == "set is gone":
        (root / "materialize-set-0000000000").rename(tmp_path / "gone")
    elif change == "damaged note":
        write(root, {"final_set.json": b"{"})
    else:
        (root / "final_set.json").unlink()
    with pytest.raises(ValueError, match=r"data\.root: expected images, got .*finish .*: dinov2 curate run .*json$"):
        open_dataset(DataConfig(root=root))


def test_results_do_not_depend_on_engine_and_place(tmp_path: Path) -> None:
    ended(tmp_path)
    moved = CURATION | {"output": "elsewhere", "engine": {"workers": 7}}
    write(tmp_path, {"config.json": json.dumps(moved).encode()})
    assert final_set(str(tmp_path)) == f"{tmp_path}/materialize-set-0000000000"
    save_final_set(str(tmp_path), CURATION | {"seeds": ["other"]}, "other")  # a report of other settings
    assert final_set(str(tmp_path)) == f"{tmp_path}/materialize-set-0000000000"
