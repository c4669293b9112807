"""Files that come, go or change: only the shards they are in are made again, and results are those of a fresh start."""

from __future__ import annotations

import dataclasses
import errno
import os
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow.parquet as parquet
import pytest

from dinov2.curate import Counts, CurateConfig, Pool, pieces, run_steps, views
from dinov2.curate.collect import CollectConfig, collect, cuts
from dinov2.curate.embed import EmbedConfig, embed
from dinov2.curate.engines import Inline
from dinov2.curate.extract import ExtractConfig, extract
from dinov2.curate.pipeline import collected_sets, embedded_sets, source
from dinov2.curate.screen import ScreenConfig, screen
from dinov2.curate.steps import Output, Step, Steps, Task
from dinov2.data import Reduced, decoding_reduced
from dinov2.data.shards.indexing import index_shards
from dinov2.data.shards.storage import Storage
from dinov2.recipes import laptop
from tests.curate import jobs
from tests.curate.pictures import encoded, picture, write_pool
from tests.curate.test_runner import contents
from tests.data.files import write_tar

PER_SHARD = ("collect._write", "screen.measure", "embed._embed", "pieces._join")
"""Functions that make one shard, or a piece of it, from its images."""


def write(folder: Path, *seeds: int) -> None:
    """An image for each seed, all of one size; they do not lie in the order of the seeds."""
    folder.mkdir(exist_ok=True)
    for seed in seeds:
        (folder / f"{seed * 7919 % 1000:03d}.bmp").write_bytes(encoded(picture(seed, 70, 70), "BMP"))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many shards each function made."""
    made = Counter[str]()

    def counted(name: str, function: Callable[..., Counts], *arguments: object) -> Counts:
        made[name] += 1
        return function(*arguments)

    for name in PER_SHARD:
        module, _, function = name.partition(".")
        module = __import__(f"dinov2.curate.{module}", fromlist=[function])
        monkeypatch.setattr(module, function, partial(counted, name, getattr(module, function)))
    return made


def first_stages(config: CurateConfig) -> Steps[None]:
    """Those that read images one by one."""
    pool = yield from source(config)
    tests = yield from collected_sets(config, "evaluation_sets")
    seeds = yield from collected_sets(config, "seeds")
    pool = yield from screen(pool, config.screen, config.output)
    for settings in (config.embed_copies, config.embed):
        yield from embed(pool, settings, config.output)
    yield from embedded_sets(config, "evaluation_sets", tests, config.embed_copies, "embed_copies")
    yield from embedded_sets(config, "seeds", seeds, config.embed, "embed")


def test_what_is_redone(tmp_path: Path, made: Counter[str]) -> None:
    for name, seeds in {"images": range(40), "seeds": range(50, 62), "tests": range(70, 82)}.items():
        write(tmp_path / name, *seeds)
    config = dataclasses.replace(
        laptop(),
        output=str(tmp_path / "out"),
        images=str(tmp_path / "images"),
        seeds=(str(tmp_path / "seeds"),),
        evaluation_sets=(str(tmp_path / "tests"),),
        collect=CollectConfig(shard_size=6),
        screen=ScreenConfig(faces="none"),
    )

    def shards_made() -> list[int]:
        made.clear()
        run_steps(first_stages(config), Inline())
        return [made[name] for name in PER_SHARD]

    first = shards_made()
    assert first[0] > 12  # at least seven of images, and three of each other set
    assert shards_made() == [0, 0, 0, 0]
    write(tmp_path / "images", 100)
    assert shards_made() == [1, 1, 2, 3]  # two models embed it
    write(tmp_path / "seeds", 101)
    assert shards_made() == [1, 0, 1, 1]
    write(tmp_path / "tests", 102)
    assert shards_made() == [1, 0, 1, 1]
    (tmp_path / "images" / "000.bmp").write_bytes(encoded(picture(103, 70, 70), "BMP"))  # changed, of the same size
    assert shards_made() == [1, 1, 2, 3]
    (tmp_path / "images" / "757.bmp").unlink()
    assert all(number <= most for number, most in zip(shards_made(), (2, 2, 4, 6), strict=True))  # of two shards

    run_steps(first_stages(dataclasses.replace(config, output=str(tmp_path / "fresh"))), Inline())
    for folder in (tmp_path / "fresh").glob("*-*"):
        assert contents(folder) == contents(tmp_path / "out" / folder.name), folder.name


@pytest.mark.parametrize("has_digests", [True, False])
def test_tars_that_are_replaced_or_added(tmp_path: Path, made: Counter[str], has_digests: bool) -> None:
    """Tars keep their names and sizes. Indices of other programs may have no digests of images."""

    def write_tars(**seeds: int) -> None:
        for name, seed in seeds.items():
            tar = write_tar(tmp_path / "tars" / f"{name}.tar", [("0.bmp", encoded(picture(seed, 70, 70), "BMP"))])
            os.utime(tar, (seed, seed))
            index = tmp_path / "tars" / "index" / f"{name}.parquet"
            index.unlink(missing_ok=True)
            index_shards(tmp_path / "tars")
            if not has_digests:
                parquet.write_table(parquet.read_table(index).drop_columns("sha256"), index)

    def stages(output: Path) -> Steps[Pool]:
        pool = yield from collect(str(tmp_path / "tars"), CollectConfig(), str(output))
        return (yield from screen(pool, ScreenConfig(faces="none"), str(output)))

    write_tars(a=1, b=2)
    run_steps(stages(tmp_path / "out"), Inline())
    for change in ({"a": 3}, {"c": 4}):
        made.clear()
        write_tars(**change)
        run_steps(stages(tmp_path / "out"), Inline())
        assert made == {"screen.measure": 1, "pieces._join": 1}
    run_steps(stages(tmp_path / "fresh"), Inline())
    for folder in (tmp_path / "fresh").glob("*-*"):
        assert contents(folder) == contents(tmp_path / "out" / folder.name), folder.name


def test_pieces_are_lent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Counter[str]) -> None:
    decoded: list[str] = []

    def decode(content: bytes, name: str, side: int, least: int = 0) -> Reduced:
        decoded.append(name)
        return decoding_reduced.decode_reduced(content, name, side, least)

    def stages(pool: Pool, output: Path, model: str = "copies") -> Steps[Pool]:
        settings = ScreenConfig(faces="none", max_distance=-1)
        screened = yield from screen(pool, settings, str(output))
        return (yield from embed(screened, EmbedConfig(model=model), str(output)))

    monkeypatch.setattr(pieces, "ROWS", 2)
    for module in (sys.modules[screen.__module__], views):
        monkeypatch.setattr(module, "decode_reduced", decode)
    wide = {"wide": encoded(picture(0, 1600, 800), "JPEG")}
    shards = [wide | {f"i{seed}": encoded(picture(seed)) for seed in range(1, 4)}, {"other": encoded(picture(4))}]
    before = write_pool(tmp_path / "before", shards)
    after = write_pool(tmp_path / "after", [shards[0] | {"new": encoded(picture(5))}, shards[1]])
    run_steps(stages(before, tmp_path / "out"), Inline())
    assert [made[name] for name in PER_SHARD[1:]] == [3, 3, 4]
    decoded.clear()
    made.clear()
    run_steps(stages(after, tmp_path / "out"), Inline())
    assert [made[name] for name in PER_SHARD[1:]] == [1, 1, 2]
    assert decoded == ["4 of 00000"] * 3  # for its measures, its sketch and its features

    decoded.clear()
    last: Pool = run_steps(stages(after, tmp_path / "out", "colour-texture"), Inline())
    assert sorted(decoded) == ["0 of 00001", *(f"{row} of 00000" for row in range(1, 5))]  # a small image is lent
    assert {last.read_features(shard).shape for shard in last.shards()} == {(5, 86), (1, 86)}
    for model in ("copies", "colour-texture"):
        run_steps(stages(after, tmp_path / "fresh", model), Inline())
    for folder in (tmp_path / "fresh").glob("*-*"):
        assert contents(folder) == contents(tmp_path / "out" / folder.name), folder.name


def test_a_change_that_keeps_the_size_is_seen(tmp_path: Path) -> None:
    """Files of users change under their names; nothing that was made of what they were may be taken for new."""
    page, image = tmp_path / "a.html", tmp_path / "a.bmp"
    folders = []
    for number in range(2):
        page.write_text(f'<img src="http://h.org/{number}.jpg">')
        image.write_bytes(encoded(picture(number), "BMP"))
        for path in (page, image):
            os.utime(path, ns=(number, number))
        steps = extract(str(tmp_path), ExtractConfig(), "out"), collect(str(tmp_path), CollectConfig(), "out")
        folders.append([next(step).folder for step in steps])
    assert [first != second for first, second in zip(*folders, strict=True)] == [True, True]


def test_a_file_that_may_be_read_by_now_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing else of it has changed."""
    (tmp_path / "a.png").touch()
    storage = Storage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        closed = storage.stamps(["a.png"])
    assert closed != storage.stamps(["a.png"])


