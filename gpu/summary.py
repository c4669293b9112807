"""Summary of a run on a GPU, for people: a page in Markdown, and a short table for the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu.outcomes import Result
from gpu.verify import Verdict, verdicts

Benchmarks = Mapping[str, Mapping[str, Any]]
"""The results of a file in benchmarks/results, by the name of the test."""
CONTENDERS = ("sinkhorn", "koleo")
"""Operators with kernels in Triton and in CUDA C++; only one of the two will stay."""
MOST_FAILURES = 40


@dataclass(frozen=True)
class PhaseReport:
    """How a phase ended: its seconds, the seconds allowed, and its exit status, or None if its time was up."""

    name: str
    seconds: float
    allowed: float
    code: int | None
    note: str = ""

    @property
    def ended_well(self) -> bool:
        return self.code == 0

    @property
    def result(self) -> str:
        if self.note:
            return self.note
        return {None: "time was up", 0: "ok"}.get(self.code, f"exit status {self.code}")

    @property
    def line(self) -> str:
        return f"{self.name:<11} {self.seconds:6.1f} of {self.allowed:4.0f} s   {self.result}"


def write_summary(
    path: Path,
    machine: Mapping[str, Any],
    phases: Iterable[PhaseReport],
    results: list[Result],
    benchmarks: Benchmarks,
    of_benchmarks: Iterable[Result],
) -> None:
    """Write the page in Markdown.

    Args:
        path: path of the Markdown file.
        machine: the report of gpu/kit.py.
        phases: the phases, in their order.
        results: results of the tests.
        benchmarks: the measurements.
        of_benchmarks: results of the benchmarks as tests; the page shows those that failed.
    """
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    failed = [result for result in (*results, *of_benchmarks) if result.outcome == "failed"]
    parts = [
        f"# {machine['gpu']}, {machine.get('date', 'date unknown')}",
        packages,
        "## Phases",
        _rows(
            ("phase", "seconds", "of", "result"),
            [(p.name, f"{p.seconds:.1f}", f"{p.allowed:.0f}", p.result) for p in phases],
        ),
        "## Operators",
        _rows(
            ("operator", "kernels", "verified", "passed", "failed", "skipped", "not reached"),
            [(v.operator, v.backend, v.verified, *v.counts) for v in verdicts(results)],
        ),
        *_times(benchmarks),
        *_decisions(verdicts(results), benchmarks),
    ]
    if failed:
        parts.append("## What failed")
        parts += [
            f"- `{x.test}`: {x.message.strip().splitlines()[-1][:300]}" for x in failed[:MOST_FAILURES] if x.message
        ]
        if len(failed) > MOST_FAILURES:
            parts.append(f"junit.xml and log.txt have {len(failed) - MOST_FAILURES} more.")
    path.write_text("\n\n".join(parts) + "\n")


def table(results: list[Result], benchmarks: Benchmarks) -> str:
    """One line for each operator: its test results, and its speedup over the baseline in every benchmark."""
    lines = []
    for verdict in verdicts(results):
        ours = [b for name, b in benchmarks.items() if _is_ours(name, verdict.operator, verdict.backend)]
        speedups = " ".join(f"{b['speedup']:g}" for b in ours if "speedup" in b)
        passed, failed, skipped, not_reached = verdict.counts
        counts = f"{passed} passed, {failed} failed, {skipped} skipped, {not_reached} not reached"
        lines.append(f"{verdict.operator:<24} {verdict.backend:<7} {verdict.verified:<4} {counts:<58} {speedups}")
    return "\n".join(lines)


def _times(benchmarks: Benchmarks) -> list[str]:
    """A table for each group of benchmarks: all peers with baseline, floor and prediction."""
    groups: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for name, measured in benchmarks.items():
        groups.setdefault(str(measured["group"]), []).append((name, measured))
    parts = ["## Times"] if groups else []
    for group, members in groups.items():
        rows = [
            (
                name.partition("[")[2].rstrip("]") or name.rpartition("::")[2],
                f"{measured['milliseconds']['median']:.4g}",
                _number(measured, "baseline_ms"),
                _number(measured, "speedup"),
                _number(measured, "floor_ms"),
                _number(measured, "predicted_ms"),
                _ratio(measured, "predicted_ms"),
            )
            for name, measured in members
        ]
        titles = ("case", "ms", "baseline, ms", "speedup", "floor, ms", "predicted, ms", "measured / predicted")
        parts += [f"### {group}", _rows(titles, rows)]
    return parts


def _decisions(all_verdicts: Iterable[Verdict], benchmarks: Benchmarks) -> list[str]:
    """For operators with two kinds of kernels, which one wins. The loser will be removed once both are verified."""
    verified = {(v.operator, v.backend): v.verified == "yes" for v in all_verdicts}
    parts = []
    for operator in CONTENDERS:
        times = {
            backend: {
                _case(name): measured["milliseconds"]["median"]
                for name, measured in benchmarks.items()
                if _is_ours(name, operator, backend)
            }
            for backend in ("triton", "native")
        }
        both = times["triton"].keys() & times["native"].keys()
        wins = [f"{case}: {times['triton'][case] / times['native'][case]:.2f}" for case in sorted(both)]
        if wins:
            state = ", ".join(f"{b} {'verified' if verified.get((operator, b)) else 'NOT verified'}" for b in times)
            parts.append(f"- **{operator}** ({state}). Time of Triton over that of CUDA C++: {'; '.join(wins)}.")
    return ["## Triton or CUDA C++", "\n".join(parts)] if parts else []


_OURS = {"Triton": "triton", "CUDA C++": "native"}


def _is_ours(benchmark: str, operator: str, backend: str) -> bool:
    """Whether a benchmark measures our own kernels of this kind; most operators have only one kind."""
    file, _, test = benchmark.partition("::")
    if Path(file).stem.removesuffix("_gpu") != operator:
        return False
    case = "-" + test.partition("[")[2]  # its parameters, including the peer
    named = [kind for label, kind in _OURS.items() if label in case]
    return named == [backend] if named else backend == "triton" and any(x in case for x in PUBLIC_NAMES)


PUBLIC_NAMES = (
    "varlen_attention",
    "stochastic_depth",
    "gather_norm",
    "-swiglu]",
    "-swiglu_backward_]",
    "-gelu_backward_]",
    "soft_cross_entropy",
    "-prototype_cross_entropy]",
    "-photometric]",
)
"""Names of our own functions among the peers of a benchmark."""


def _case(benchmark: str) -> str:
    """The name without the kind of kernels."""
    case = benchmark.rpartition("::")[2]
    for label in (*_OURS, " forward", "koleo_loss, "):
        case = case.replace(label, "")
    return case.replace("-]", "]")


def _number(measured: Mapping[str, Any], key: str) -> str:
    return f"{measured[key]:.4g}" if key in measured else ""


def _ratio(measured: Mapping[str, Any], key: str) -> str:
    return f"{measured['milliseconds']['median'] / measured[key]:.2f}" if measured.get(key) else ""


def _rows(titles: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> str:
    lines = [titles, ("---",) * len(titles), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
