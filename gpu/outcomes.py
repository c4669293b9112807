"""Outcomes of tests, written at once: after an interrupted run, the file has the results and the tests not reached.

As a pytest plugin (``-p gpu.outcomes --outcomes FILE``) it appends one line of JSON for each test. :func:`read` joins
the files of several runs, and :func:`write_junit` and :func:`read_junit` convert them to JUnit's XML and back.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import pytest

NOT_REACHED = "did not run: the time of its phase was up"
Outcome = Literal["passed", "failed", "skipped", "not reached"]


@dataclass(frozen=True)
class Result:
    """The result of one test.

    Attributes:
        test: name in pytest's notation, ``tests/koleo/test_gpu.py::test_values[31x1]``.
        outcome: passed, failed, skipped or not reached.
        seconds: duration.
        message: the reason why it failed or was skipped.
    """

    test: str
    outcome: Outcome
    seconds: float = 0.0
    message: str = ""

    @property
    def operator(self) -> str:
        """The folder of the test."""
        return Path(self.test.partition("::")[0]).parent.name


# ---------------------------------------------------------------------------------------------------------- for pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--outcomes", type=Path, help="file that gets one line of JSON for each test")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--outcomes")
    if path is not None and not hasattr(config, "workerinput"):  # workers report to the process that started them
        config.pluginmanager.register(_Recorder(path))


class _Recorder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def _append(self, **values: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(values) + "\n")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._append(collected=[item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        self._append(collected=ids)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._append(test=report.nodeid, outcome="failed", message=report.longreprtext)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            message = "" if report.passed else report.longreprtext
            self._append(test=report.nodeid, outcome=report.outcome, seconds=report.duration, message=message)


# ---------------------------------------------------------------------------------------------------------------- files


def read(paths: Iterable[Path]) -> list[Result]:
    """All results in these files, in their order. If a test ran twice and failed once, it failed."""
    results: dict[str, Result] = {}
    for path in paths:
        for line in path.read_text().splitlines() if path.exists() else ():
            values = json.loads(line)
            for test in values.get("collected", ()):
                results.setdefault(test, Result(test, "not reached", message=NOT_REACHED))
            if "test" in values and results.get(values["test"], Result("", "passed")).outcome != "failed":
                results[values["test"]] = Result(**values)
    return list(results.values())


def write_junit(results: Iterable[Result], path: Path, properties: dict[str, str]) -> None:
    """Write JUnit's XML, with properties of the run, such as the name of the GPU. A test not reached is an error."""
    suite = ElementTree.Element("testsuite", name="gpu")
    of_suite = ElementTree.SubElement(suite, "properties")
    for name, value in properties.items():
        ElementTree.SubElement(of_suite, "property", name=name, value=value)
    tags = {"failed": "failure", "skipped": "skipped", "not reached": "error"}
    for result in results:
        file, _, name = result.test.partition("::")
        case = ElementTree.SubElement(suite, "testcase", classname=file, name=name, time=f"{result.seconds:.3f}")
        if tag := tags.get(result.outcome):
            summary = result.message.strip().rpartition("\n")[2]
            element = ElementTree.SubElement(case, tag, message=_printable(summary))
            element.text = _printable(result.message)
    ElementTree.indent(suite)
    ElementTree.ElementTree(suite).write(path, encoding="unicode", xml_declaration=True)


def read_junit(path: Path) -> tuple[list[Result], dict[str, str]]:
    """The results and the properties from a file of :func:`write_junit`."""
    suite = ElementTree.parse(path).getroot()
    properties = {x.attrib["name"]: x.attrib["value"] for x in suite.iter("property")}
    return list(_results_in(suite)), properties


def _results_in(suite: ElementTree.Element) -> Iterator[Result]:
    outcomes: dict[str, Outcome] = {"failure": "failed", "skipped": "skipped", "error": "not reached"}
    for case in suite.iter("testcase"):
        test = "::".join(filter(None, (case.attrib["classname"], case.attrib["name"])))
        found = [(outcomes[x.tag], x.text or "") for x in case if x.tag in outcomes]
        outcome, message = found[0] if found else ("passed", "")
        yield Result(test, outcome, float(case.attrib["time"]), message)  # type: ignore[arg-type]


def _printable(text: str) -> str:
    """The text without control characters, such as terminal colours, which XML cannot hold."""
    return "".join(character for character in text if character in "\n\t" or character >= " ")
