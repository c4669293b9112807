"""Loads plugins of users: functions by name, and ONNX files."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dinov2.data.files import list_files
from dinov2.extras import require


def is_function(name: str) -> bool:
    """Whether a name is ``MODULE:FUNCTION``."""
    module, _, function = name.partition(":")
    return function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def load_function(name: str) -> Callable[..., Any]:
    """Import the function that ``MODULE:FUNCTION`` names.

    Raises:
        ValueError: it cannot be imported or called.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{name}: expected MODULE:FUNCTION that can be imported, got an error: {error}") from error
    if not callable(found):
        raise ValueError(f"{name}: expected MODULE:FUNCTION that can be called, got {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def identity_of(name: str) -> str:
    """The text that identifies a model in the name of a folder. For a file or folder it is a digest of the content, so
    that another model gets another folder. For anything else it is the name."""
    path = Path(name)
    if not name or is_function(name) or not path.exists():
        return name
    digest = hashlib.sha256()
    inside = sorted(path / name for name in list_files(path).files) if path.is_dir() else [path]
    for file in filter(Path.is_file, inside):
        with file.open("rb") as content:
            while block := content.read(2**20):
                digest.update(block)
    return digest.hexdigest()[:16]


def open_onnx(path: str) -> Callable[[npt.NDArray[np.float32]], npt.NDArray[Any]]:
    """Open a model of one input. It runs on one thread, and on a GPU if onnxruntime has one.

    Raises:
        ValueError: the model has several inputs.
        ImportError: onnxruntime is missing (extra ``onnx``).
    """
    onnxruntime = require("onnxruntime", extra="onnx", purpose="running an ONNX model")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    providers = [name for name in onnxruntime.get_available_providers() if name != "AzureExecutionProvider"]
    session = onnxruntime.InferenceSession(path, options, providers=providers)
    name, *others = [entry.name for entry in session.get_inputs()]
    if others:
        raise ValueError(f"{path}: expected an ONNX model with one input, a batch of images, got {[name, *others]}")

    def run(batch: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        result: npt.NDArray[Any] = session.run(None, {name: batch})[0]
        return result

    return run
