"""Where the folders of a curation lie: its output in its input, seeds among the images, a curation as the source."""

from __future__ import annotations

import dataclasses
import io
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile

from dinov2.curate import CurateConfig, OverlapWarning, Pool, curate, only, run_steps
from dinov2.curate.collect import CollectConfig, collect
from dinov2.curate.engines import Inline
from dinov2.curate.extract import ExtractConfig, extract
from dinov2.curate.overlaps import check_overlaps
from dinov2.curate.pipeline import save_config
from dinov2.curate.report import write_report
from dinov2.curate.runner import Watcher
from dinov2.curate.screen import ScreenConfig
from dinov2.curate.steps import Step
from dinov2.data import DataConfig, SourceWarning, TarShards, index_shards, open_dataset
from dinov2.recipes import laptop
from tests.curate.pictures import encoded, picture
from tests.data.files import write_tar


class Work(Watcher):
    """The names of steps that had something to do, and of all."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.steps: list[str] = []

    def started(self, step: Step, done: int) -> None:
        self.steps.append(step.name)

    def advanced(self, step: Step) -> None:
        self.made.append(step.name)


def twelve_bits() -> bytes:
    y, x = np.mgrid[:128, :128]
    file = io.BytesIO()
    tifffile.imwrite(file, np.rint((np.sin(x / 9) + np.cos(y / 7 + x / 30) + 2) / 4 * 4095).astype(np.uint16))
    return file.getvalue()


def photographs(folder: Path, number: int = 5) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(number):
        (folder / f"{i}.png").write_bytes(encoded(picture(i)))
    return folder


def run(config: CurateConfig) -> tuple[str, Work]:
    """As ``dinov2 curate run`` does."""
    work = Work()
    save_config(config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SourceWarning)
        root = run_steps(curate(config), Inline(), watcher=work).root
    write_report(config)
    return root, work


def test_stages_one_by_one(tmp_path: Path) -> None:
    """Evaluation sets and seeds are collected with the pool. Only embed runs again, for what dedup has left."""
    folders = [str(photographs(tmp_path / name, number)) for name, number in (("pool", 5), ("test", 1), ("mine", 2))]
    config = dataclasses.replace(
        laptop(),
        images=folders[0],
        evaluation_sets=(folders[1],),
        seeds=(folders[2],),
        output=str(tmp_path / "out"),
        screen=ScreenConfig(faces="none", nsfw="none"),
    )
    for stage in ("collect", "screen", "embed", "dedup", "embed", "retrieve", "materialize"):
        run_steps(only(curate(config), stage), Inline())
    assert run(config)[1].made == []


def paths_of(pool: Pool) -> list[str]:
    return [path for shard in pool.shards() for path in pool.index(shard, ["path"])["path"].to_pylist()]


@pytest.mark.parametrize("output", ["curated", "deep/er", "."])
def test_an_output_within_its_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    """The second run repeats nothing, and training finds the final set."""
    monkeypatch.chdir(photographs(tmp_path))
    Path("micrograph.tif").write_bytes(twelve_bits())
    screening = ScreenConfig(faces="none", min_side=16)
    config = dataclasses.replace(laptop(), images=".", output=output, screen=screening)
    root, first = run(config)
    again, second = run(config)
    assert (again, second.steps, second.made) == (root, first.steps, [])
    assert {"collect-images", "materialize-set"} <= set(first.made)
    with pytest.warns(SourceWarning, match=r"is a curation; its final set is read: '.*materialize-set-"):
        images = open_dataset(DataConfig(root=output))
    assert isinstance(images, TarShards)
    kept = sorted(Pool(root).index("00000", ["path"])["path"].to_pylist())
    assert kept == ["0.png", "1.png", "2.png", "3.png", "4.png", "micrograph.tif"]  # 12 bits are not plain

    if output == "curated":
        save_config(config)  # a run begins, and is killed
        with pytest.raises(
            ValueError, match=r"data\.root: expected images, got 'curated', a curation without the final"
        ):
            open_dataset(DataConfig(root="curated"))
        run_steps(only(curate(config), "materialize"), Inline())  # one stage alone ends it, too
        with pytest.warns(SourceWarning, match="its final set is read"):
            assert len(open_dataset(DataConfig(root="curated"))) == 6
        with pytest.warns(SourceWarning, match="^'curated' is a curation; its final set is read"):
            pool = run_steps(collect("curated", CollectConfig(), "elsewhere"), Inline())
        assert pool.images == root
        second_hand = dataclasses.replace(config, images="curated", output="second")
        run(second_hand)  # its report finds the images, too
        assert len(open_dataset(DataConfig(root="second"))) == 6


def test_files_of_every_name_are_collected(tmp_path: Path) -> None:
    images = photographs(tmp_path / "images", 2)
    for name, kind in {"a.MPO": "JPEG", "b": "WEBP", "c.dat": "PNG", "d.j2k": "JPEG2000"}.items():
        (images / name).write_bytes(encoded(picture(len(name)), kind))
    (images / "e.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(80))
    (images / "f.mp4").write_bytes(bytes(80))
    write_tar(images / "old.tar", [("9.png", encoded(picture(9)))])
    with pytest.warns(SourceWarning) as said:
        pool = run_steps(collect(str(images), CollectConfig(), str(tmp_path / "out")), Inline())
    assert paths_of(pool) == ["0.png", "1.png", "a.MPO", "b", "c.dat", "d.j2k"]
    texts = [str(one.message) for one in said]
    assert any("left out 1 tar ('old.tar') under" in text for text in texts)
    assert any(
        "left out 3 files: 1 .heic (install pillow-heif to read it), 1 .mp4, 1 .tar under" in text for text in texts
    )

    index_shards(images)
    with pytest.warns(SourceWarning, match=r"left out 1 tar \("):  # the images are still the larger part
        assert run_steps(collect(str(images), CollectConfig(), str(tmp_path / "out")), Inline()) == pool


def test_an_index_without_its_tar(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", [("9.png", encoded(picture(9)))])
    index_shards(tmp_path)
    (tmp_path / "a.tar").unlink()
    with pytest.raises(ValueError, match=r"images: expected a tar for each index, got .*, which has no tars"):
        run_steps(collect(str(tmp_path), CollectConfig(), str(tmp_path / "out")), Inline())


def test_a_report_is_no_page(tmp_path: Path) -> None:
    page = b'<html><img src="https://x.org/1.png"></html>'
    (tmp_path / "page.html").write_bytes(page)
    for output in ("curated", "."):
        config = CurateConfig(pages=str(tmp_path), output=str(tmp_path / output))
        save_config(config)
        (tmp_path / output / "report.html").write_bytes(page)
    (tmp_path / "report.txt").write_bytes(page)
    work = Work()
    run_steps(
        extract(str(tmp_path), ExtractConfig(base_url="https://x.org"), str(tmp_path / "out")), Inline(), watcher=work
    )
    assert work.made == ["extract-links", "extract-unique"]
    step = next(extract(str(tmp_path), ExtractConfig(base_url="https://x.org"), str(tmp_path / "out")))
    assert [task.arguments[1] for task in step.tasks] == [("page.html",)]


# --- images that play two parts


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folders in one another, and a link to one."""
    for folder in ("photos/test", "photos/fish", "photos of others"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "link").symlink_to("photos")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("images", "evaluation", "seeds", "said"),
    [
        ("photos", ["photos/test"], [], "evaluation_sets: 'photos/test' lies in the folder of the images"),
        ("link", ["photos/test/"], [], "evaluation_sets: 'photos/test/' lies in the folder of the images"),
        ("photos", [], ["photos/fish"], "seeds: 'photos/fish' shares images with 'photos', the images"),
        ("photos", [], ["photos"], "seeds: 'photos' shares images with 'photos', the images"),
        ("photos/fish", [], ["./link"], "seeds: './link' shares images with 'photos/fish', the images"),
        ("photos of others", ["photos"], ["photos/fish"], "seeds: 'photos/fish' shares images with the evaluation set"),
        (None, ["photos/test"], ["photos"], "seeds: 'photos' shares images with the evaluation set 'photos/test'"),
        ("memory://a/b", ["memory://a/b/c"], [], "evaluation_sets: 'memory://a/b/c' lies in the folder of the images"),
    ],
)
def test_folders_that_share_images_are_named(
    here: Path, images: str | None, evaluation: list[str], seeds: list[str], said: str
) -> None:
    with pytest.warns(OverlapWarning) as warned:
        check_overlaps(images, evaluation, seeds, [])
    assert [str(one.message)[: len(said)] for one in warned] == [said]


