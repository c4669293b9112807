"""Outcomes of tests survive whatever ends a run, and go through JUnit's XML unchanged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from gpu.outcomes import Result, read, read_junit, write_junit

TESTS = """
import os, signal
import pytest

def test_passes(): pass

@pytest.mark.parametrize("name", ["a-b", "ü <&> \\x1b[31m"])
def test_fails(name): assert name == "", name

@pytest.fixture
def broken(): raise RuntimeError("no fixture")

def test_errs(broken): pass

def test_skips(): pytest.skip("not here")

def test_ends_everything():
    if os.environ.get("KILLED"):
        os.kill(os.getpid(), signal.SIGKILL)

def test_comes_last(): pass
"""


def outcomes_of(folder: Path, *options: str, **environment: str) -> list[Result]:
    (folder / "test_some.py").write_text(TESTS)
    plugin = ["-p", "gpu.outcomes", "-p", "no:cacheprovider", "--outcomes", str(folder / "outcomes.jsonl")]
    command = [sys.executable, "-m", "pytest", "-q", *plugin, *options, str(folder / "test_some.py")]
    root = Path(__file__).parents[2]
    subprocess.run(command, cwd=root, env={"PATH": "/usr/bin:/bin", **environment}, capture_output=True, check=False)
    return read([folder / "outcomes.jsonl", folder / "absent.jsonl"])


def by_name(results: list[Result]) -> dict[str, str]:
    return {result.test.rpartition("::")[2].partition("[")[0]: result.outcome for result in results}


def test_each_outcome_in_one_process_and_in_several(tmp_path: Path) -> None:
    expected = {
        "test_passes": "passed",
        "test_fails": "failed",
        "test_errs": "failed",
        "test_skips": "skipped",
        "test_ends_everything": "passed",
        "test_comes_last": "passed",
    }
    for number, options in enumerate(([], ["--numprocesses", "2"])):
        folder = tmp_path / str(number)
        folder.mkdir()
        results = outcomes_of(folder, *options)
        assert by_name(results) == expected
        assert len(results) == 7
        (error,) = (x for x in results if "test_errs" in x.test)
        assert "no fixture" in error.message


def test_a_killed_run_leaves_what_it_found_and_what_it_did_not_reach(tmp_path: Path) -> None:
    found = by_name(outcomes_of(tmp_path, KILLED="1"))
    assert found["test_fails"] == "failed"
    assert found["test_ends_everything"] == found["test_comes_last"] == "not reached"


def test_a_file_that_cannot_be_imported_is_a_failure(tmp_path: Path) -> None:
    results = outcomes_of(tmp_path)
    (tmp_path / "outcomes.jsonl").unlink()
    assert results
    (tmp_path / "conftest.py").write_text("collect_ignore = ['test_some.py']")
    broken = tmp_path / "test_broken.py"
    broken.write_text("import a_package_that_nobody_has")
    results = outcomes_of(tmp_path, str(broken))
    assert [x.outcome for x in results if "test_broken" in x.test] == ["failed"]


def test_a_test_that_fails_once_has_failed(tmp_path: Path) -> None:
    file = tmp_path / "outcomes.jsonl"
    lines = ['{"test": "t::a", "outcome": "failed", "message": "one"}', '{"test": "t::a", "outcome": "passed"}']
    file.write_text("\n".join(lines))
    assert [x.outcome for x in read([file])] == ["failed"]


def test_junit_there_and_back(tmp_path: Path) -> None:
    results = [
        Result("tests/koleo/test_gpu.py::test_values[native-31x1]", "passed", 0.25),
        Result("tests/koleo/test_gpu.py::test_values[ü <&>]", "failed", 1.0, "long\ntext <&> of\nan error"),
        Result("tests/koleo/test_gpu.py::test_b", "skipped", 0.0, "not here"),
        Result("tests/koleo/test_gpu.py::test_c", "not reached", 0.0, "time"),
        Result("tests/broken.py", "failed", 0.0, "ImportError"),
    ]
    write_junit(results, tmp_path / "junit.xml", {"gpu": "NVIDIA H200"})
    assert read_junit(tmp_path / "junit.xml") == (results, {"gpu": "NVIDIA H200"})
    assert [x.operator for x in results[:2]] == ["koleo", "koleo"]
