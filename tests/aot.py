"""What the compilers say about an operator's GPU kernels, without a GPU: registers, spills, stack, shared memory.

Triton kernels are compiled as they are launched: an operator's ``tests/<op>/cases.py`` has a generator ``launches()``
that calls its launchers on meta tensors, and a stand-in for Triton's driver compiles instead of launching. CUDA C++ is
compiled from ``csrc/<op>/cuda.cu`` by nvcc; ``CUDA_THREADS`` in ``cases.py`` are the threads of its blocks. Both end in
ptxas, whose report is read. What Triton's cache holds is compiled again: the cache keeps no report.

    python -m tests.aot sinkhorn > benchmarks/results/gpu_kernels/sinkhorn.md        prints all of it as a page
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests import prepared

ROOT = Path(__file__).parents[1]
TRITON_TARGETS = (80, 90)
CUDA_TARGETS = ("80", "90a")
REGISTERS = 65536  # of a multiprocessor
INSTRUCTION_BYTES = 16
ALWAYS = ("threads", "registers", "spills", "shared")  # columns of the table; matrix instructions where there are any
SHARED_BYTES = {"80": 163 * 1024, "90": 227 * 1024}  # that a block may use


@dataclass(frozen=True)
class Usage:
    """What one kernel uses: per thread registers, and bytes of spills and stack; per block bytes of shared memory.

    hgmma and hmma count the matrix instructions in its machine code, of a Hopper warpgroup and of a warp (Triton only).
    """

    kernel: str
    target: str
    threads: int
    registers: int
    spills: int
    stack: int
    shared: int
    hgmma: int = 0
    hmma: int = 0

    def check(self) -> None:
        """Assert that nothing spills and that one block, at least, fits on a multiprocessor."""
        assert self.spills == 0, f"{self}: spills"
        assert self.stack == 0, f"{self}: a stack, so local memory"
        assert self.registers * self.threads <= REGISTERS, f"{self}: registers"
        assert self.shared <= SHARED_BYTES[self.target[:2]], f"{self}: shared memory"


def parse_ptxas(report: str, threads: int) -> list[Usage]:
    """Read what ``ptxas -v`` reports for each kernel."""
    usages = []
    for section in report.split("Compiling entry function ")[1:]:
        name, target = re.match(r"'(.+?)' for 'sm_(\w+)'", section).groups()

        def number(pattern: str, section: str = section) -> int:
            found = re.search(pattern, section)
            return int(found[1]) if found else 0

        spills = number(r"(\d+) bytes spill stores") + number(r"(\d+) bytes spill loads")
        stack, shared = number(r"(\d+) bytes stack frame"), number(r"(\d+) bytes smem")
        usages.append(Usage(name, target, threads, number(r"Used (\d+) registers"), spills, stack, shared))
    assert usages, f"ptxas reported no kernel:\n{report}"
    return usages


# ------------------------------------------------------------------------------------------------------------- CUDA C++


def find_nvcc() -> str | None:
    """The CUDA compiler, or None where it is not installed; a test that needs it may then be skipped, but not in CI."""
    nvcc = shutil.which(str(Path(os.environ.get("CUDA_HOME", ""), "bin/nvcc"))) or shutil.which("nvcc")
    if nvcc is None and os.environ.get("CI"):
        raise RuntimeError("nvcc is neither on PATH nor in CUDA_HOME/bin, and CI must compile the CUDA kernels")
    return nvcc


def compile_cuda(operator: str, target: str, threads: int) -> list[Usage]:
    """Compile csrc/<operator>/cuda.cu for sm_<target>, in which kernels run with `threads` threads a block."""
    include = Path(torch.__file__).parent / "include"
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", f"-gencode=arch=compute_{target},code=sm_{target}"]
    flags += ["-Xptxas", "-v", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{ROOT / 'csrc'}"]
    flags += ["-isystem", str(include), "-isystem", str(include / "torch/csrc/api/include")]
    with tempfile.TemporaryDirectory() as folder:
        output = ["-cubin", "-o", f"{folder}/cuda.cubin"]
        report = run([find_nvcc(), *flags, *output, str(ROOT / "csrc" / operator / "cuda.cu")])
    return parse_ptxas(readable(report), threads)


def readable(report: str) -> str:
    """Kernels' names without mangling, namespaces and parameters: column_mass_kernel<BFloat16>."""
    names = set(re.findall(r"entry function '(\w+)'", report))
    for name in names:
        demangled = run(["c++filt", name]).strip()
        short = re.search(r"(\w+)(?:<(?:\w+::)*(\w+)[^(]*>)?\((?!anonymous)", demangled)
        report = report.replace(f"'{name}'", f"'{short[1]}<{short[2]}>'" if short[2] else f"'{short[1]}'")
    return report


