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
    root = Path(torch.__file__).parent
    register = [f"-DDINOV2_CUDA_NAMESPACE={NAMESPACE}", "-DDINOV2_CUDA_KEY=CPU"]
    headers = ["-isystem", f"{root}/include", "-isystem", f"{root}/include/torch/csrc/api/include"]
    libraries = [f"-L{root}/lib", "-ltorch_cpu", "-lc10"]
    stable_abi = "-DTORCH_TARGET_VERSION=0x020a000000000000"
    compile_cuda(source, target, sanitize, ["-shared", "-fPIC", *register, *headers, stable_abi], libraries)


def build_program(source: Path, target: Path, *, sanitize: bool) -> None:
    compile_cuda(source, target, sanitize, [], ["-lpthread"])


def compile_cuda(source: Path, target: Path, sanitize: bool, flags: list[str], libraries: list[str]) -> None:
    command = [COMPILER, *FLAGS, *(SANITIZE if sanitize else []), *flags, source, "-o", target, *libraries]
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}  # not under sanitizers
    subprocess.run(command, check=True, env=environment)


def sanitizer_environment() -> dict[str, str]:
    """The environment in which Python can load a library built with `sanitize`."""

    def find(library: str) -> str:
        command = [COMPILER, f"-print-file-name={library}"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    preload = f"{find('libasan.so')} {find('libubsan.so')}"
    return {**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": "detect_leaks=0"}