@pytest.mark.parametrize("evaluation", ["photos", "photos/", "link", "."])
def test_images_that_are_all_evaluation_images(here: Path, evaluation: str) -> None:
    with pytest.raises(ValueError, match=r"evaluation_sets: expected a folder that does not hold the images"):
        check_overlaps("photos", [evaluation], [], [])


@pytest.mark.parametrize("as_is", ["fish", "*"])
def test_evaluation_images_do_not_join_as_seeds(here: Path, as_is: str) -> None:
    with pytest.raises(ValueError, match=r"materialize\.as_is: expected seeds without evaluation images, got 'fish'"):
        check_overlaps("photos of others", ["photos"], ["photos/fish"], [as_is])


def test_folders_beside_one_another_say_nothing(here: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_overlaps("photos", ["photos of others"], [os.fspath(here / "elsewhere")], ["*"])
        check_overlaps("photos/fish", ["photos/test"], [], [])
        check_overlaps(None, [], [], [])


def test_a_curation_begins_with_the_check(here: Path) -> None:
    config = dataclasses.replace(laptop(), images="photos", evaluation_sets=("photos",), output="out")
    with pytest.raises(ValueError, match="every image would be an evaluation image"):
        next(curate(config))
    with pytest.raises(ValueError, match="every image would be an evaluation image"):
        save_config(config)
    assert not (here / "out").exists()  # an earlier curation there stays
