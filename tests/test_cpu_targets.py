"""Compiling the CPU kernels for several targets, and choosing one when they run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from dinov2_kernels import _library
from tests.cpu_targets import ALL_TARGETS, run_python

LIBRARY = Path(_library.__file__).parent / "_native_cpu.so"


def test_unknown_target() -> None:
    call = "import torch, dinov2_kernels as dk; dk.sinkhorn_bias(torch.zeros(2, 2), 0.07)"
    run = run_python("-c", call, DINOV2_KERNELS_CPU_TARGET="avx1024")
    names = "generic, avx2, avx512, avx512bf16 or amx"
    assert re.search(f"DINOV2_KERNELS_CPU_TARGET: expected {names}, .* got avx1024", run.stderr)


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
def test_wide_instructions_stay_in_their_targets() -> None:
    """An inline function compiled for AVX-512 and kept by the linker for everyone would crash older processors."""
    listing = subprocess.run(["objdump", "-dC", "--no-show-raw-insn", LIBRARY], capture_output=True, text=True).stdout
    functions = re.split(r"^[0-9a-f]+ <(.*)>:$", listing, flags=re.MULTILINE)[1:]
    widest: dict[str, set[str]] = {}
    bf16: set[str] = set()
    tiles: set[str] = set()
    for name, body in zip(functions[::2], functions[1::2], strict=True):
        target = next((target for target in ALL_TARGETS if f"{target}::" in name), "common")
        widest.setdefault(target, set()).update(re.findall(r"%([yz]mm|k)\d", body))
        if re.search(r"\bv(dpbf16|cvtne)", body):
            bf16.add(target)
        if re.search(r"%tmm|tilecfg", body):
            tiles.add(target)
    assert widest["common"] == set()
    assert bf16 <= {"avx512bf16", "amx"}
    assert tiles <= {"amx"}
    if os.uname().machine == "x86_64":
        assert bf16 == {"avx512bf16", "amx"}
        assert tiles == {"amx"}
        assert widest["generic"] == set()
        assert widest["avx2"] == {"ymm"}
        assert "zmm" in widest["avx512"]
        assert "zmm" in widest["avx512bf16"]
        assert "zmm" in widest["amx"]
