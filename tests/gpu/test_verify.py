"""Kernels count as verified where a GPU passed all of their tests, and no longer once their source has changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import dinov2_kernels as dk
from dinov2_kernels import _library
from gpu import verify
from gpu.outcomes import Result, write_junit

H200 = {"gpu": "NVIDIA H200", "date": "2027-01-02", "torch": "2.11.0", "triton": "3.6.0"}


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "verified_on_gpu.json"
    path.write_text("{}")
    monkeypatch.setattr(verify, "RECORD", path)
    return path


def junit(folder: Path, *results: tuple[str, str], **properties: str) -> Path:
    path = folder / "junit.xml"
    write_junit([Result(test, outcome) for test, outcome in results], path, H200 | properties)  # type: ignore[arg-type]
    return path


def test_no_kernel_has_changed_since_a_gpu_verified_it() -> None:
    assert verify.outdated(verify.read_record()) == [], "run python -m gpu.verify --changed"


def test_all_tests_must_have_passed(tmp_path: Path, record: Path) -> None:
    path = junit(
        tmp_path,
        ("tests/swiglu/test_gpu.py::test_values[a]", "passed"),
        ("tests/koleo/test_gpu.py::test_values[native-31x1]", "passed"),
        ("tests/koleo/test_gpu.py::test_values[triton-31x1]", "failed"),
        ("tests/sinkhorn/test_gpu.py::test_values[triton-1]", "passed"),
        ("tests/sinkhorn/test_gpu.py::test_values[triton-2]", "not reached"),
        ("tests/residual/test_gpu.py::test_a", "skipped"),
    )
    verify.record_junit(path)
    found = json.loads(record.read_text())
    assert {operator: list(backends) for operator, backends in found.items()} == {
        "koleo": ["native"],
        "swiglu": ["triton"],
    }
    assert found["swiglu"]["triton"] == H200 | {"source": verify.fingerprint("swiglu", "triton")}


def test_a_later_failure_takes_it_back_and_leaves_the_others(tmp_path: Path, record: Path) -> None:
    verify.record_junit(junit(tmp_path, *((f"tests/{x}/test_gpu.py::test", "passed") for x in ("swiglu", "koleo"))))
    verify.record_junit(junit(tmp_path, ("tests/koleo/test_gpu.py::test", "failed")))
    assert list(json.loads(record.read_text())) == ["swiglu"]


@pytest.mark.parametrize("gpu", ["none", "unknown", "no GPU, a stand-in"])
def test_only_a_gpu_verifies(tmp_path: Path, record: Path, gpu: str) -> None:
    path = junit(tmp_path, ("tests/swiglu/test_gpu.py::test", "passed"), gpu=gpu)
    with pytest.raises(ValueError, match="expected results of a GPU"):
        verify.record_junit(path)
    assert record.read_text() == "{}"


def test_a_changed_source_is_outdated() -> None:
    current = verify.fingerprint("koleo", "native")
    assert current != verify.fingerprint("sinkhorn", "native")
    assert verify.outdated({"koleo": {"native": {"source": current}}}) == []
    assert verify.outdated({"koleo": {"native": {"source": "another"}}}) == [("koleo", "native")]


def test_info_names_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "_verified_on_gpu", lambda: {"swiglu": {"triton": H200}, "koleo": {"native": H200}})
    operators = dk.info()["operators"]
    assert operators["swiglu_backward"]["verified_on_gpu"] == "NVIDIA H200, 2027-01-02"
    assert operators["koleo_forward"]["verified_on_gpu"] == "none yet"
