"""What `make gpu` does on a machine with a GPU, done on one without: every phase, file and table but the values."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpu.__main__ import PHASES, ROOT
from gpu.outcomes import read_junit
from gpu.verify import record_junit

MOST_KERNELS = 900
FILES = ["bench.json", "junit.xml", "kernels.txt", "log.txt", "profile.txt", "summary.md", "versions.json"]

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU there is nothing to rehearse")


def run(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gpu", *map(str, arguments)]
    environment = {**os.environ, **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@without_gpu
def test_without_a_gpu_one_line_says_so() -> None:
    result = run()
    assert result.returncode == 1
    assert result.stdout.startswith("no NVIDIA GPU")
    assert result.stdout.count("\n") == 1
    assert result.stderr == ""


def test_without_pytorch_one_line_says_so(tmp_path: Path) -> None:
    """The Python of a machine without a GPU may have none."""
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\")")
    result = run(PYTHONPATH=str(tmp_path))
    assert result.returncode == 1
    assert result.stdout.startswith(f"no NVIDIA GPU: {sys.executable} has no PyTorch (No module named 'torch')")
    assert "GPU_PYTHON" in result.stdout
    assert result.stdout.count("\n") == 1
    assert result.stderr == ""


@pytest.mark.parametrize("option", ["--phases", "--only"])
def test_an_unknown_name_is_an_error_that_lists_the_known_ones(option: str) -> None:
    result = run(option, "koleo,smok" if option == "--only" else "smok")
    assert result.returncode == 2
    assert f"{option}: expected some of " in result.stderr
    assert "got smok" in result.stderr


@without_gpu
@pytest.mark.timeout(900)
def test_everything_but_the_values(tmp_path: Path) -> None:
    result = run("--rehearse", "--limit", 850, "--output", tmp_path)
    log = (tmp_path / "log.txt").read_text()
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}\n{log[-6000:]}"
    assert sorted(path.name for path in tmp_path.iterdir()) == FILES

    results, properties = read_junit(tmp_path / "junit.xml")
    assert {x.outcome for x in results} == {"passed"}
    operators = {path.parent.name for path in ROOT.glob("tests/*/test_gpu.py")}
    assert {x.operator for x in results} == operators
    assert properties["torch"] == torch.__version__
    with pytest.raises(ValueError, match="stand-in"):
        record_junit(tmp_path / "junit.xml")

    benchmarks = json.loads((tmp_path / "bench.json").read_text())
    measured = {Path(name.partition("::")[0]).stem for name in benchmarks["results"]}
    assert measured == {path.stem for path in ROOT.glob("benchmarks/*_gpu.py")}
    ours = [x for x in benchmarks["results"].values() if "predicted_ms" in x]
    assert all({"speedup", "baseline_ms", "floor_ms", "milliseconds"} <= x.keys() for x in ours)
    assert len(ours) > 30

    summary = (tmp_path / "summary.md").read_text()
    for phase in PHASES:
        assert f"| {phase} |" in summary
    for operator in operators:
        assert f"| {operator} | triton | yes |" in summary
    assert "Time of Triton over that of CUDA C++" in summary
    assert "What failed" not in summary

    kernels = (tmp_path / "kernels.txt").read_text().splitlines()
    assert len(kernels) <= MOST_KERNELS, "too many to compile in the minutes of a GPU"


@without_gpu
def test_some_phases_of_one_operator(tmp_path: Path) -> None:
    """What a second run is for; and a phase whose time is up says so and ends nothing else."""
    result = run("--rehearse", "--limit", 3, "--output", tmp_path, "--phases", "tests,smoke", "--only", "swiglu")
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    assert [line.split()[0] for line in lines[:2]] == ["smoke", "tests"]
    assert all("time was up" in line for line in lines[:2])
    assert (tmp_path / "summary.md").read_text().count("time was up") == 2
