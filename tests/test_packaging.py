"""The package as it is shipped: wheel and source distribution, with and without a compiler, away from the checkout."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import ninja
import pytest

ROOT = Path(__file__).parent.parent

SMOKE_TEST = """
import json, pathlib, sys, torch
import dinov2_kernels as dk
from dinov2.data import sample_block_masks
from dinov2.models import vit_small

assert pathlib.Path(dk.__file__).is_relative_to(sys.argv[1]), dk.__file__
logits = torch.randn(12, 50)
torch.testing.assert_close(dk.sinkhorn_knopp(logits, 0.07).sum(dim=1), torch.ones(12))
masks = sample_block_masks((14, 14), [50, 0], seed=1)
assert 40 < masks[0].sum() <= 50 and masks[1].sum() == 0
assert vit_small(depth=1)(torch.randn(1, 3, 28, 28)).shape == (1, 384)
print(json.dumps(dk.info()))
"""


def run(*command: object, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def build(kind: str, source: Path, output: Path, **environment: str) -> Path:
    run(sys.executable, "-m", "build", "--no-isolation", f"--{kind}", "-o", output, source, cwd=output, **environment)
    return next(output.glob("*.whl" if kind == "wheel" else "*.tar.gz"))


def info_of_installed(wheel: Path, place: Path) -> dict[str, object]:
    """Install a wheel into a clean virtual environment, run the smoke test away from everything, return its info().

    The dependencies are those of this Python, by a path file: what it has installed in editable mode stays out.
    """
    environment = place / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=place)
    python = environment / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=place).strip())
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", wheel, cwd=place)
    return dict(json.loads(run(python, "-c", SMOKE_TEST, environment, cwd=environment)))


@pytest.fixture(scope="module")
def unpacked_sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution, built from the checkout and unpacked."""
    place = tmp_path_factory.mktemp("sdist")
    archive = build("sdist", ROOT, place, DINOV2_KERNELS_CUDA="0")
    with tarfile.open(archive) as tar:
        tar.extractall(place, filter="data")
    return place / archive.name.removesuffix(".tar.gz")


@pytest.fixture(scope="module")
def quick_compiler(unpacked_sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A compiler for the unpacked source distribution that spares what the build of the checkout has done already."""
    place = tmp_path_factory.mktemp("compiler")
    commands, compiler = place / "commands", place / "c++"
    builds = [path.parent for path in ROOT.glob("build/temp.*/build.ninja")]  # none, if the checkout is not built here
    tool = Path(ninja.BIN_DIR, "ninja")
    commands.write_text("".join(run(tool, "-t", "commands", cwd=build) for build in builds))
    script = ROOT / "tests" / "quick_compiler.py"
    fixed = [sys.executable, "-S", script, os.environ.get("CXX", "c++"), unpacked_sdist, commands]
    compiler.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, fixed))} "$@"\n')
    compiler.chmod(0o755)
    return str(compiler)


@pytest.fixture(scope="module")
def wheel(unpacked_sdist: Path, quick_compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that is compiled from the unpacked source distribution."""
    place = tmp_path_factory.mktemp("wheel")
    return build("wheel", unpacked_sdist, place, CXX=quick_compiler, DINOV2_KERNELS_CUDA="0")


@pytest.mark.xdist_group("packaging")
def test_wheel_from_the_source_distribution_runs_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "dinov2_kernels/_native_cpu.so" in names
    assert any(name.startswith("dinov2_kernels/_host.") for name in names)
    assert not any(name.startswith(("tests/", "csrc/", "benchmarks/")) for name in names)
    info = info_of_installed(wheel, tmp_path)
    assert info["native_cpu"] == "loaded"
    assert {operator["cpu"] for operator in info["operators"].values()} == {"native"}  # type: ignore[attr-defined]


@pytest.mark.xdist_group("packaging")
@pytest.mark.usefixtures("wheel")
def test_an_editable_install_compiles_only_what_changed(
    unpacked_sdist: Path, quick_compiler: str, tmp_path: Path
) -> None:
    """It uses the objects of the build before it. setuptools itself would give it a folder without any."""

    def compiled() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in unpacked_sdist.glob("build/**/*.o")}

    before = compiled()
    (unpacked_sdist / "csrc" / "koleo" / "cpu.cpp").touch()
    hook = f"import setuptools.build_meta as backend; backend.build_editable({str(tmp_path)!r})"
    run(sys.executable, "-c", hook, cwd=unpacked_sdist, CXX=quick_compiler, DINOV2_KERNELS_CUDA="0")
    again = [path for path, time in compiled().items() if time != before.get(path)]
    assert [path.parts[-2:] for path in again] == [("koleo", "cpu.o")]
    libraries = list(unpacked_sdist.glob("dinov2_kernels/*.so"))
    assert len(libraries) == 2
    for library in libraries:
        library.unlink()  # other tests build from this folder, too


@pytest.mark.xdist_group("packaging")
def test_installs_and_runs_without_a_compiler(unpacked_sdist: Path, tmp_path: Path) -> None:
    wheel = build("wheel", unpacked_sdist, tmp_path, CXX="no-such-compiler", DINOV2_KERNELS_CUDA="0")
    assert not any(name.endswith(".so") for name in zipfile.ZipFile(wheel).namelist())
    info = info_of_installed(wheel, tmp_path)
    assert info["native_cpu"] == "not built"
    assert info["host"] == "not built"
    assert {operator["cpu"] for operator in info["operators"].values()} == {"reference"}  # type: ignore[attr-defined]


def test_a_demanded_cuda_build_without_nvcc_is_an_error(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path)],
        cwd=ROOT,
        env={"DINOV2_KERNELS_CUDA": "1", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert "nvcc is neither on PATH nor in CUDA_HOME/bin" in result.stderr
