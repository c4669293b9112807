"""``dinov2 index``: what it writes, what it shows, and what it says of tars that are damaged."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dinov2.cli import main
from dinov2.data import DamagedTarsError, DamagedTarWarning, TarShards, index_shards
from tests.data.files import encode, noise, write_tar


@pytest.fixture
def pool(tmp_path: Path) -> Path:
    """Three tars of four images and two other files."""
    for name in ("a", "b", "c"):
        images = [(f"{i}.png", encode(noise(i))) for i in range(4)]
        write_tar(tmp_path / "pool" / f"{name}.tar", [*images, ("0.txt", b"a caption"), ("broken.jpg", b"")])
    return tmp_path / "pool"


def shown(capsys: pytest.CaptureFixture[str]) -> tuple[list[list[str]], str]:
    """The words of each line of the table, and what was written as an error."""
    captured = capsys.readouterr()
    return [line.split() for line in captured.out.splitlines()], captured.err


def test_index_and_again(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["index", str(pool)]) == 0
    lines, errors = shown(capsys)
    assert errors == ""
    assert ["images", "indexed", "12"] in lines
    assert ["shards", "indexed", "3"] in lines
    assert ["files", "skipped:", ".txt", "3"] in lines
    assert ["files", "skipped:", "no", "image", "by", "its", "content", "3"] in lines
    assert len(TarShards(pool)) == 12
    assert main(["index", str(pool)]) == 0
    lines, _ = shown(capsys)
    assert ["images", "indexed", "0"] in lines
    assert ["shards", "that", "had", "an", "index", "3"] in lines


@pytest.mark.parametrize(("cut", "reason"), [(1500, "it ends within '0.png'"), (3000, "it ends within the header")])
def test_damaged_tars_are_named_after_the_table(
    pool: Path, cut: int, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (pool / "b.tar").write_bytes((pool / "b.tar").read_bytes()[:cut])
    assert main(["index", str(pool)]) == 1
    lines, errors = shown(capsys)
    assert ["shards", "indexed", "2"] in lines
    assert errors.startswith("dinov2 index: 1 of 3 tars cannot be read; replace or remove them:\n  ")
    assert errors.count("\n") == 2
    assert f"b.tar: {reason}" in errors
    assert sorted(path.name for path in (pool / "index").iterdir()) == ["a.parquet", "c.parquet"]


def test_a_damaged_header_is_told(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = bytearray((pool / "b.tar").read_bytes())
    content[150] = ord("9")
    (pool / "b.tar").write_bytes(content)
    with pytest.warns(DamagedTarWarning, match=rf"^{pool}/b\.tar: 2,560 bytes at 0 hold no readable header"):
        assert main(["index", str(pool)]) == 0
    lines, _ = shown(capsys)
    assert ["images", "indexed", "11"] in lines
    assert ["files", "skipped:", "damaged", "part", "of", "a", "tar", "1"] in lines


def test_names_that_are_not_utf8(pool: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (pool / os.fsdecode(b"caf\xe9.tar")).write_bytes(b"no tar")
    write_tar(pool / "b.tar", [(os.fsdecode(b"caf\xe9.png"), encode(noise(0)))])
    assert main(["index", str(pool)]) == 1
    lines, errors = shown(capsys)
    assert ["images", "indexed", "9"] in lines
    assert rf"'{pool}/caf\xe9.tar': it is no tar" in errors
    assert sorted(path.name for path in (pool / "index").iterdir()) == ["a.parquet", "b.parquet", "c.parquet"]


def test_nothing_to_index(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["index", str(tmp_path / "nowhere")]) == 1
    assert shown(capsys)[1].startswith("dinov2 index: root: expected tar shards in it (images/*.tar or *.tar), got ")


def test_progress(pool: Path) -> None:
    told: list[tuple[int, int]] = []
    (pool / "a.tar").write_bytes(b"no tar")
    with pytest.raises(DamagedTarsError) as caught:
        index_shards(pool, lambda done, of: told.append((done, of)))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert (caught.value.report.shards, caught.value.report.images) == (2, 8)


def test_help_needs_no_pytorch() -> None:
    code = (
        "import sys, contextlib; from dinov2.cli import main\n"
        "with contextlib.suppress(SystemExit): main(['index'])\n"
        "print('torch' in sys.modules)"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.startswith("usage: dinov2 index [-h] ROOT")
    assert output.splitlines()[-1] == "False"
