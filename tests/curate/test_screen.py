"""What is unfit goes, with the reason; what fits stays; hostile files are counted."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import onnx
import pyarrow.parquet as parquet
import pytest
from onnx import TensorProto, helper
from PIL import Image

from dinov2.curate import Pool, run_steps
from dinov2.curate.engines import Inline, ProcessPool
from dinov2.curate.pool import read_table
from dinov2.curate.repeats import first_of_equals, largest_of_alike
from dinov2.curate.screen import ScreenConfig, screen
from tests.curate import plugged_in
from tests.curate.pictures import encoded, picture, write_pool
from tests.curate.plugged_in import redness
from tests.curate.test_runner import contents

NO_FACES = ScreenConfig(faces="none", nsfw="none")


def odd_files() -> dict[str, bytes]:
    """Images in every mode, and files that are none."""
    image, file = Image.fromarray(picture(50)), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # lying on its side
    image.resize((96, 120)).save(file, "JPEG", exif=exif)
    animated = io.BytesIO()
    frames = [Image.fromarray(picture(seed)) for seed in (51, 52)]
    frames[0].save(animated, "GIF", save_all=True, append_images=frames[1:])
    modes = {mode: io.BytesIO() for mode in ("CMYK", "RGBA", "P", "L")}
    for number, (mode, content) in enumerate(modes.items()):
        Image.fromarray(picture(60 + number)).convert(mode).save(content, "TIFF")
    deep = io.BytesIO()
    Image.fromarray(picture(70)[..., 0].astype(np.uint16) * 256).save(deep, "PNG")
    whole = encoded(picture(53), "JPEG")
    return {
        "rotated": file.getvalue(),
        "animated": animated.getvalue(),
        "deep": deep.getvalue(),
        "truncated": whole[: len(whole) // 2],
        **{mode: content.getvalue() for mode, content in modes.items()},
    }


def screened(tmp_path: Path, shards: list[dict[str, bytes]], config: ScreenConfig = NO_FACES) -> dict[str, str | None]:
    pool = write_pool(tmp_path / "pool", list(shards))
    after: Pool = run_steps(screen(pool, config, str(tmp_path / "out")), Inline())
    result = {}
    for shard in pool.shards():
        keys = pool.index(shard, ["key"])["key"].to_pylist()
        result |= dict(zip(keys, read_table(after.decisions[-1], shard)["reason"].to_pylist(), strict=True))
    return result


def test_every_reason(tmp_path: Path) -> None:
    good = {f"good{seed}": encoded(picture(seed)) for seed in range(12)}
    first = {
        **good,
        "small": encoded(picture(20, 40, 90)),
        "long": encoded(picture(21, 100, 500)),
        "flat": encoded(np.full((90, 90, 3), 200, np.uint8)),
        "larger": encoded(picture(5, 192, 192)),  # and so it is kept in place of good5
    }
    second = {
        "copy": good["good3"],
        "jpeg": encoded(picture(4), "JPEG", quality=90),
        "blurred": encoded(np.asarray(Image.fromarray(picture(30)).resize((8, 8)).resize((300, 300)))),
        **odd_files(),
    }
    reasons = screened(tmp_path, [first, second], ScreenConfig(faces="none", nsfw="none", min_sharpness=5.0))
    assert reasons == {
        **dict.fromkeys(good),
        "good5": "near-duplicate (PCA hash)",
        "small": "too small",
        "long": "too long",
        "flat": "plain",
        "larger": None,
        "copy": "exact duplicate",
        "jpeg": "near-duplicate (PCA hash)",
        "blurred": "blurred",
        "truncated": "unreadable",
        **dict.fromkeys(odd_files().keys() - {"truncated"}),
    }


def test_settings_turn_reasons_off(tmp_path: Path) -> None:
    files = {
        "a": encoded(picture(0)),
        "b": encoded(picture(0), "JPEG"),
        "flat": encoded(np.zeros((70, 70, 3), np.uint8)),
    }
    config = ScreenConfig(faces="none", nsfw="none", max_distance=-1, min_entropy=0.0)
    assert screened(tmp_path, [files], config) == dict.fromkeys(files)


def test_flat_images_do_not_repeat_one_another(tmp_path: Path) -> None:
    flat = {f"flat{level}": encoded(np.full((80, 80, 3), level, np.uint8)) for level in (0, 90, 91, 255)}
    assert screened(tmp_path, [flat], ScreenConfig(faces="none", nsfw="none", min_entropy=0.0)) == dict.fromkeys(flat)


def test_a_scorer_by_its_name_or_as_onnx(tmp_path: Path) -> None:
    red, blue = np.zeros((80, 80, 3), np.uint8), picture(1)
    red[..., 0] = picture(2)[:80, :80, 0] // 4 + 190
    files = {"red": encoded(red), "blue": encoded(blue)}
    mean = helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=0)
    graph = helper.make_graph(
        [helper.make_node("Slice", ["images", "start", "stop", "channel"], ["x"]), mean],
        "redness",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["b", 3, 224, 224])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["b"])],
        [
            helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
            for name, values in {"start": [0], "stop": [1], "channel": [1], "axes": [1, 2, 3]}.items()
        ],
    )
    model = tmp_path / "redness.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), model)
    assert redness([red, blue])[0] > 0.7 > redness([red, blue])[1]
    for number, scorer in enumerate((f"{redness.__module__}:redness", str(model))):
        config = ScreenConfig(faces="none", min_entropy=0.0, nsfw=scorer, nsfw_threshold=0.7)
        assert screened(tmp_path / str(number), [files], config) == {"red": "NSFW", "blue": None}


@pytest.mark.parametrize("name", ["nowhere:f", "tests.curate.plugged_in:nothing", "nonsense"])
def test_what_cannot_be_plugged_in(tmp_path: Path, name: str) -> None:
    with pytest.raises((ValueError, OSError), match="MODULE:FUNCTION"):
        screened(tmp_path, [{"a": encoded(picture(0))}], ScreenConfig(nsfw=name))


def test_large_images_are_not_held_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"i{seed}": encoded(picture(seed)) for seed in range(5)}
    config = ScreenConfig(faces="none", nsfw=f"{redness.__module__}:redness", nsfw_threshold=1.0)
    monkeypatch.setattr("dinov2.curate.screen.BATCH_PIXELS", 2 * 96 * 96)
    plugged_in.batches.clear()
    assert screened(tmp_path, [files], config) == dict.fromkeys(files)
    assert plugged_in.batches == [2, 2, 1]


def test_the_hash_is_fitted_to_a_sample_of_what_is_in(tmp_path: Path) -> None:
    shards = [{f"{n}-{seed}": encoded(picture(10 * n + seed)) for seed in range(4)} for n in range(3)]
    pool, out = write_pool(tmp_path / "pool", list(shards)), str(tmp_path / "out")
    drops_all = ScreenConfig(faces="none", nsfw="none", hash_sample=5, min_side=97)
    empty: Pool = run_steps(screen(pool, drops_all, out), Inline())
    run_steps(screen(empty, NO_FACES, out), Inline())
    fits = [json.loads(path.read_text()) for path in Path(out).glob("screen-fit-*/all.json")]
    assert sorted((fit["rows_in"], fit["rows_out"]) for fit in fits) == [(0, 0), (12, 5)]


def test_an_index_without_digests_makes_no_duplicates(tmp_path: Path) -> None:
    files = {f"i{seed}": encoded(picture(seed)) for seed in range(4)}
    pool = write_pool(tmp_path / "pool", [files])
    path = tmp_path / "pool" / "index" / "00000.parquet"
    parquet.write_table(parquet.read_table(path).drop_columns(["sha256"]), path)
    after: Pool = run_steps(screen(pool, NO_FACES, str(tmp_path / "out")), Inline())
    assert after.kept("00000").all()


def test_same_bytes_on_every_engine(tmp_path: Path) -> None:
    shards = [{f"{name}{n}": encoded(picture(10 * n + i)) for i, name in enumerate("abc")} for n in range(3)]
    pool = write_pool(tmp_path / "pool", list(shards))
    run_steps(screen(pool, NO_FACES, str(tmp_path / "one")), Inline())
    run_steps(screen(pool, NO_FACES, str(tmp_path / "two")), ProcessPool(2))
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_repeats_keep_the_first_file_and_the_largest_picture() -> None:
    digests = np.array([b"a", b"b", b"a", b"", b"", b"b"], "S64")
    among = np.array([True, True, True, True, True, False])
    assert first_of_equals(digests, among).tolist() == [0, 1, 0, 3, 4, 5]
    hashes, areas = np.array([0, 1, 7, 3, 2**64 - 2**32], np.uint64), np.array([5, 9, 9, 8, 1])
    among = np.ones(5, dtype=bool)
    assert largest_of_alike(hashes, among, areas, 1).tolist() == [1, 1, 1, 1, 4]
    assert largest_of_alike(hashes, among, areas, -1).tolist() == [0, 1, 2, 3, 4]
    among[3] = False  # what is unfit connects nothing
    assert largest_of_alike(hashes, among, areas, 1).tolist() == [1, 1, 2, 3, 4]


def test_what_is_true_of_a_file_is_true_of_its_copies(tmp_path: Path) -> None:
    """The second shard has copies of a file that is unreadable, of one that is too small, and of one that is the lesser
    near-duplicate of another."""
    files = {"cut": encoded(picture(1))[:900], "small": encoded(picture(2, 40, 40)), "near": encoded(picture(3))}
    first = files | {"larger": encoded(picture(3).repeat(2, axis=0).repeat(2, axis=1))}
    pool = write_pool(tmp_path / "pool", [first, files])
    after: Pool = run_steps(screen(pool, NO_FACES, str(tmp_path / "out")), Inline())
    one, two = (read_table(after.decisions[-1], shard).to_pydict() for shard in pool.shards())
    assert one["reason"] == ["unreadable", "too small", "near-duplicate (PCA hash)", None]
    assert two["reason"] == ["unreadable", "too small", "exact duplicate"]
    assert two["remark"][0] == one["remark"][0] is not None
    assert (one["kept_row"], two["kept_row"]) == ([0, 1, 3, 3], [4, 5, 3])


def test_a_tar_that_is_cut_off_or_lies(tmp_path: Path) -> None:
    """What lies behind the cut is unreadable; names in tars are but names, and those that occur twice are two rows."""
    files = {f"i{seed}": encoded(picture(seed)) for seed in range(4)}
    pool = write_pool(tmp_path / "pool", [files, {"copy": files["i3"]}])
    tar = tmp_path / "pool" / "images" / "00000.tar"
    content = tar.read_bytes()
    offset = int(pool.index("00000", ["offset"])["offset"][2].as_py())
    tar.write_bytes(content.replace(b"i0.png\0\0\0\0\0\0", b"../../i0.png")[: offset + 100])
    after: Pool = run_steps(screen(pool, NO_FACES, str(tmp_path / "out")), Inline())
    assert read_table(after.decisions[-1], "00000")["reason"].to_pylist() == [None, None, "unreadable", "unreadable"]
    assert read_table(after.decisions[-1], "00001")["reason"].to_pylist() == [None]  # it is all there
    assert not list(tmp_path.parent.glob("i0*"))


def test_another_shard_measures_nothing_again(tmp_path: Path) -> None:
    def measured() -> set[int]:
        return {path.stat().st_ino for path in (tmp_path / "out").glob("screen-measures-*/*.parquet")}

    shards = [{f"{name}{n}": encoded(picture(10 * n + i)) for i, name in enumerate("abc")} for n in range(3)]
    pool = write_pool(tmp_path / "pool", list(shards[:2]))
    run_steps(screen(pool, NO_FACES, str(tmp_path / "out")), Inline())
    before = measured()
    write_pool(tmp_path / "pool", list(shards))  # the first two as they were
    after: Pool = run_steps(screen(pool, NO_FACES, str(tmp_path / "out")), Inline())
    assert len(measured() - before) == 1  # the other files are links to those of before
    assert len(measured()) == 3
    assert [after.kept(shard).tolist() for shard in after.shards()] == [[True] * 3] * 3
