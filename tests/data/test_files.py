"""Folders with links of every kind, and names of files that are no plain text."""

from __future__ import annotations

import os
import random
import warnings
from pathlib import Path

import numpy as np
import pytest

from dinov2.data import BrokenLinkWarning, ImageFolder, UnreadableImageError, escaped, image_names, unescaped
from dinov2.data.files import list_files, quoted, shown
from tests.data.files import encode, noise

NAMES = [
    b"caf\xe9.png",  # Latin-1
    "caf\u00e9.png".encode(),
    "cafe\u0301.png".encode(),  # the same word, normalised in another way
    b"\xff\xfe.png",
    b"\xed\xa0\x80.png",  # a surrogate
    b"new\nline.png",
    b"return\r.png",
    b"tab\t.png",
    b'"quo\'tes", and commas.png',
    b"-dash.png",
    b"back\\slash.png",
    b"caf\\xe9.png",  # what an escape looks like
    b"caf\\x5cxe9.png",
    b"x" * 251 + b".png",
]


def image(path: Path, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(noise(seed)))


def image_files(folder: Path) -> list[str]:
    """Images by :data:`NAMES`, image i is ``noise(i)``."""
    try:
        for i, name in enumerate(NAMES):
            image(folder / os.fsdecode(name), i)
    except OSError:
        pytest.skip("this file system refuses such names")
    return [os.fsdecode(name) for name in NAMES]


# --- links


@pytest.mark.parametrize(
    "links",
    [
        {"a/up": ".."},
        {"a/up": "..", "b/up": ".."},
        {"a/b": "../b", "b/a": "../a"},
        {"a/self": ".", "self": "."},
        {"again": "a", "and again": "again"},
        {"a/round": "../a/../b/../a"},
        {"up": "..", "a/top": "../.."},
    ],
    ids=str,
)
def test_links_that_lead_round_list_each_folder_once(tmp_path: Path, links: dict[str, str]) -> None:
    root = tmp_path / "root"
    image(root / "a" / "1.png")
    image(root / "b" / "2.png")
    for name, target in links.items():
        (root / name).symlink_to(target)
    assert ImageFolder(root).paths == ["a/1.png", "b/2.png"]


def test_links_out_of_the_root_and_back(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    image(root / "a" / "1.png")
    image(outside / "x" / "2.png")
    (outside / "x" / "back").symlink_to(root)
    (outside / "x" / "beside").symlink_to(outside / "y")
    image(outside / "y" / "3.png")
    (root / "z").symlink_to(outside / "y")
    (root / "out").symlink_to(outside / "x")
    assert ImageFolder(root).paths == ["a/1.png", "out/2.png", "z/3.png"]  # z takes one link, out/beside two
    (tmp_path / "link").symlink_to(root)
    assert ImageFolder(tmp_path / "link").paths == ["a/1.png", "out/2.png", "z/3.png"]


def test_a_folder_has_its_own_path_rather_than_that_of_a_link(tmp_path: Path) -> None:
    image(tmp_path / "z" / "within" / "1.png")
    (tmp_path / "a").symlink_to("z/within")
    (tmp_path / "b").symlink_to("z")
    assert ImageFolder(tmp_path).paths == ["z/within/1.png"]


def test_links_to_files_are_files(tmp_path: Path) -> None:
    image(tmp_path / "a" / "1.png")
    for name in ("2.png", "3.png"):
        (tmp_path / name).symlink_to("a/1.png")
    os.link(tmp_path / "a" / "1.png", tmp_path / "hard.png")
    assert ImageFolder(tmp_path).paths == ["2.png", "3.png", "a/1.png", "hard.png"]


def test_links_that_lead_nowhere_are_named(tmp_path: Path) -> None:
    image(tmp_path / "1.png")
    (tmp_path / "part").symlink_to(tmp_path / "not mounted")
    (tmp_path / "gone.png").symlink_to("nothing")
    (tmp_path / "round").symlink_to("round")
    (tmp_path / ".#lock").symlink_to("user@host")  # of an editor
    with pytest.warns(BrokenLinkWarning, match=r"3 links under .* lead nowhere.*: 'gone\.png', 'part', 'round'$"):
        folder = ImageFolder(tmp_path)
    assert folder.paths == ["1.png", "gone.png"]
    with pytest.raises(UnreadableImageError, match=r"gone\.png': No such file or directory"):
        folder[1]
    assert list_files(tmp_path).broken == [".#lock", "gone.png", "part", "round"]


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "1.png")
    with pytest.raises(UnreadableImageError, match="it is not a regular file"):
        ImageFolder(tmp_path)[0]


