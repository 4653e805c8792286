"""Agents in several languages, each with its suite, as their pages have readers run them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

import pytest

from c_compiler import require_compiler
from cli.vsock import PATIENCE, PROGRAM

from .conftest import EXAMPLES, ROOT, RunPage


def test_python(run_page: RunPage) -> None:
    run_page("python")


def test_complaints(run_page: RunPage) -> None:
    run_page("agents")


def test_each_complaint_is_listed_with_its_scenario() -> None:
    text = (EXAMPLES / "agents" / "scenarios.py").read_text()
    functions = re.findall(r"@scenario\(.*\)\ndef (\w+)\(", text)
    page = (ROOT / "docs" / "test-your-agent.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \| \[.*https://github.com/", page, re.MULTILINE)
    assert rows == [name.replace("_", "-") for name in functions]


def test_pythons_suite_has_its_own_settings() -> None:
    """In a clone, those of the project's own tests need pytest-timeout."""
    command = [sys.executable, "-m", "pytest", "-p", "no:timeout", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--collect-only"],
        cwd=EXAMPLES / "python",
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_c(run_page: RunPage) -> None:
    require_compiler("cc")
    if shutil.which("make") is None:
        pytest.skip("no make: apt install what .ci/run does")
    run_page("c")


def test_node(run_page: RunPage) -> None:
    if shutil.which("node") is None:
        pytest.skip("no node: apt install what .ci/run does")
    run_page("node")


def test_go(run_page: RunPage, go: dict[str, str]) -> None:
    run_page("go", **go)


def test_the_go_librarys_own_suite_passes_in_a_guest(go: dict[str, str]) -> None:
    command = [*PROGRAM, "fabric", "--cid", "3", "--", "go", "test", "github.com/mdlayher/vsock"]
    done = subprocess.run(
        [*command, "-count=1", "-v"],
        env={**os.environ, **go},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "--- PASS: TestIntegrationContextIDGuest" in done.stdout
    assert "--- PASS: TestIntegrationNettestTestConn" in done.stdout


@pytest.mark.timeout(240)  # 15 s of compiling libraries, the first time
def test_rust(run_page: RunPage, cargo: dict[str, str]) -> None:
    run_page("rust", **cargo)
