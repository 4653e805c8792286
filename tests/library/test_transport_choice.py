"""The note about the chosen transport when a connect fails, unless it was chosen explicitly.

``vsock run`` stands in for the kernel's AF_VSOCK: a supervised program sees the fabric's as its
own.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from vsockets.testing import PrivateFabric

pytest.importorskip("click", reason="vsock needs click")

#: Fails to connect in four ways, and prints the notes of each error.
CONNECT = """
import asyncio, vsockets
def blocking(sock): sock.connect((2, 9))
def given(sock): vsockets.create_connection((2, 9), context=vsockets.attach("/nowhere"))
def streams(sock): asyncio.run(vsockets.open_connection(2, 9))
def not_ours(sock): sock.bind((99, 9)); sock.connect((2, 9))
for attempt in blocking, streams, given, not_ours:
    try:
        with vsockets.socket() as sock:
            attempt(sock)
    except OSError as error:
        print(getattr(error, "__notes__", []))
"""

UNSET = ("env", "-u", "VSOCKETS_CONTEXT", "-u", "VSOCKETS_TRANSPORT")


def notes(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_note_about_the_kernel(vsock_fabric: PrivateFabric) -> None:
    command = [*UNSET, sys.executable, "-c", CONNECT]
    done = vsock_fabric.run(vsock_fabric.host, command, capture_output=True, text=True)
    note = (
        "VSOCKETS_TRANSPORT is auto; chosen: the kernel's AF_VSOCK, which has a CID here "
        "(for the fabric: vsock run, or VSOCKETS_TRANSPORT=fabric)"
    )
    assert notes(done) == [str([note])] * 2 + ["[]"] * 2


def test_note_about_the_fabric(vsock_fabric: PrivateFabric) -> None:
    environment = vsock_fabric.environment(vsock_fabric.host)
    command = [sys.executable, "-c", CONNECT]

    def run(transport: str) -> list[str]:
        environment["VSOCKETS_TRANSPORT"] = transport
        return notes(subprocess.run(command, env=environment, capture_output=True, text=True))

    note = (
        f"VSOCKETS_TRANSPORT is auto; chosen: the fabric, {vsock_fabric.host.folder}, "
        "from VSOCKETS_CONTEXT"
    )
    assert run("auto") == [str([note])] * 2 + ["[]"] * 2
    assert run("fabric") == ["[]"] * 4


def test_notes_of_the_command_line(vsock_fabric: PrivateFabric) -> None:
    vsock = (*UNSET, sys.executable, "-m", "vsockets.cli")

    def run(*arguments: str) -> str:
        command = [*vsock, *arguments]
        done = vsock_fabric.run(
            vsock_fabric.host, command, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        return str(done.stderr)

    assert "chosen: the kernel's AF_VSOCK" in run("connect", "host", "9")
    assert ", the kernel's AF_VSOCK\n" in run("listen", "-v", "-w", "0.1", "any")
