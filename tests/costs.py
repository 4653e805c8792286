"""Processor time of the test files, with all processes that they started and ended."""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest

#: Files that are named at the end of a run, and the fewest files of a run that has a table.
DEAREST, FILES_MIN = 10, 30

_PROPERTY = "processor time"


class Costs:
    """A table of the dearest files, as a plugin of pytest and of pytest-xdist's workers."""

    def __init__(self) -> None:
        self._last = _processor_time()
        self._files: dict[str, list[float]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self,
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        now = _processor_time()
        report.user_properties.append((_PROPERTY, now - self._last))
        self._last = now
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        costs = self._files.setdefault(report.nodeid.partition("::")[0], [0.0, 0.0])
        costs[0] += sum(float(str(v)) for name, v in report.user_properties if name == _PROPERTY)
        costs[1] += report.duration

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if len(self._files) < FILES_MIN:
            return
        terminalreporter.section("dearest files: seconds of processor time, and altogether")
        rows = sorted(self._files.items(), key=lambda row: row[1], reverse=True)
        for path, (processor, altogether) in rows[:DEAREST]:
            terminalreporter.write_line(f"{processor:7.1f} {altogether:7.1f}  {path}")


def _processor_time() -> float:
    """Return the seconds of this process and of the processes that it has waited for."""
    return sum(os.times()[:4])
