"""The stand-in for CUDA accepts a correct kernel and reports every planted mistake."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests import cuda_shim

# What the stand-in by itself says of a mistake, in at least one of the two orders in which threads run.
REPORTS = {
    "none": "the values are right",
    "missing_barrier": "the values are wrong",
    "missing_grid_barrier": "the values are wrong",
    "skipped_barrier": "thread 3 waits at the grid barrier",
    "skipped_shuffle": "thread 5 has finished; thread 32 waits at __syncthreads",
    "skipped_grid_barrier": "some blocks wait at the grid barrier, others have finished",
    "divergent_barrier": "thread 32 waits at __syncthreads",
    "missing_cluster_barrier": "the values are wrong",
    "skipped_cluster_barrier": "some blocks wait at the cluster barrier, others have finished",
}
SANITIZER_REPORTS = {
    "none": "the values are right",
    "global_overrun": "heap-buffer-overflow",
    "dynamic_overrun": "heap-buffer-overflow",
    "static_overrun": "index 1 out of bounds",
    "misaligned_load": "misaligned address",
    "remote_overrun": "heap-buffer-overflow",
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("planted") / "planted"
    cuda_shim.build_program(cuda_shim.SHIM / "planted.cu", target, sanitize=False)
    return target


@pytest.fixture(scope="module")
def sanitized_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("planted") / "planted_sanitized"
    cuda_shim.build_program(cuda_shim.SHIM / "planted.cu", target, sanitize=True)
    return target


def reports(program: Path, bug: str) -> list[str]:
    """What the program says when threads run in the order of their numbers, and backwards."""
    outputs = []
    for order in ("forward", "reverse"):
        environment = {**os.environ, "CUDA_SHIM_ORDER": order, "ASAN_OPTIONS": "detect_leaks=0"}
        result = subprocess.run([program, bug], env=environment, capture_output=True, text=True, timeout=60)
        outputs.append(result.stdout + result.stderr)
        assert (result.returncode == 0) == ("the values are right" in outputs[-1])
    return outputs


@pytest.mark.parametrize("bug", REPORTS)
def test_reports_the_mistake(program: Path, bug: str) -> None:
    assert any(REPORTS[bug] in report for report in reports(program, bug))


@pytest.mark.parametrize("bug", SANITIZER_REPORTS)
def test_the_sanitizers_report_the_mistake(sanitized_program: Path, bug: str) -> None:
    assert all(SANITIZER_REPORTS[bug] in report for report in reports(sanitized_program, bug))


def test_a_correct_kernel_is_right_in_both_orders(program: Path) -> None:
    assert all("the values are right" in report for report in reports(program, "none"))
