"""The CPU targets for which csrc/*/cpu_kernels.cpp is compiled, and how tests run the ones this processor has."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

import dinov2_kernels as dk

ALL_TARGETS = ("generic", "avx2", "avx512", "avx512bf16", "amx")

_WITH_AVX512 = 3 + torch.cpu._is_avx512_bf16_supported() + torch.cpu._is_amx_tile_supported()
_HAS = {"AVX2": 2, "AVX512": _WITH_AVX512}
TARGETS = ALL_TARGETS[: _HAS.get(torch.backends.cpu.get_cpu_capability(), 1)]
_HOST = dk.info()["host"]  # words where it is not built, which test_is_built of each operator is about
_RUNNING = _HOST["cpu_target"] if isinstance(_HOST, dict) else None
OTHER_TARGETS = tuple(target for target in TARGETS if target != _RUNNING)
"""Targets of this processor beside the one that this process runs."""


def run_python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env=os.environ | environment, capture_output=True, text=True, timeout=240
    )


def run_value_tests(file: str, target: str) -> None:
    """The tests of a file whose names hold "test_values", in a process that runs this target."""
    options = ("-q", "-k", "test_values", "-p", "no:xdist")
    run = run_python("-m", "pytest", *options, file, DINOV2_KERNELS_CPU_TARGET=target)
    assert run.returncode == 0, run.stdout
