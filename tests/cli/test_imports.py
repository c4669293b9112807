"""A command imports only what it runs: help and errors appear before anything large is imported."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from dinov2.data.config import BLUR_TAPS
from dinov2_kernels.photometric import reference

LARGE = ("torch", "dinov2_kernels", "pyarrow", "cv2", "faiss", "skimage", "onnxruntime", "ray", "aiohttp")
"""Modules that take tenths of a second or more to import, and those that import one of them."""

HELPS = [
    "",
    "--help",
    *(f"{command} --help" for command in ("pretrain", "distill", "adapt", "export", "embed", "curate", "index")),
    "info --help",
    "pretrain photos --help",
    "pretrain vits14 --help",
    "curate run laptop --help",
    "curate run lvd142m --help",
]
ERRORS = [
    "nonsense",
    "pretrain nonsense",
    "pretrain vits14 --nonsense 3",
    "pretrain vits14 --steps many",
    "pretrain vits14 --optim.beta1 3",
    "pretrain photos --output FILE",
    "pretrain photos --output FULL",
    "pretrain vits14 --data.root MISSING",
    "pretrain photos --initial_weights MISSING",
    "pretrain photos --probe MISSING",
    "distill --teacher MISSING --student vit_small",
    "adapt --from MISSING --image_size 32",
    "export MISSING out",
    "embed MISSING photos out",
    "embed FILE MISSING out",
    "info nonsense",
    "curate nonsense laptop",
    "curate run nonsense",
    "curate run MISSING.json",
    "curate run laptop --nonsense 3",
    "curate run laptop --dedup.threshold 3",
    "curate run laptop --images MISSING --output FILE",
    "curate run laptop --images MISSING --output out",
    "index MISSING",
]
CODE = """
import contextlib, io, json, sys
from dinov2.cli import main
large, commands = json.loads(sys.argv[1])
for command in commands:
    code, said = None, io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = main(command.split())
        except SystemExit as exit_:
            code = exit_.code
    print(json.dumps([command, code, [name for name in large if name in sys.modules]]))
"""


def test_help_and_errors_come_before_large_imports(tmp_path: Path) -> None:
    (tmp_path / "FILE").write_text("a file")
    (tmp_path / "FULL").mkdir()
    (tmp_path / "FULL" / "a").write_text("a file")
    told = json.dumps([LARGE, [*HELPS, *ERRORS]])
    run = subprocess.run([sys.executable, "-c", CODE, told], cwd=tmp_path, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert [row for row in rows if row[2]] == []
    assert [command for command, code, _ in rows if not code] == HELPS
    assert len(rows) == len(HELPS) + len(ERRORS)


@pytest.mark.parametrize("name", ["data", "evaluate", "models", "objectives", "recipes", "train"])
def test_packages_have_all_their_names(name: str) -> None:
    package = import_module(f"dinov2.{name}")
    assert [missing for missing in package.__all__ if not hasattr(package, missing)] == []
    with pytest.raises(AttributeError, match=f"module 'dinov2.{name}' has no attribute 'nonsense'"):
        _ = package.nonsense


def test_the_blur_of_rgb_images() -> None:
    assert BLUR_TAPS == reference.BLUR_TAPS
