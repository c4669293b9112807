"""Links that features propose count only if the two images show the same picture."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from dinov2.curate import Pool, run_steps
from dinov2.curate.dedup import DedupConfig, dedup
from dinov2.curate.engines import Inline, ProcessPool
from dinov2.curate.pipeline import CurateConfig, resolved
from dinov2.curate.pool import read_table
from dinov2.data import BundledPhotographs
from dinov2.data.decoding import Pixels
from dinov2.recipes import laptop
from tests.curate.pictures import encoded, write_pool
from tests.curate.test_runner import contents
from tests.curate.vector_pools import unit_vectors

CHECKED = DedupConfig(check="pictures")


def photograph(name: str) -> Pixels:
    photographs = BundledPhotographs()
    return photographs[photographs.names.index(name)]


COFFEE, CAT, ROCKET, CHINA = map(photograph, ("coffee", "cat", "rocket", "china"))
PICTURES = {
    "coffee": COFFEE,
    "mirrored": COFFEE[:, ::-1],
    "left": COFFEE[:, :360],
    "right": COFFEE[:, 240:],
    "cat": CAT,
    "rocket": ROCKET,
}


def pool_of(root: Path, pictures: dict[str, Pixels], shards: int = 1, seed: int = 0) -> Pool:
    """A pool of PNG files whose features are all alike: every image is a candidate for every other."""
    files = {name: encoded(np.ascontiguousarray(pixels)) for name, pixels in pictures.items()}
    names = np.array_split(np.array(list(files)), shards)
    pool = write_pool(root, [{name: files[name] for name in own.tolist()} for own in names])
    rng = np.random.default_rng(seed)
    (root / "features").mkdir()
    for number, own in enumerate(names):
        np.save(root / f"features/{number:05d}.npy", unit_vectors(10 + rng.standard_normal((len(own), 32))))
    return dataclasses.replace(pool, features=str(root / "features"))


def run(root: Path, pool: Pool, references: dict[str, Pool], config: DedupConfig = CHECKED) -> dict[str, Any]:
    """The decisions by key."""
    after: Pool = run_steps(dedup(pool, references, config, str(root / "out")), Inline())
    return {
        key: decision
        for shard in pool.shards()
        for key, decision in zip(
            pool.index(shard, ["key"])["key"].to_pylist(),
            read_table(after.decisions[-1], shard).to_pylist(),
            strict=True,
        )
    }


def test_only_copies_are_dropped(tmp_path: Path) -> None:
    pool = pool_of(tmp_path / "pool", PICTURES)
    fates = {key: fate["reason"] for key, fate in run(tmp_path, pool, {}).items()}
    # The mirror image, and two parts that share a strip, are copies of the largest; other pictures are not.
    assert fates == dict.fromkeys(PICTURES) | dict.fromkeys(["mirrored", "left", "right"], "duplicate")
    unchecked = run(tmp_path, pool, {}, DedupConfig(check="none"))
    assert [key for key, fate in unchecked.items() if fate["keep"]] == ["rocket"]  # the largest


def test_no_chain_of_unchecked_links_leads_to_an_evaluation_image(tmp_path: Path) -> None:
    pool = pool_of(tmp_path / "pool", PICTURES)
    tests = pool_of(tmp_path / "tests", {"half": COFFEE[::2, ::2], "china": CHINA}, seed=1)
    fates = run(tmp_path, pool, {"val": tests})
    near = {key for key, fate in fates.items() if fate["reason"] == "near an evaluation image"}
    assert near == {"coffee", "mirrored", "left", "right"}
    assert {fates[key]["reference_row"] for key in near} == {0}
    assert fates["cat"]["keep"]
    assert fates["rocket"]["keep"]
    unchecked = run(tmp_path, pool, {"val": tests}, DedupConfig(check="none"))
    assert not any(fate["keep"] for fate in unchecked.values())


def test_a_copy_is_dropped_for_an_image_that_shows_the_same(tmp_path: Path) -> None:
    """Two parts of a photograph that share only a strip are linked by the whole; without it both are kept."""
    parts = {"left": COFFEE[:, :360], "right": COFFEE[:, 240:]}
    fates = run(tmp_path, pool_of(tmp_path / "pool", parts), {})
    assert all(fate["keep"] for fate in fates.values())


def test_engines_and_shards_change_nothing(tmp_path: Path) -> None:
    one, cut = pool_of(tmp_path / "one", PICTURES), pool_of(tmp_path / "cut", PICTURES, shards=4)
    inline = run_steps(dedup(one, {}, CHECKED, str(tmp_path / "inline")), Inline())
    expected = read_table(inline.decisions[-1], "00000")["keep"].to_pylist()
    after = run_steps(dedup(cut, {}, CHECKED, str(tmp_path / "shards")), Inline())
    assert [keep for s in cut.shards() for keep in read_table(after.decisions[-1], s)["keep"].to_pylist()] == expected
    run_steps(dedup(one, {}, CHECKED, str(tmp_path / "processes")), ProcessPool(2))
    assert contents(tmp_path / "inline") == contents(tmp_path / "processes")


def test_images_that_cannot_be_read_are_copies_of_nothing(tmp_path: Path) -> None:
    pool = pool_of(tmp_path / "pool", {"coffee": COFFEE, "cat": CAT})
    tar = tmp_path / "pool" / "images" / "00000.tar"
    content = bytearray(tar.read_bytes())
    content[600:90_000] = bytes(89_400)  # the first image is damaged after it was embedded
    tar.write_bytes(content)
    assert all(fate["keep"] for fate in run(tmp_path, pool, {}).values())


def test_built_in_features_are_checked_and_others_trusted() -> None:
    config = CurateConfig(images="photos")
    assert resolved(config).dedup.check == "pictures"
    own = dataclasses.replace(config.embed_copies, model="sscd.pt")
    assert resolved(dataclasses.replace(config, embed_copies=own)).dedup.check == "none"
    trusted = dataclasses.replace(config, dedup=DedupConfig(check="none"))
    assert resolved(trusted).dedup.check == "none"
    assert laptop().dedup.check == "pictures"
