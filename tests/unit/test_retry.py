"""A test that fails is run a second time, alone; one that fails twice fails."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RETRY = Path(__file__).parent.parent / "retry.py"

ONCE = """
import pathlib
MARK = pathlib.Path(__file__).parent / "mark"

def test_that_fails_once():
    seen = MARK.exists()
    MARK.touch()
    assert seen

def test_that_passes():
    pass
"""

ALWAYS = "import pytest\n@pytest.mark.parametrize('n', range({}))\ndef test_n(n): assert 0\n"


@pytest.mark.parametrize(
    ("tests", "status", "says", "does_not_say"),
    [
        (
            ONCE,
            0,
            "WARNING: failed, then passed alone: test_it.py::test_that_fails_once",
            "passes\n",
        ),
        (ALWAYS.format(1), 1, "running again, alone: test_it.py::test_n[0]", "WARNING"),
        (ALWAYS.format(6), 1, "6 failed", "running again"),
        ("def test(:", 2, "SyntaxError", "running again"),
    ],
    ids=["once", "twice", "many", "error"],
)
def test_a_second_run(
    tests: str, status: int, says: str, does_not_say: str, tmp_path: Path
) -> None:
    (tmp_path / "test_it.py").write_text(tests)
    run = subprocess.run(
        [sys.executable, RETRY, "-p", "no:cacheprovider", "--rootdir", ".", "test_it.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == status, run.stdout
    assert says in run.stdout
    assert does_not_say not in run.stdout


def test_a_run_that_ended_at_the_first_failure_is_not_repeated(tmp_path: Path) -> None:
    """A second run would pass although the other tests were not run."""
    (tmp_path / "test_it.py").write_text(ONCE)
    arguments = ["-x", "-p", "no:cacheprovider", "--rootdir", ".", "test_it.py"]
    run = subprocess.run(
        [sys.executable, RETRY, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1, run.stdout
    assert "running again" not in run.stdout
