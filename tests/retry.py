"""Run pytest, and the few tests that fail again, alone: ``python tests/retry.py [ARGUMENT]...``.

Two workers and many short-lived processes share the machine, and some tests reach a limit of theirs
there that they never reach alone.  CPython's ``regrtest --rerun`` does the same.  A test that fails
twice fails; one that passes alone is named at the end, so that its cause is looked for.  More than
``RETRIED_TESTS`` failures are no matter of load, and are not run again; nor are those of a run that
``-x`` or ``--maxfail`` has ended before all tests were run.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

RETRIED_TESTS = 5


class Failures:
    """Collect the names of the tests that failed, as a plugin of pytest."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.is_complete = False

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.is_complete = not (session.shouldfail or session.shouldstop)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and report.nodeid not in self.names:
            self.names.append(report.nodeid)


def main(arguments: list[str]) -> int:
    """Return pytest's exit status, that of the second run if there was one."""
    failures = Failures()
    status = int(pytest.main(arguments, plugins=[failures]))
    names = failures.names
    is_run_again = failures.is_complete and 0 < len(names) <= RETRIED_TESTS
    if status != pytest.ExitCode.TESTS_FAILED or not is_run_again:
        return status
    print(f"\nrunning again, alone: {' '.join(names)}", flush=True)
    again = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *names]
    status = subprocess.run(again, check=False).returncode
    if status == 0:
        print("".join(f"\nWARNING: failed, then passed alone: {name}" for name in names))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
