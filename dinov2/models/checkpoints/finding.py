"""Finds files of weights by their names, which needs no PyTorch."""

from __future__ import annotations

import os
import re
from pathlib import Path

MANIFEST, METADATA = "manifest.json", ".metadata"
"""Files of a checkpoint of pretraining: ours, and that of :mod:`torch.distributed.checkpoint`."""
WEIGHTS = "model.safetensors"
FILES_OF_A_FOLDER = (WEIGHTS, "pytorch_model.bin", "teacher_checkpoint.pth")
INDEXES = tuple(f"{name}.index.json" for name in FILES_OF_A_FOLDER[:2])
"""In place of one file of a folder: an index of the shards that its tensors are in."""

OF_A_FOLDER = re.compile(r"(pytorch_)?model(\.[\w-]+)?\.(safetensors|bin)(\.index\.json)?|teacher_checkpoint\.pth")
"""The names above, also with a variant such as ``model.fp16.safetensors``."""


def find_weights(path: str | os.PathLike[str]) -> Path:
    """The file of weights at a path, or within the folder there; a checkpoint of pretraining is a folder itself.

    Raises:
        TypeError: this is no path.
        FileNotFoundError: there is no file; the message says what is there.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path: expected the path of a file or folder of weights, got {type(path).__name__}")
    path = Path(path)
    if (path / MANIFEST).is_file():
        return path
    if path.is_dir():
        return _find_in_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file{_hint(str(path))}")
    return path


def is_of_a_folder(file: Path) -> bool:
    """Whether this is a folder's own file of weights, so that the other files of the folder belong to it."""
    return OF_A_FOLDER.fullmatch(file.name) is not None


def _find_in_folder(folder: Path) -> Path:
    for name in (*FILES_OF_A_FOLDER, *INDEXES):
        if (folder / name).is_file():
            return folder / name
    if (folder / METADATA).is_file():
        there = "it is a checkpoint of torch.distributed.checkpoint: make a file of it with dcp_to_torch_save"
    else:
        names = sorted(entry.name for entry in folder.iterdir())
        there = f"it holds {', '.join(names[:5])}{', ...' * (len(names) > 5)}" if names else "it is empty"
    raise FileNotFoundError(f"{folder}: the folder holds none of {', '.join(FILES_OF_A_FOLDER)}; {there}")


def _hint(path: str) -> str:
    if path.startswith(("http:", "https:", "hf:", "hf-hub:", "timm/", "s3:")):
        return "; only local files are read, so download it first"
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not Path(path).suffix:
        return f"; if it is a name on the Hugging Face Hub, download it first: hf download {path} --local-dir FOLDER"
    return ""
