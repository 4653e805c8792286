"""The shell commands that pages have their readers paste, run as they are printed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

#: Timeout of the commands of a block, in seconds: some compile a library, the first time.
_PATIENCE = 170.0

#: A block of commands, and the sentence after it about their output.
_PASTE = re.compile(r"^```sh\n(.*?)^```\n+(?:You see `([^`]+)`)?", re.MULTILINE | re.DOTALL)


def pastes_of(page: Path) -> dict[str, str]:
    """Return the page's blocks of ``sh``, each with the output that the page promises for it."""
    found = _PASTE.findall(page.read_text())
    silent = [paste for paste, seen in found if not seen]
    assert found and not silent, f"{page}: no 'You see `…`' after: {silent}"
    return dict(found)


def run_paste(
    paste: str, seen: str, folder: Path, scratch: Path, environment: Mapping[str, str] | None = None
) -> None:
    """Run commands in ``folder`` and check their output; ``/tmp`` in them becomes ``scratch``."""
    programs = scratch / "bin"
    programs.mkdir(exist_ok=True)
    vsock = programs / "vsock"
    vsock.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m vsockets.cli "$@"\n')
    vsock.chmod(0o755)
    path = (programs, Path(sys.executable).parent, os.environ["PATH"])
    done = subprocess.run(
        ["sh", "-ec", paste.replace("/tmp/", f"{scratch}/")],  # other tests may use /tmp
        cwd=folder,
        env={**os.environ, "PATH": os.pathsep.join(map(str, path)), **(environment or {})},
        capture_output=True,
        text=True,
        timeout=_PATIENCE,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert seen in done.stdout, done.stdout + done.stderr