def test_shards_are_cut_where_few_change() -> None:
    paths = [f"{number * 7919 % 100_000:05d}.jpg" for number in range(3000)]

    def shards(paths: list[str], size: int) -> list[tuple[str, ...]]:
        ordered = sorted(paths)
        return [tuple(ordered[start:stop]) for start, stop in cuts(ordered, size)]

    for size in (1, 2, 3, 10, 100):
        before = shards(paths, size)
        assert [path for shard in before for path in shard] == sorted(paths)
        assert all((size + 3) // 4 <= len(shard) <= size for shard in before[:-1])
        changed = [len({*shards([*paths, new], size)} - {*before}) for new in ("00000", "12345x", "5", "77777", "z")]
        assert sum(changed) <= 5 * 3
    assert shards(paths[:10], 10) == [tuple(sorted(paths[:10]))]
    assert shards([], 10) == []


def lent(tmp_path: Path, *names: str, inputs: str, settings: int = 0) -> Steps[Counts]:
    """A step whose results depend on a name that its task says."""
    tasks = [
        Task(f"{n:05d}", jobs.square, (len(name),), content=partial(jobs.name_of, name)) for n, name in enumerate(names)
    ]
    step = Step(str(tmp_path), "test-lent", settings, (inputs,), tasks)
    yield step
    return step.counts()


@pytest.mark.parametrize("links", [True, False])
def test_results_are_taken_from_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Counter[str], links: bool
) -> None:
    def count(output: Output, number: int) -> Counts:
        made["square"] += 1
        return original(output, number)

    def no_links(source: str, target: str) -> None:
        raise OSError(errno.EPERM, "links are not supported")

    original = jobs.square
    monkeypatch.setattr(jobs, "square", count)
    if not links:
        monkeypatch.setattr(os, "link", no_links)
    run_steps(lent(tmp_path, "a", "bb", inputs="one"), Inline())
    assert run_steps(lent(tmp_path, "ccc", "a", "bb", inputs="two"), Inline()) == Counts(3, 3)
    assert made["square"] == 3
    one, two = (next(lent(tmp_path, inputs=inputs)).folder for inputs in ("one", "two"))
    for suffix in (".json", ".parquet"):
        assert Path(f"{one}/00000{suffix}").samefile(f"{two}/00001{suffix}") == links
        assert Path(f"{one}/00000{suffix}").read_bytes() == Path(f"{two}/00001{suffix}").read_bytes()
    run_steps(lent(tmp_path, "a", inputs="two", settings=1), Inline())  # other settings
    assert made["square"] == 4
    for folder, names in ((one, ("00000.json",)), (two, ("00001.json", "00001.parquet"))):  # killed, and cleaned
        for name in names:
            Path(folder, name).unlink()
    run_steps(lent(tmp_path, "a", inputs="three"), Inline())
    assert made["square"] == 5
    run_steps(lent(tmp_path / "whole", "a", inputs="three"), Inline())
    assert contents(Path(next(lent(tmp_path, inputs="three")).folder)) == contents(
        Path(next(lent(tmp_path / "whole", inputs="three")).folder)
    )
