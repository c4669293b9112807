"""Build the compiled extensions with ninja. Everything else about the package stands in pyproject.toml.

Three extensions, each of which the package can do without:

=====================  ====================================  ======================================================
dinov2_kernels/        sources                               built
=====================  ====================================  ======================================================
_host.*.so             csrc/host.cpp                         with a C++ compiler (pybind11; for one Python version)
_native_cpu.so         csrc/*/cpu.cpp, cpu_kernels.cpp       with a C++ compiler (stable ABI: PyTorch 2.10 and later)
_native_cuda.so        csrc/*/cuda.cu                        with nvcc and a CUDA build of PyTorch (stable ABI)
=====================  ====================================  ======================================================

Environment: CXX names the compiler; DINOV2_KERNELS_CUDA=1 compiles the CUDA sources beside a CPU build of PyTorch too,
=0 leaves them out; TORCH_CUDA_ARCH_LIST (default "8.0;9.0a") names the GPU architectures.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
CSRC = ROOT / "csrc"

CPU_TARGETS = {"generic": ""}
if platform.machine() in ("x86_64", "AMD64"):
    avx2 = "-mavx2 -mfma -mf16c"
    avx512 = f"{avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl"
    avx512bf16 = f"{avx512} -mavx512bf16"
    amx = f"{avx512bf16} -mamx-tile -mamx-bf16"
    CPU_TARGETS |= {"avx2": avx2, "avx512": avx512, "avx512bf16": avx512bf16, "amx": amx}

TORCH_2_10 = "-DTORCH_TARGET_VERSION=0x020a000000000000"
CXX_FLAGS = "-std=c++20 -O3 -fPIC -Wall -fvisibility=hidden"
NVCC_FLAGS = "-std=c++20 -O3 --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden -Xptxas -v"


def find_compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++")) if sys.platform == "linux" else None


def find_nvcc() -> str | None:
    """The CUDA compiler to use, or None where the CUDA sources are to be left out."""
    nvcc = shutil.which(str(Path(os.environ.get("CUDA_HOME", ""), "bin", "nvcc"))) or shutil.which("nvcc")
    match os.environ.get("DINOV2_KERNELS_CUDA"):
        case "0":
            return None
        case "1" if nvcc is None:
            sys.exit("DINOV2_KERNELS_CUDA=1 demands the CUDA kernels, but nvcc is neither on PATH nor in CUDA_HOME/bin")
        case "1":
            return nvcc
        case None:
            import torch

            return nvcc if torch.version.cuda else None
        case other:
            sys.exit(f"DINOV2_KERNELS_CUDA: expected 0, 1 or unset, got {other!r}")


def cuda_architectures() -> str:
    """nvcc's flags for TORCH_CUDA_ARCH_LIST: "9.0a" gives machine code for sm_90a, "9.0+PTX" its PTX as well."""
    flags = []
    for entry in os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0a").replace(" ", ";").split(";"):
        number = entry.removesuffix("+PTX").replace(".", "")
        codes = f"[sm_{number},compute_{number}]" if entry.endswith("+PTX") else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={codes}")
    return " ".join(flags)


class NinjaBuild(build_ext):
    """Compile all extensions in one ninja run: in parallel, and only what changed."""

    def get_ext_filename(self, fullname: str) -> str:
        if "_native_" in fullname:  # loaded by torch.ops.load_library, not by Python's import
            return fullname.replace(".", os.sep) + ".so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        import ninja

        build = Path(self.build_temp).resolve()
        if self.editable_mode:  # setuptools gives a temporary folder, in which everything would be compiled each time
            build = ROOT / "build" / f"temp.{self.plat_name}-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        with open(build / "build.ninja", "w") as file:
            self.write_ninja(ninja.ninja_syntax.Writer(file, width=120), build)
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        subprocess.run([Path(ninja.BIN_DIR, "ninja"), "-C", build, *jobs], check=True)

    def write_ninja(self, out: object, build: Path) -> None:
        import pybind11
        import torch

        include = Path(torch.__file__).parent / "include"
        stable_abi = f"-I{CSRC} -isystem {include} -isystem {include / 'torch/csrc/api/include'} {TORCH_2_10}"
        python = f"-I{CSRC} -isystem {pybind11.get_include()} -isystem {sysconfig.get_path('include')}"
        libraries = f"-L{include.parent / 'lib'} -ltorch_cpu -lc10"
        cxx, nvcc = find_compiler(), find_nvcc()
        rules = {
            "cxx": f"{cxx} -MMD -MF $out.d {CXX_FLAGS} $flags -c $in -o $out",
            "nvcc": f"{nvcc} -MMD -MF $out.d {NVCC_FLAGS} {cuda_architectures()} $flags -c $in -o $out",
            "link": f"{cxx} -shared $in -o $out $libraries",
            "nvcc_link": f"{nvcc} -shared -cudart static $in -o $out $libraries",
        }
        for name, command in rules.items():
            dependencies = {"depfile": "$out.d", "deps": "gcc"} if "-MMD" in command else {}
            out.rule(name, command, description=f"{name} $out", **dependencies)

        def compile(rule: str, source: Path, flags: str, variant: str = "") -> str:
            target = build / source.relative_to(ROOT).with_suffix(f".{variant}o")
            return out.build(str(target), rule, str(source), variables={"flags": flags})[0]

        def compile_for_cpu(source: Path) -> list[str]:
            if source.stem != "cpu_kernels":
                return [compile("cxx", source, stable_abi)]
            return [
                compile("cxx", source, f"{stable_abi} -DCPU_TARGET={name} {flags}", f"{name}.")
                for name, flags in CPU_TARGETS.items()
            ]

        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name)).resolve()
            target.parent.mkdir(parents=True, exist_ok=True)
            sources = [ROOT / source for source in extension.sources]
            match extension.name.rpartition(".")[2]:
                case "_host":  # rounds without fused multiply-add: masks are the same bits on every processor
                    objects = [compile("cxx", source, f"{python} -ffp-contract=off", "host.") for source in sources]
                    out.build(str(target), "link", objects)
                case "_native_cpu":
                    objects = [object for source in sources for object in compile_for_cpu(source)]
                    out.build(str(target), "link", objects, variables={"libraries": libraries})
                case "_native_cuda":
                    objects = [compile("nvcc", source, stable_abi, "cuda.") for source in sources]
                    out.build(str(target), "nvcc_link", objects, variables={"libraries": libraries})


def sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in CSRC.glob(pattern))


def extensions() -> list[Extension]:
    if find_compiler() is None:
        print("No C++ compiler (CXX): installing without compiled kernels; dinov2_kernels.info() tells what runs.")
        return []
    found = [
        Extension("dinov2_kernels._host", sources("host.cpp", "common/*.cpp")),
        Extension("dinov2_kernels._native_cpu", sources("common/*.cpp", "*/cpu.cpp", "*/cpu_kernels.cpp")),
    ]
    if find_nvcc() is not None:
        found.append(Extension("dinov2_kernels._native_cuda", sources("*/cuda.cu")))
    return found


setup(ext_modules=extensions(), cmdclass={"build_ext": NinjaBuild})
