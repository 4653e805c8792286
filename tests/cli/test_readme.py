"""The shell commands that README has its readers paste, as they are printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import c_compiler

from .vsock import PATIENCE

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PASTES = dict(
    zip(
        re.findall(r"^```sh\n(.*?)^```", README, re.MULTILINE | re.DOTALL),
        re.findall(r"^You see `([^`]+)`[.:] ?", README, re.MULTILINE)[1:],
        strict=True,
    )
)


@pytest.mark.parametrize(("paste", "seen"), PASTES.items(), ids=PASTES.values())
def test_a_paste_shows_what_readme_promises(paste: str, seen: str, tmp_path: Path) -> None:
    c_compiler.require_compiler("gcc")
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    vsock = bin_folder / "vsock"
    vsock.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m vsockets.cli "$@"\n')
    vsock.chmod(0o755)
    done = subprocess.run(
        ["sh", "-c", paste.replace("/tmp/", f"{tmp_path}/")],  # other tests may use /tmp
        cwd=ROOT,
        env={**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert seen in done.stdout


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= 130
