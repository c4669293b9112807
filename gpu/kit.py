"""The kit: files built in advance for a machine with a GPU, the compiled extensions and Triton's cache of kernels.

    python -m gpu.kit make          build the kit in advance, with the machine's Python and packages; needs no GPU
    python -m gpu.kit load FILE     on that machine: unpack the kit, or build what does not load; versions into FILE
    python -m gpu.kit report FILE   only write the versions

The kit is the folder ``.gpu-kit``, which is copied with the checkout. If a part does not fit the machine, because it
has another PyTorch, Triton or source, the machine builds that part. This only costs time.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import time
from datetime import date
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
KIT = ROOT / ".gpu-kit"
CACHE = Path("/tmp/dinov2-kernels-triton")
"""Triton's cache, on both machines: its files hold absolute paths."""
ARCHITECTURE = "9.0a"
MOST_BYTES = 40 * 10**6
PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "pytest",
    "pytest-xdist",
    "pytest-timeout",
    "pytest-benchmark",
    "ninja",
    "pybind11",
)


def make() -> None:
    """Build the extensions, compile every kernel that the tests and benchmarks launch, and pack both."""
    start = time.perf_counter()
    shutil.rmtree(KIT, ignore_errors=True)
    shutil.rmtree(CACHE, ignore_errors=True)
    KIT.mkdir()
    build("--build-lib", str(KIT / "extensions"), "--build-temp", str(ROOT / "build/gpu-kit"))
    seconds_to_build = time.perf_counter() - start
    folder = KIT / "rehearsal"
    command = [sys.executable, "-m", "gpu", "--rehearse", "--compile", "--limit", "3600", "--output", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    kernels = len((folder / "kernels.txt").read_text().splitlines())
    shutil.rmtree(folder)
    with tarfile.open(KIT / "triton.tar.xz", "w:xz") as archive:
        archive.add(CACHE, arcname=".", filter=_only_what_is_loaded)
    seconds = time.perf_counter() - start
    (KIT / "kit.json").write_text(json.dumps({"kernels": kernels, "packages": versions()}, indent=1) + "\n")
    size = sum(path.stat().st_size for path in KIT.rglob("*") if path.is_file())
    print(
        f"kit: {size / 1e6:.1f} MB, {kernels} kernels, in {seconds:.0f} s, of which the extensions took"
        f" {seconds_to_build:.0f} s; {KIT.relative_to(ROOT)}"
    )
    if size > MOST_BYTES:
        sys.exit(f"kit: expected at most {MOST_BYTES / 1e6:.0f} MB, so that it can be copied, got {size / 1e6:.1f}")


def _only_what_is_loaded(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Keep only machine code and its description. A cache also has the earlier stages, which only people read."""
    return member if member.isdir() or member.name.endswith((".cubin", ".json")) else None


def load() -> None:
    """Unpack the kit if there is one, and build the extensions that do not load."""
    if (KIT / "kit.json").is_file():
        for extension in (KIT / "extensions/dinov2_kernels").iterdir():
            target = ROOT / "dinov2_kernels" / extension.name
            target.unlink(missing_ok=True)  # a process that has loaded the old file keeps it
            shutil.copy(extension, target)
        with tarfile.open(KIT / "triton.tar.xz") as archive:
            archive.extractall(CACHE, filter="data")
        print(f"kit: unpacked, made with {json.loads((KIT / 'kit.json').read_text())['packages']}")
    else:
        print("kit: there is no kit, so this machine builds everything")
    missing = extensions_that_do_not_load()
    if missing:
        print(f"kit: building the extensions that do not load: {missing}")
        build("--inplace")
        missing = extensions_that_do_not_load()
    print(f"kit: extensions {missing or 'loaded'}")


def build(*options: str) -> None:
    """Compile the extensions for the architecture of the kit."""
    environment = {**os.environ, "DINOV2_KERNELS_CUDA": "1", "TORCH_CUDA_ARCH_LIST": ARCHITECTURE}
    command = [sys.executable, "setup.py", "--quiet", "build_ext", *options]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def extensions_that_do_not_load() -> dict[str, str]:
    """Names of these extensions, with the reasons; in another process, because a loaded file cannot be replaced."""
    program = (
        "import json, dinov2_kernels as dk; i = dk.info();"
        "print(json.dumps({k: i[k] for k in ('native_cpu', 'native_cuda', 'host') if i[k] == 'not built' or"
        " str(i[k]).startswith('does not load')}))"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, capture_output=True, text=True)
    missing: dict[str, str] = json.loads(result.stdout.splitlines()[-1])
    return missing


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that a kit depends on."""
    found = {name: metadata.version(name) for name in PACKAGES if _is_installed(name)}
    return {"python": platform.python_version(), **found}


def _is_installed(package: str) -> bool:
    try:
        metadata.version(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def report(path: Path) -> None:
    """Write the versions, the GPU and its driver, and the library's info()."""
    import torch

    import dinov2_kernels as dk

    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.strip() if shutil.which(query[0]) else "none"
    machine = {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "date": str(date.today()),
        "driver": driver,
        "cuda": torch.version.cuda,
        "packages": versions(),
        "info": dk.info(),
    }
    path.write_text(json.dumps(machine, indent=1) + "\n")
    print(f"versions: {machine['packages']}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m gpu.kit", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", choices=["make", "load", "report"])
    parser.add_argument("file", nargs="?", type=Path, help="write the versions into this file")
    options = parser.parse_args()
    if options.what == "make":
        make()
        return
    if options.file is None:
        parser.error(f"{options.what}: expected a file for the versions")
    if options.what == "load":
        load()
    report(options.file)


if __name__ == "__main__":
    main()
