"""Builds csrc/*/cuda.cu, and other CUDA sources, with a C++ compiler against the stand-in headers of this folder."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import torch

SHIM = Path(__file__).parent
CSRC = SHIM.parents[1] / "csrc"
NAMESPACE = "dinov2_kernels_shim"

COMPILER = os.environ.get("CXX", "g++")
FLAGS = ["-x", "c++", "-std=c++20", "-O1", "-g", "-Wall", "-Wno-unknown-pragmas", f"-I{SHIM}", f"-I{CSRC}"]
SANITIZE = ["-fsanitize=address,bounds,alignment", "-fno-sanitize-recover=bounds,alignment"]


def build_operators(source: Path, target: Path, *, sanitize: bool) -> None:
    """Compile a cuda.cu into a library that registers its operators for the CPU in the namespace `NAMESPACE`."""
    torch_root = Path(torch.__file__).parent
    run(
        [COMPILER, *FLAGS, *(SANITIZE if sanitize else []), "-shared", "-fPIC", str(source), "-o", str(target)]
        + [f"-DDINOV2_CUDA_NAMESPACE={NAMESPACE}", "-DDINOV2_CUDA_KEY=CPU", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
        + ["-isystem", str(torch_root / "include"), "-isystem", str(torch_root / "include/torch/csrc/api/include")]
        + [f"-L{torch_root / 'lib'}", "-ltorch_cpu", "-lc10"]
    )


def build_program(source: Path, target: Path, *, sanitize: bool) -> None:
    run([COMPILER, *FLAGS, *(SANITIZE if sanitize else []), str(source), "-o", str(target), "-lpthread"])


def run(command: list[str]) -> None:
    subprocess.run(command, check=True)


def sanitizer_environment() -> dict[str, str]:
    """The environment in which Python can load a library built with `sanitize`."""
    libraries = [
        subprocess.run([COMPILER, f"-print-file-name={name}"], check=True, capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    return {**os.environ, "LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
