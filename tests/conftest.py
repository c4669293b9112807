"""What all tests share."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch


def _make_torchvision_importable() -> torch.library.Library | None:
    """Declare the operators that torchvision's Python code expects, if its compiled part does not load.

    A torchvision built for CUDA beside a CPU build of PyTorch cannot be imported, and then neither can timm or the
    vision models of transformers, though the tests need none of its operators.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    try:
        torch.ops.load_library(next(Path(spec.origin).parent.glob("_C*")))
    except (OSError, StopIteration):
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library
    return None


_TORCHVISION = _make_torchvision_importable()  # its operators live as long as the library
