"""First tests of the pages in docs/test-your-agent, in languages that need a compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from cli.vsock import PROGRAM
from documentation.markdown import ROOT, blocks
from supervisor.test_languages import GO


def printed(page: str, language: str) -> str:
    """Return the program on a page of docs/test-your-agent."""
    found = blocks(ROOT / "docs/test-your-agent" / page)
    return next(block.text for block in found if block.language == language)


def run(folder: Path, *command: str, **environment: str) -> str:
    """Run a command in ``folder``, which finds this tree's vsock, and return what it prints."""
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    (programs / "vsock").write_text(f'#!/bin/sh\nexec {" ".join(PROGRAM)} "$@"\n')
    (programs / "vsock").chmod(0o755)
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **environment, "PATH": f"{programs}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_in_go(tmp_path: Path) -> None:
    if shutil.which("go") is None:
        pytest.skip("go is missing: apt install golang-go")
    (tmp_path / "first_test.go").write_text(printed("firecracker.md", "go"))
    assert run(tmp_path, "gofmt", "-l", ".") == ""
    command = ("vsock", "fabric", "--as", "firecracker", "--", "go", "test", "first_test.go")
    assert run(tmp_path, *command, **GO).startswith("ok")


def test_in_rust(tmp_path: Path) -> None:
    if shutil.which("rustc") is None or shutil.which("cc") is None:
        pytest.skip("rustc or cc is missing: apt install rustc gcc")
    version = subprocess.run(["rustc", "--version"], capture_output=True, text=True, check=False)
    if version.returncode != 0:
        pytest.skip(f"rustc does not run for this user: {version.stderr.partition(chr(10))[0]}")
    (tmp_path / "first_test.rs").write_text(printed("kata.md", "rust"))
    run(tmp_path, "rustc", "--edition", "2021", "-D", "warnings", "--test", "first_test.rs")
    done = run(tmp_path, "vsock", "fabric", "--as", "kata", "--", "./first_test")
    assert "1 passed" in done
