"""No program inherits sockets of the kernel's AF_VSOCK.  Other families stand in for it here."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

from cli.vsock import Vsock
from vsockets.supervisor.process import inherited_sockets


def test_only_inheritable_sockets_of_the_family_are_found() -> None:
    with socket.socket(socket.AF_INET) as tcp, socket.socket(socket.AF_UNIX) as unix:
        before = inherited_sockets(socket.AF_INET)
        assert tcp.fileno() not in before  # Python closes it at exec
        tcp.set_inheritable(True)
        unix.set_inheritable(True)
        assert inherited_sockets(socket.AF_INET) == sorted([*before, tcp.fileno()])
        assert unix.fileno() in inherited_sockets(socket.AF_UNIX)
        assert inherited_sockets(socket.AF_INET6) == []
        assert tcp.getsockname() == ("0.0.0.0", 0)  # open still


def test_files_other_than_sockets_are_ignored() -> None:
    read, write = os.pipe()
    try:
        for fd in (read, write):
            os.set_inheritable(fd, True)
        assert not {read, write} & set(inherited_sockets(socket.AF_UNIX))
    finally:
        os.close(read)
        os.close(write)


def test_vsock_run_refuses_an_inherited_af_vsock_socket(vsock: Vsock) -> None:
    script = """
import socket, sys
from vsockets.cli import app, run
run.AF_VSOCK = socket.AF_INET
sys.exit(app.start(["run", "--", "echo", "started"]))
"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        fd = server.fileno()
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=vsock.environment,
            pass_fds=[fd],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        f"vsock: descriptor {fd} is a socket of the machine's own "
        "AF_VSOCK, which echo must not inherit: close it, or if a service manager passed it "
        "(LISTEN_FDS), configure another address there\n"
    )
