"""Record which kernels passed their tests on a GPU, from the file that ``make gpu`` writes. Nobody edits it by hand.

    python -m gpu.verify gpu-results/junit.xml      writes dinov2_kernels/verified_on_gpu.json, which info() reads
    python -m gpu.verify --changed                  removes the kernels whose source has changed since their tests

Kernels are verified if they have at least one test and all of their tests passed: no test failed, was skipped, or was
not reached in time.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gpu.outcomes import Result, read_junit

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "dinov2_kernels" / "verified_on_gpu.json"
SOURCES = {
    "triton": ("dinov2_kernels/_triton.py", "dinov2_kernels/{operator}/triton_*.py"),
    "native": ("csrc/common/cuda*", "csrc/{operator}/cuda*"),
}
"""Source files of each kind of kernels. If they change, the verification no longer counts."""

Backend = Literal["triton", "native"]


@dataclass(frozen=True)
class Verdict:
    """Test results for one operator's kernels of one kind.

    Attributes:
        operator: folder of its tests.
        backend: the kind of kernels.
        counts: numbers of tests that passed, failed, were skipped, and were not reached.
    """

    operator: str
    backend: Backend
    counts: tuple[int, int, int, int]

    @property
    def verified(self) -> str:
        passed, *others = self.counts
        return "yes" if passed and not any(others) else "no"


def verdicts(results: Iterable[Result]) -> list[Verdict]:
    """The verdict for each operator and kind of kernels; a test that names no kind tests Triton."""
    outcomes: dict[tuple[str, Backend], list[str]] = {}
    for result in results:
        backend: Backend = "native" if re.search(r"\[(.*-)?native\b", result.test) else "triton"
        outcomes.setdefault((result.operator, backend), []).append(result.outcome)
    kinds = ("passed", "failed", "skipped", "not reached")
    return [
        Verdict(*key, tuple(found.count(kind) for kind in kinds))  # type: ignore[arg-type]
        for key, found in sorted(outcomes.items())
    ]


def fingerprint(operator: str, backend: str) -> str:
    """A hash of the source files of an operator's kernels."""
    paths = {path for pattern in SOURCES[backend] for path in ROOT.glob(pattern.format(operator=operator))}
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def read_record() -> dict[str, dict[str, dict[str, str]]]:
    """The record: GPU, date, versions and fingerprint for each operator and kind of kernels."""
    record: dict[str, dict[str, dict[str, str]]] = json.loads(RECORD.read_text())
    return record


def outdated(record: dict[str, dict[str, dict[str, str]]]) -> list[tuple[str, str]]:
    """Operators and kinds of kernels whose source has changed since they passed."""
    return [
        (operator, backend)
        for operator, backends in record.items()
        for backend, verified in backends.items()
        if verified["source"] != fingerprint(operator, backend)
    ]


def record_junit(path: Path) -> list[Verdict]:
    """Add the kernels that the file verifies to the record, and remove those that it does not verify.

    Raises:
        ValueError: the file is not from a run on a GPU.
    """
    results, properties = read_junit(path)
    if properties.get("gpu", "none") in ("none", "unknown") or "stand-in" in properties["gpu"]:
        raise ValueError(f"{path}: expected results of a GPU, got those of {properties.get('gpu', 'none')!r}")
    record = read_record()
    found = verdicts(results)
    for verdict in found:
        record.get(verdict.operator, {}).pop(verdict.backend, None)
        if verdict.verified == "yes" and any(ROOT.glob(f"dinov2_kernels/{verdict.operator}/op.py")):
            entry = {name: properties[name] for name in ("gpu", "date", "torch", "triton") if name in properties}
            entry["source"] = fingerprint(verdict.operator, verdict.backend)
            record.setdefault(verdict.operator, {})[verdict.backend] = entry
    _write(record)
    return found


def _write(record: dict[str, Any]) -> None:
    kept = {operator: dict(sorted(backends.items())) for operator, backends in sorted(record.items()) if backends}
    RECORD.write_text(json.dumps(kept, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m gpu.verify", description=(__doc__ or "").partition("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("junit", nargs="?", type=Path, help="record the results in this junit.xml of a run on a GPU")
    what.add_argument("--changed", action="store_true", help="remove the kernels that have changed since their tests")
    options = parser.parse_args()
    if options.changed:
        record = read_record()
        for operator, backend in outdated(record):
            del record[operator][backend]
            print(f"{operator}, {backend}: changed since a GPU verified it")
        _write(record)
        return
    try:
        found = record_junit(options.junit)
    except ValueError as error:
        sys.exit(str(error))
    for verdict in found:
        passed, failed, skipped, not_reached = verdict.counts
        counts = f"{passed} passed, {failed} failed, {skipped} skipped, {not_reached} not reached"
        print(f"{verdict.operator}, {verdict.backend}: verified {verdict.verified} ({counts})")


if __name__ == "__main__":
    main()
