"""Reads files of weights. What is no such file is named: what came in its place, and what to do."""

from __future__ import annotations

import argparse
import json
import re
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from dinov2.models.checkpoints.run import load_checkpoint

BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "it is a pointer of git LFS, not the file that it points to; run git lfs pull"),
    (b"<!doctype html", "it is an HTML page, not the file that the page offers; download the file itself"),
    (b"<html", "it is an HTML page, not the file that the page offers; download the file itself"),
    (b"<", "it is XML, perhaps a server's error message; download the file again"),
    (b"{", "it is JSON text, such as a configuration; give the file of weights, or its folder"),
    (b"gguf", "it is a GGUF file"),
    (b"\x89hdf", "it is an HDF5 file, as Keras writes it"),
    (b"\x93numpy", "it is a NumPy array"),
    (b"\x1f\x8b", "it is compressed by gzip; unpack it first"),
    (b"bzh", "it is compressed by bzip2; unpack it first"),
    (b"\xfd7zxz", "it is compressed by xz; unpack it first"),
)
"""First bytes of a file, in lower case -> what it is."""
ZIP, PICKLE, TAR = b"PK\x03\x04", b"\x80", b"ustar"
SHARD = re.compile(r"-\d{5}-of-(\d{5})\.\w+$")


def read_content(file: Path) -> Any:
    """The content of a file of weights: tensors by name, perhaps with much else around them.

    The first bytes decide how a file is read, not its name. Pickled code is never run.

    Raises:
        ValueError: the file cannot be read; the message says what it is.
    """
    if file.is_dir():
        return _read_run_checkpoint(file)
    try:
        if file.name.endswith(".index.json"):
            return _read_shards(file)
        return _read_file(file)
    except OSError as error:
        raise _unreadable(f"{type(error).__name__}: {error}") from error


def _read_run_checkpoint(directory: Path) -> dict[str, Any]:
    """The teacher (in a distillation, the only student's moving average) and its configuration ``vit``."""
    content = load_checkpoint(directory, parts=["teacher"])
    if len(content["vit"]) > 1:
        raise ValueError(f"it holds the students {', '.join(content['vit'])}: write one to a file with dinov2 export")
    ((name, vit),) = content["vit"].items()
    return {"teacher": {key.removeprefix(f"{name}."): x for key, x in content["teacher"].items()}, "vit": vit}


def _read_shards(index: Path) -> dict[str, Any]:
    try:
        places = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _unreadable(f"it is no index of shards ({type(error).__name__}: {error})") from error
    if missing := [shard for shard in shards if Path(shard).name != shard or not (index.parent / shard).is_file()]:
        raise ValueError(f"{len(missing)} of {len(shards)} shards are missing: {', '.join(missing[:5])}")
    tensors: dict[str, Any] = {}
    for shard in shards:
        try:
            tensors |= _read_file(index.parent / shard, is_shard=True)
        except ValueError as error:
            raise ValueError(f"shard {shard}: {error}") from error
    if lost := sorted(places.keys() - tensors.keys()):
        raise ValueError(f"shard {places[lost[0]]} lacks {lost[0]}, which the index places there")
    return tensors


def _read_file(file: Path, is_shard: bool = False) -> Any:
    with file.open("rb") as stream:
        start = stream.read(512)
    if (total := SHARD.search(file.name)) and int(total[1]) > 1 and not is_shard:
        raise ValueError(f"it is one of {int(total[1])} shards; give the folder, whose index names all of them")
    if _is_safetensors(start):
        return _read_safetensors(file, start)
    if not start:
        raise _unreadable("it is empty")
    if file.suffix == ".onnx":
        raise _unreadable("it is an ONNX model; give the weights that it was made from")
    if start.startswith(ZIP):
        _check_archive(file)
    elif not start.startswith(PICKLE):
        raise _unreadable(_what_begins_with(start))
    return _read_torch(file)


def _is_safetensors(start: bytes) -> bool:
    return len(start) > 8 and start[8:9] == b"{" and 2 <= int.from_bytes(start[:8], "little") <= 100_000_000


def _read_safetensors(file: Path, start: bytes) -> dict[str, Any]:
    try:
        return safetensors.torch.load_file(file)
    except Exception as error:  # broken files raise errors of many types
        length = int.from_bytes(start[:8], "little")
        with file.open("rb") as stream:
            stream.seek(8)
            header = stream.read(length)
        try:
            entries = {key: entry for key, entry in json.loads(header).items() if key != "__metadata__"}
            whole = 8 + length + max(entry["data_offsets"][1] for entry in entries.values())
        except Exception:  # a header that is cut off, or is damaged
            whole = 8 + length
        if (size := file.stat().st_size) < whole:
            raise _cut_off(size, f" of at least {whole:,}") from error
        raise _unreadable(f"{type(error).__name__}: {_first_line(error)}") from error


def _check_archive(file: Path) -> None:
    """Say what a zip archive is if it is not one of :func:`torch.save`."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = [name.partition("/")[2] or name for name in archive.namelist()]
    except zipfile.BadZipFile as error:
        raise _cut_off(file.stat().st_size) from error
    if "constants.pkl" in names:
        advice = "save its weights: torch.save(torch.jit.load(file).state_dict(), new_file)"
        raise _unreadable(f"it is a TorchScript program; {advice}")
    if "data.pkl" not in names:
        if any(name.endswith(".npy") for name in archive.namelist()):
            raise _unreadable("it is an archive of NumPy arrays")
        if "archive_format" in names:
            raise _unreadable("it is a program of torch.export; save the state_dict of its model")
        raise _unreadable(f"it is a zip archive of {', '.join(archive.namelist()[:3]) or 'nothing'}")


def _read_torch(file: Path) -> Any:
    try:
        # The arguments that a program of training keeps beside its weights: attributes without code.
        with torch.serialization.safe_globals([argparse.Namespace]), file.open("rb") as stream:
            return torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # broken files raise errors of many types
        text = str(error)
        if (rank := re.search(r"\.rank_\d+\.", file.name)) is not None:
            raise _unreadable(
                f"{rank[0]} in its name: one process's part of FSDP; give teacher_checkpoint.pth"
            ) from error
        if (match := re.search(r"GLOBAL ([\w.]+)", text)) is not None:
            raise _unreadable(
                f"it holds a pickled {match[1]}, not only tensors, and code in a file is not run; where this class is"
                " known, save the weights alone: torch.save(model.state_dict(), file)"
            ) from error
        if isinstance(error, EOFError) or "truncated" in text or "unexpected EOF" in text or "Ran out of input" in text:
            raise _cut_off(file.stat().st_size) from error
        raise _unreadable(f"{type(error).__name__}: {_first_line(error)}") from error


def _what_begins_with(start: bytes) -> str:
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for beginning, what in BEGINNINGS:
        if text.startswith(beginning):
            return what
    if start[257:262] == TAR:
        return "it is a tar archive; unpack it first"
    return f"it begins with {start[:16]!r}, as neither safetensors nor torch.save writes it"


def _cut_off(size: int, whole: str = "") -> ValueError:
    return _unreadable(f"it is cut off after {size:,} bytes{whole}; download or copy it again")


def _unreadable(what: str) -> ValueError:
    return ValueError(f"cannot be read as a file of weights: {what}")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
