"""Make an installed torchvision importable beside this PyTorch. ``make setup`` runs this at its end.

PyPI's torchvision for Linux has operators that were compiled for PyPI's PyTorch, which includes CUDA. It cannot be
imported beside another build of PyTorch (``operator torchvision::nms does not exist``). Then timm and the vision models
of transformers cannot be imported either.

So this script installs the torchvision that was built for this PyTorch, from PyTorch's index. Where that index cannot
be reached, the installed torchvision stays and does without its operators, which timm and transformers do not call. If
nothing helps, torchvision is removed: transformers works without it, timm does not.

    python tools/match_torchvision.py [INDEX]    take torchvision from here, by default from PyTorch's own index
"""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

PYTORCH_INDEX = "https://download.pytorch.org/whl"

WITHOUT_OPERATORS = """

if not _has_ops():  # added by dinov2-kernels (tools/match_torchvision.py)
    _declared = torch.library.Library("torchvision", "FRAGMENT")
    for _name in ("nms", "qnms"):
        _declared.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
"""The end of torchvision's extension.py: torchvision describes these operators even where it could load none."""


def main(index: str) -> None:
    """Check torchvision, mend it if it needs that, and say in one line what was done."""
    if find_spec("torchvision") is None or imports():
        return
    vision, torch = metadata.version("torchvision"), metadata.version("torch")
    build = torch.partition("+")[2]  # such as cpu or cu126; PyPI's has no name
    said = f"torchvision {vision} was not built for PyTorch {torch}"
    if build:
        wanted = f"torchvision=={vision.partition('+')[0]}+{build}"
        source = index or f"{PYTORCH_INDEX}/{build}"
        pip("install", "--no-deps", "--retries", "1", "--timeout", "20", "--index-url", source, wanted)
        if imports():
            print(f"{said}: installed {wanted}")
            return
    declare_operators()
    if imports():
        print(f"{said}, and none that was could be installed: it stays without its operators (nms, roi_align, ...)")
    else:
        pip("uninstall", "--yes", "torchvision")
        print(f"{said}, and none that was could be installed: removed it; timm cannot be imported without one")


def imports() -> bool:
    """Whether torchvision can be imported, in a process of its own: nothing can be imported twice."""
    return (
        subprocess.run([sys.executable, "-c", "import torchvision"], capture_output=True, check=False).returncode == 0
    )


def pip(*arguments: str) -> None:
    """Run pip. What it could not do is seen afterwards."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    subprocess.run(command, capture_output=True, check=False)


def declare_operators() -> None:
    """Let torchvision be imported without its operators. If they load one day, nothing is declared."""
    spec = find_spec("torchvision")
    assert spec is not None
    assert spec.origin is not None
    file = Path(spec.origin).with_name("extension.py")
    text = file.read_text()
    if WITHOUT_OPERATORS in text:
        return
    partial = file.with_suffix(".partial")  # the file itself may be a link into a cache
    partial.write_text(text + WITHOUT_OPERATORS)
    partial.replace(file)


if __name__ == "__main__":
    main(*sys.argv[1:2] or [""])
