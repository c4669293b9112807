"""Run all tests and benchmarks of this library on a GPU within a few minutes: ``make gpu``.

    python -m gpu --limit 420 --output gpu-results
    python -m gpu --phases tests,benchmarks --only sinkhorn,koleo      a second run, for the failures
    python -m gpu --rehearse                                           without a GPU, see gpu/stand_in.py

Each phase runs in its own processes. It has its own share of the time, and the time that earlier phases did not use.
Results are written at once, and if a phase fails, the next phases still run. The output folder has these files:

=============  =====================================================================================================
summary.md     the verified kernels, and all times with peers, floor and prediction
junit.xml      all tests; ``python -m gpu.verify junit.xml`` records the kernels that they verify
bench.json     all benchmarks, in the format of benchmarks/results
profile.txt    where a step of ViT-L/14 spends its time
versions.json  the machine and its packages
log.txt        what every phase printed
=============  =====================================================================================================

A rehearsal also writes kernels.txt, with a line for each kernel that would be compiled.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gpu import kit, outcomes
from gpu.summary import PhaseReport, table, write_summary

ROOT = kit.ROOT
GRACE = 5.0  # seconds between the signal that asks a phase to stop and the signal that kills it
MOST_WORKERS = 12


@dataclass(frozen=True)
class Phase:
    """A part of the run: its name, its share of the time, and a description of what it runs."""

    name: str
    share: float
    what: str


PHASES = {
    phase.name: phase
    for phase in (
        Phase("build", 20, "versions; unpacks the kit, or builds extensions that do not load"),
        Phase("smoke", 25, "each operator once, compared with its reference"),
        Phase("tests", 150, "tests/*/test_gpu.py, many at a time"),
        Phase("large", 50, "tests that take gigabytes or compile, one after the other"),
        Phase("benchmarks", 105, "benchmarks/*_gpu.py"),
        Phase("step", 45, "a whole pretraining step, and a packed step of plain PyTorch"),
        Phase("profile", 25, "the kernels that take most time in a pretraining step"),
    )
}
OF_ALL_OPERATORS = ("step", "profile")
"""Phases that are not about a single operator."""


class Session:
    """A run of some phases within a limit of time.

    Args:
        output: folder for the results.
        limit: seconds for all phases together.
        only: names of operators; empty for all operators.
        rehearse: use the stand-in instead of a GPU.
        compile: in a rehearsal, compile the kernels that would be launched.
    """

    def __init__(self, output: Path, limit: float, only: list[str], *, rehearse: bool, compile: bool) -> None:
        self.output, self.limit, self.only, self.rehearse = output.absolute(), limit, only, rehearse
        self.output.mkdir(parents=True, exist_ok=True)
        self.scratch = Path(tempfile.mkdtemp(prefix="dinov2-kernels-"))
        self.reports: list[PhaseReport] = []
        # Leave out the variables that a test run sets for its child processes: phases are separate runs, with the real
        # compiler.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        environment.pop("TRITON_INTERPRET", None)
        self.environment = {**environment, "TRITON_CACHE_DIR": str(kit.CACHE), "PYTHONUNBUFFERED": "1"}
        if rehearse:
            from gpu import stand_in

            self.environment[stand_in.LAUNCHES] = str(self.scratch)
            if compile:
                self.environment[stand_in.COMPILE] = "1"

    def run(self, phases: list[Phase]) -> bool:
        """Run the phases; True if all of them ended well."""
        start, shares, due = time.perf_counter(), sum(phase.share for phase in phases), 0.0
        with (self.output / "log.txt").open("w") as log:
            for phase in phases:
                due += self.limit * phase.share / shares
                self.reports.append(self._run_phase(phase, start + due - time.perf_counter(), log))
                print(self.reports[-1].line, flush=True)
                self._write_results()
        print(table(self._results(), self._benchmarks()))
        if self.rehearse:
            kernels = sorted({line for file in self.scratch.glob("*.txt") for line in file.read_text().splitlines()})
            (self.output / "kernels.txt").write_text("".join(f"{kernel}\n" for kernel in kernels))
            print(f"This was a rehearsal: no value was computed; {len(kernels)} kernels would be compiled")
        shutil.rmtree(self.scratch)
        return all(report.ended_well for report in self.reports)

    def _run_phase(self, phase: Phase, seconds: float, log: IO[str]) -> PhaseReport:
        start = time.perf_counter()
        log.write(f"\n======== {phase.name}: {phase.what}; at most {seconds:.0f} s\n")
        log.flush()
        command = self._command(phase.name)
        if not command:
            return PhaseReport(phase.name, 0.0, seconds, 0, "nothing to run")
        options: dict[str, Any] = {"cwd": ROOT, "env": self.environment, "stdout": log, "stderr": log}
        process = subprocess.Popen(command, start_new_session=True, **options)
        code = None
        try:
            code = process.wait(max(seconds, 1.0))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(GRACE)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # also kills child processes that it left
        process.wait()
        return PhaseReport(phase.name, time.perf_counter() - start, seconds, code)

    def _command(self, phase: str) -> list[str]:
        """The command of a phase; empty if the selected operators have nothing for it."""
        tests = self._files("tests/*/test_gpu.py", lambda path: path.parent.name)
        benchmarks = self._files("benchmarks/*_gpu.py", lambda path: path.stem.removesuffix("_gpu"))
        benchmarks = [file for file in benchmarks if "step" not in file]
        workers = 2 if self.rehearse else max(1, min(MOST_WORKERS, (os.cpu_count() or 2) - 2))
        match phase:
            case "build":
                what = "report" if self.rehearse else "load"
                return self._program("gpu.kit", what, str(self.output / "versions.json"))
            case "smoke":
                return self._program("gpu.smoke", *self.only)
            case "tests":
                return self._pytest(phase, tests, "-m", "gpu and not large", "--numprocesses", str(workers))
            case "large":
                return self._pytest(phase, tests, "-m", "gpu and large")
            case "benchmarks":
                return self._pytest(phase, benchmarks, "-m", "gpu", *self._measuring())
            case "step":
                files = ["benchmarks/pretraining_step_gpu.py"]
                return self._pytest(phase, files, "-k", "packed and stored", *self._measuring())
            case _:
                return self._program("gpu.profile_step", str(self.output / "profile.txt"))

    def _measuring(self) -> list[str]:
        rounds = ["--rounds=1"] if self.rehearse else []
        return [f"--results={self.output / 'bench.json'}", *rounds]

    def _files(self, pattern: str, operator_of: Any) -> list[str]:
        paths = sorted(ROOT.glob(pattern))
        return [str(path.relative_to(ROOT)) for path in paths if not self.only or operator_of(path) in self.only]

    def _program(self, module: str, *arguments: str) -> list[str]:
        stand_in = ["gpu.stand_in"] if self.rehearse else []
        return [sys.executable, "-m", *stand_in, module, *arguments]

    def _pytest(self, phase: str, files: list[str], *options: str) -> list[str]:
        if not files:
            return []
        plugins = ["gpu.outcomes", "no:cacheprovider", *(["gpu.stand_in"] if self.rehearse else [])]
        use = [word for plugin in plugins for word in ("-p", plugin)]
        outcomes_file = self.scratch / f"{phase}.jsonl"
        return [sys.executable, "-m", "pytest", "-q", *use, "--outcomes", str(outcomes_file), *options, *files]

    def _results(self) -> list[outcomes.Result]:
        """The results of all tests; benchmarks are not included."""
        return outcomes.read(self.scratch / f"{phase}.jsonl" for phase in ("tests", "large"))

    def _benchmarks(self) -> dict[str, Any]:
        path = self.output / "bench.json"
        return json.loads(path.read_text())["results"] if path.exists() else {}

    def _write_results(self) -> None:
        versions = self.output / "versions.json"
        machine = json.loads(versions.read_text()) if versions.exists() else {"gpu": "unknown", "packages": {}}
        results = self._results()
        outcomes.write_junit(
            results,
            self.output / "junit.xml",
            {"gpu": machine["gpu"], "date": machine.get("date", ""), **machine["packages"]},
        )
        failed = outcomes.read(self.scratch / f"{phase}.jsonl" for phase in ("benchmarks", "step"))
        summary = self.output / "summary.md"
        write_summary(summary, machine, self.reports, results, self._benchmarks(), failed)


def main(arguments: list[str] | None = None) -> int:
    """Run the phases; return the exit status, 0 if all phases ended well."""
    parser = argparse.ArgumentParser(prog="python -m gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--limit", type=float, default=420.0, help="stop after these seconds (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("gpu-results"), help="write here (default: %(default)s)")
    parser.add_argument("--phases", default=",".join(PHASES), help=f"run only some of {', '.join(PHASES)}")
    parser.add_argument("--only", default="", help="run only these operators, e.g. sinkhorn,koleo (default: all)")
    parser.add_argument("--rehearse", action="store_true", help="run on a stand-in that computes nothing")
    parser.add_argument("--compile", action="store_true", help="with --rehearse: compile every kernel")
    options = parser.parse_args(arguments)
    only, names = ([x for x in words.split(",") if x] for words in (options.only, options.phases))
    operators = sorted(path.parent.name for path in ROOT.glob("tests/*/test_gpu.py"))
    for option, given, known in (("--phases", names, list(PHASES)), ("--only", only, operators)):
        if unknown := [x for x in given if x not in known]:
            parser.error(f"{option}: expected some of {', '.join(known)}, got {unknown[0]}")
    if not options.rehearse and (obstacle := _obstacle()):
        print(f"{obstacle}; `make gpu-rehearsal` runs everything except the kernels")
        return 1
    if only and options.phases == parser.get_default("phases"):
        names = [name for name in names if name not in OF_ALL_OPERATORS]
    session = Session(options.output, options.limit, only, rehearse=options.rehearse, compile=options.compile)
    return 0 if session.run([PHASES[name] for name in PHASES if name in names]) else 1


def _obstacle() -> str:
    """Why this Python cannot use a GPU here; empty if it can."""
    try:
        import torch
    except ImportError as error:
        return f"no NVIDIA GPU: {sys.executable} has no PyTorch ({error}); set GPU_PYTHON to a Python that has it"
    return "" if torch.cuda.is_available() else "no NVIDIA GPU that PyTorch can use here"


if __name__ == "__main__":
    sys.exit(main())
