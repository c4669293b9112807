"""tests/aot.py reads compilers' reports rightly and refuses what must be refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.aot import ROOT, Usage, as_markdown, find_nvcc, parse_ptxas

REPORT = """
ptxas info    : 28 bytes gmem
ptxas info    : Compiling entry function 'neat' for 'sm_90a'
ptxas info    : Function properties for neat
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers, 8512 bytes smem
ptxas info    : Compiling entry function 'spilling' for 'sm_80'
ptxas info    : Function properties for spilling
    80 bytes stack frame, 96 bytes spill stores, 92 bytes spill loads
ptxas info    : Used 255 registers, 400 bytes cmem[0]
"""


def test_reads_what_ptxas_reports() -> None:
    assert parse_ptxas(REPORT, threads=128) == [
        Usage("neat", "90a", threads=128, registers=64, spills=0, stack=0, shared=8512),
        Usage("spilling", "80", threads=128, registers=255, spills=188, stack=80, shared=0),
    ]


def test_a_report_without_kernels_is_an_error() -> None:
    with pytest.raises(AssertionError, match="no kernel"):
        parse_ptxas("ptxas info    : 28 bytes gmem", threads=128)


@pytest.mark.parametrize(
    ("excess", "message"),
    [
        ({"spills": 4}, "spills"),
        ({"stack": 8}, "local memory"),
        ({"registers": 128, "threads": 1024}, "registers"),
        ({"target": "80", "shared": 164 * 1024}, "shared memory"),
        ({"target": "90a", "shared": 228 * 1024}, "shared memory"),
    ],
)
def test_refuses_what_does_not_fit(excess: dict[str, object], message: str) -> None:
    fitting = {"target": "90a", "threads": 256, "registers": 64, "spills": 0, "stack": 0, "shared": 1024}
    Usage("kernel", **fitting).check()
    with pytest.raises(AssertionError, match=message):
        Usage("kernel", **{**fitting, **excess}).check()


def test_the_table_has_a_row_for_each_kernel_and_a_figure_for_each_target() -> None:
    a100 = Usage("neat", "80", threads=128, registers=64, spills=0, stack=0, shared=0, hmma=8)
    h100 = Usage("neat", "90a", threads=128, registers=72, spills=0, stack=0, shared=0, hgmma=4)
    assert as_markdown([a100, h100]).splitlines() == [
        "| kernel | targets | threads | registers | spills, bytes | shared memory, bytes | HGMMA | HMMA |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
        "| `neat` | sm_80, sm_90a | 128 | 64, 72 | 0 | 0 | 0, 4 | 8, 0 |",
    ]


def test_no_column_for_instructions_that_no_kernel_has() -> None:
    usage = Usage("neat", "80", threads=128, registers=64, spills=0, stack=0, shared=0)
    assert "MMA" not in as_markdown([usage])


def test_continuous_integration_may_not_lack_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CI", raising=False)
    assert find_nvcc() is None
    monkeypatch.setenv("CI", "true")
    with pytest.raises(RuntimeError, match="nvcc"):
        find_nvcc()


@pytest.mark.parametrize("operator", sorted(path.stem for path in (ROOT / "docs/operators").glob("*.md")))
def test_every_operator_links_to_the_figures_of_its_kernels(operator: str) -> None:
    page = Path("benchmarks/results/gpu_kernels", f"{operator}.md")
    assert f"(../../{page})" in (ROOT / "docs/operators" / f"{operator}.md").read_text()
    figures = (ROOT / page).read_text()
    assert f"`python -m tests.aot {operator}`" in figures
    assert "\n| kernel | targets | threads |" in figures