# --------------------------------------------------------------------------------------------------------------- Triton


def compile_triton(operator: str, target: int, every: int | None = None) -> list[Usage]:
    """Compile what the operator's ``launches()`` launch, in a process without Triton's interpreter.

    One launch in ``every`` of each kernel is compiled, and always the first one. By default, these are all launches for
    the newest target and one in six for the others, where little fails that does not fail on the newest.
    """
    every = every or (1 if target == TRITON_TARGETS[-1] else 6)
    program = f"from tests import aot; aot.print_launches({operator!r}, {target}, {every})"
    output = prepared.run(program)
    return [Usage(**usage) for usage in json.loads(output.splitlines()[-1])]


def stand_in_for_a_gpu(target: int) -> None:
    """Let Triton and the kernels' launchers, in this process, believe in a GPU of sm_<target>."""
    import triton
    from triton.backends.compiler import GPUTarget

    torch.cuda.get_device_capability = lambda device=None: divmod(target, 10)
    triton.runtime.driver.set_active(
        SimpleNamespace(
            get_current_target=lambda: GPUTarget("cuda", target, 32),
            get_current_device=lambda: 0,
            get_current_stream=lambda device: 0,
        )
    )


def print_launches(operator: str, target: int, every: int) -> None:
    print(json.dumps([asdict(usage) for usage in compile_launches(operator, target, every)]))


