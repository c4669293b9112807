"""What users plug in: functions by their name, and ONNX files."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dinov2_kernels._extras import require


def is_function(name: str) -> bool:
    """Whether a name is ``MODULE:FUNCTION``."""
    module, _, function = name.partition(":")
    return function.isidentifier() and all(part.isidentifier() for part in module.split("."))


def load_function(name: str) -> Callable[..., Any]:
    """What ``MODULE:FUNCTION`` names.

    Raises:
        ValueError: there is none, or it cannot be called.
    """
    module, _, function = name.partition(":")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"expected MODULE:FUNCTION that can be imported, but {name!r} cannot: {error}") from error
    if not callable(found):
        raise ValueError(f"expected MODULE:FUNCTION that can be called, but {name!r} is a {type(found).__name__}")
    return found  # type: ignore[no-any-return]


def identity_of(name: str) -> str:
    """What stands for a model in the name of a folder: a digest of its file, so that another one makes other results;
    what is no file or folder stands for itself."""
    path = Path(name)
    if not name or is_function(name) or not path.exists():
        return name
    digest = hashlib.sha256()
    for file in sorted(entry for entry in path.rglob("*") if entry.is_file()) if path.is_dir() else [path]:
        with file.open("rb") as content:
            while block := content.read(2**20):
                digest.update(block)
    return digest.hexdigest()[:16]


def open_onnx(path: str) -> Callable[[npt.NDArray[np.float32]], npt.NDArray[Any]]:
    """A model of one input, on one thread; on a GPU where onnxruntime has one.

    Raises:
        ValueError: it has several inputs.
        ImportError: onnxruntime is missing (extra ``onnx``).
    """
    onnxruntime = require("onnxruntime", extra="onnx", purpose="running an ONNX model")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    providers = [name for name in onnxruntime.get_available_providers() if name != "AzureExecutionProvider"]
    session = onnxruntime.InferenceSession(path, options, providers=providers)
    name, *others = [entry.name for entry in session.get_inputs()]
    if others:
        raise ValueError(f"expected an ONNX model of one batch of images, but {path!r} takes {[name, *others]}")

    def run(batch: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        result: npt.NDArray[Any] = session.run(None, {name: batch})[0]
        return result

    return run