def test_two_mounts_of_a_folder_are_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As by ``mount --bind``: two folders that are no links have the same number."""
    for name in ("a", "b"):
        image(tmp_path / name / "1.png")
    status = os.stat

    def mounted(path: object, **options: object) -> os.stat_result:
        return status(str(path).replace("/b", "/a"), **options)

    monkeypatch.setattr(os, "stat", mounted)
    assert list_files(tmp_path).files == ["a/1.png"]


def test_file_systems_that_do_not_number_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image(tmp_path / "a" / "1.png")
    image(tmp_path / "b" / "2.png")
    (tmp_path / "b" / "up").symlink_to("..")
    status = os.stat

    def unnumbered(*arguments: object, **options: object) -> os.stat_result:
        fields = list(status(*arguments, **options))
        fields[1] = 0
        return os.stat_result(fields)

    monkeypatch.setattr(os, "stat", unnumbered)
    assert list_files(tmp_path).files == ["a/1.png", "b/2.png"]


def test_no_warning_without_broken_links(tmp_path: Path) -> None:
    image(tmp_path / "a" / "1.png")
    (tmp_path / "a" / "up").symlink_to("..")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ImageFolder(tmp_path)


# --- names


def test_every_name_is_read_and_found_again(tmp_path: Path) -> None:
    names = image_files(tmp_path)
    folder = ImageFolder(tmp_path)
    assert sorted(folder.paths) == sorted(names)
    texts = image_names(folder)
    assert len(set(texts)) == len(names)
    for number, text in enumerate(texts):
        text.encode()
        assert (tmp_path / unescaped(text)).read_bytes() == (tmp_path / folder.paths[number]).read_bytes()
        np.testing.assert_array_equal(folder[number], noise(names.index(folder.paths[number])))


def test_only_what_must_be_is_escaped() -> None:
    for name in ("a b.png", "ümlaut/日本.png", "back\\slash.png", "new\nline.png"):
        assert escaped(name) == unescaped(name) == name
    assert escaped("caf\udce9.png") == r"caf\xe9.png"
    assert escaped(r"caf\xe9.png") == r"caf\x5cxe9.png"


def test_any_bytes_are_found_again() -> None:
    draw = random.Random(0)
    for _ in range(20_000):
        name = bytes(draw.choice(b"\\x5ce9a0\xe9\xc3\xa9\xff\xed\xa0\x80") for _ in range(draw.randrange(1, 9)))
        text = escaped(os.fsdecode(name))
        text.encode()
        assert os.fsencode(unescaped(text)) == name


def test_names_in_messages() -> None:
    assert quoted("caf\udce9\n.png") == r"'caf\xe9\n.png'"
    assert shown("/a b/ü.png") == "/a b/ü.png"
    assert shown("a\udce9\n") == r"'a\xe9\n'"
    with pytest.raises(ValueError, match=r"root: expected a folder of images, got 'caf\\xe9', which is not a folder"):
        ImageFolder("caf\udce9")


def test_damaged_files_with_such_names_say_which(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    try:
        path.write_bytes(b"")
    except OSError:
        pytest.skip("this file system refuses such names")
    with pytest.raises(UnreadableImageError, match=r"caf\\xe9\.png'") as caught:
        ImageFolder(tmp_path)[0]
    str(caught.value).encode()