def compile_launches(operator: str, target: int, every: int) -> list[Usage]:
    import triton

    def compile_instead(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        launched[self] += 1
        if (launched[self] - 1) % every:
            return
        with contextlib.redirect_stdout(io.StringIO()) as report:
            kernel = launch(self, *args, grid=grid, warmup=True, **options)
        compiled.setdefault(kernel.hash, (kernel, report.getvalue()))

    launched: Counter[Any] = Counter()
    compiled: dict[str, tuple[Any, str]] = {}
    stand_in_for_a_gpu(target)
    # Triton prints ptxas's report where it compiles, but not where it finds a kernel in its cache.
    triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
    launch, triton.JITFunction.run = triton.JITFunction.run, compile_instead
    for _ in importlib.import_module(f"tests.{operator}.cases").launches():
        pass
    usages = [read_compiled(kernel, report) for kernel, report in compiled.values()]
    counted = matrix_instructions([kernel.asm["cubin"] for kernel, _ in compiled.values()], usages[0].target)
    return [replace(usage, **counts) for usage, counts in zip(usages, counted, strict=True)]


def read_compiled(kernel: Any, report: str) -> Usage:
    (usage,) = parse_ptxas(report, threads=32 * kernel.metadata.num_warps)
    names = kernel.src.fn.arg_names
    first_pointer = next(kind.lstrip("*") for kind in kernel.src.signature.values() if kind.startswith("*"))
    constants = {names[path[0]]: value for path, value in kernel.src.constants.items()}
    shape = [f"{name}={value}" for name, value in constants.items() if name.isupper()]
    label = f"{usage.kernel}<{', '.join([first_pointer, *shape])}>"
    return replace(usage, kernel=label, shared=kernel.metadata.shared)  # Triton's figure: static and dynamic together


def matrix_instructions(cubins: list[bytes], target: str) -> list[dict[str, int]]:
    """Count HGMMA and HMMA in each kernel. The disassembler reads all at once: its start takes longest by far."""
    import triton

    codes = [machine_code(cubin) for cubin in cubins]
    with tempfile.NamedTemporaryFile() as file:
        file.write(b"".join(codes))
        file.flush()
        disassembler = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
        listing = run([str(disassembler), "-b", f"SM{target}", file.name])
    instructions = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/(.*)", listing, flags=re.MULTILINE)
    assert len(instructions) * INSTRUCTION_BYTES == sum(map(len, codes)), listing[:1000]
    counted, start = [], 0
    for code in codes:
        end = start + len(code) // INSTRUCTION_BYTES
        found = Counter(re.findall(r"\b(HGMMA|HMMA)\.", "\n".join(instructions[start:end])))
        counted.append({"hgmma": found["HGMMA"], "hmma": found["HMMA"]})
        start = end
    return counted


def machine_code(cubin: bytes) -> bytes:
    """The one section .text.<kernel> of an ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 40)
    size, count, of_names = struct.unpack_from("<3H", cubin, 58)
    # name, type, flags, address, offset, length
    sections = [struct.unpack_from("<2I4Q", cubin, table + index * size) for index in range(count)]
    names = sections[of_names][4]
    (code,) = (
        cubin[offset : offset + length]
        for name, *_, offset, length in sections
        if cubin.startswith(b".text.", names + name)
    )
    return code


# --------------------------------------------------------------------------------------------------------------- output


def run(command: list[str], **options: Any) -> str:
    """What the command prints, on either stream; an error that shows it where the command fails."""
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed:\n{result.stdout}")
    return result.stdout


def as_markdown(usages: list[Usage]) -> str:
    """One row a kernel; a figure per target, in their order, where they differ."""
    columns = {
        "threads": "threads",
        "registers": "registers",
        "spills": "spills, bytes",
        "shared": "shared memory, bytes",
        "hgmma": "HGMMA",
        "hmma": "HMMA",
    }
    shown = {name: title for name, title in columns.items() if name in ALWAYS or any(getattr(u, name) for u in usages)}
    rows = [f"| kernel | targets | {' | '.join(shown.values())} |", f"|---|---|{'---:|' * len(shown)}"]
    for kernel in dict.fromkeys(usage.kernel for usage in usages):
        same = [usage for usage in usages if usage.kernel == kernel]
        targets = ", ".join(dict.fromkeys(f"sm_{usage.target}" for usage in same))
        fields = [[getattr(u, name) for u in same] for name in shown]
        figures = " | ".join(", ".join(map(str, dict.fromkeys(field))) for field in fields)
        rows.append(f"| `{kernel}` | {targets} | {figures} |")
    return "\n".join(rows)


def as_page(operator: str, usages: list[Usage]) -> str:
    """What stands in benchmarks/results/gpu_kernels/<operator>.md."""
    import triton

    compilers = f"Triton {triton.__version__}"
    if (ROOT / "csrc" / operator / "cuda.cu").exists():
        compilers += f" and nvcc {re.search(r'release ([0-9.]+)', run([find_nvcc(), '--version']))[1]}"
    return f"""# The GPU kernels of {operator}, as compiled

{compilers} made them, without a GPU: `python -m tests.aot {operator}` prints this page. The shapes stand in
`launches()` in `tests/{operator}/cases.py`. A name shows the dtype of the first argument, and the kernel's constants. A
field has several figures where they differ from target to target, or where a kernel has several forms, with and without
an optional argument for example.

{as_markdown(usages)}"""


def main(arguments: list[str]) -> None:
    operator = arguments[0]
    usages = [usage for target in TRITON_TARGETS for usage in compile_triton(operator, target, every=1)]
    if (ROOT / "csrc" / operator / "cuda.cu").exists():
        threads = importlib.import_module(f"tests.{operator}.cases").CUDA_THREADS
        usages += [usage for target in CUDA_TARGETS for usage in compile_cuda(operator, target, threads)]
    print(as_page(operator, usages))


if __name__ == "__main__":
    main(sys.argv[1:])
