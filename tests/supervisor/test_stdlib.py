"""Unmodified Python programs."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from cli.vsock import Vsock

PROGRAM = Path(__file__).parent / "programs" / "stdlib.py"


@pytest.mark.skipif(not hasattr(socket, "AF_VSOCK"), reason="this Python's socket has no AF_VSOCK")
@pytest.mark.parametrize("where", ["host", "73"])
def test_the_standard_librarys_sockets_work(vsock: Vsock, where: str) -> None:
    # -I: without modules of the project.
    done = vsock("run", "--cid", where, sys.executable, "-I", PROGRAM, expect=None, patience=120)
    assert (done.stdout, done.returncode) == ("all well\n", 0), done.stderr
