"""``PrivateFabric.popen`` and ``run``: unmodified programs of any language in a guest."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import c_compiler
import vsockets
from vsockets.testing import PrivateFabric, wait_until

pytest.importorskip("click", reason="vsock needs click")

PATIENCE = 60.0

#: An agent that does not use this package but the standard library's AF_VSOCK.
AGENT = """
import socket, sys
with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as sock:
    sock.connect((2, int(sys.argv[1])))
    sock.sendall(b"hello")
    sock.recv(1)
"""

C_AGENT = r"""
#include <stdlib.h>
#include <sys/socket.h>
#include <linux/vm_sockets.h>
#include <unistd.h>
int main(int count, char **arguments) {
    struct sockaddr_vm address = {
        .svm_family = AF_VSOCK, .svm_cid = 2, .svm_port = atoi(arguments[1])};
    int sock = socket(AF_VSOCK, SOCK_STREAM, 0);
    if (count != 2 || connect(sock, (struct sockaddr *)&address, sizeof address)) return 1;
    return write(sock, "hello", 5) != 5;
}
"""


@pytest.fixture
def server(vsock_fabric: PrivateFabric) -> vsockets.socket:
    server = vsockets.create_server((2, vsockets.VMADDR_PORT_ANY), context=vsock_fabric.host)
    server.settimeout(PATIENCE)
    return server


def receive_from_client(server: vsockets.socket) -> tuple[int, bytes]:
    """Return the CID of the next client and the data it sends."""
    with server:
        connection, (cid, _) = server.accept()
        with connection:
            connection.settimeout(PATIENCE)
            return cid, connection.recv(100)


def test_agent_with_the_standard_library(
    vsock_fabric: PrivateFabric, server: vsockets.socket
) -> None:
    vsock_fabric.guest()
    guest = vsock_fabric.guest()
    port = str(server.getsockname()[1])
    process = vsock_fabric.popen(guest, [sys.executable, "-c", AGENT, port])
    assert receive_from_client(server) == (guest.cid, b"hello")
    assert process.wait(PATIENCE) == 0


def test_agent_in_c(vsock_fabric: PrivateFabric, server: vsockets.socket, tmp_path: Path) -> None:
    source, program = tmp_path / "agent.c", tmp_path / "agent"
    source.write_text(C_AGENT)
    c_compiler.compile_c("-o", program, source)
    guest = vsock_fabric.guest()
    # Relative to the working directory, as in README.
    command = ["./agent", str(server.getsockname()[1])]
    vsock_fabric.run(guest, command, cwd=tmp_path, check=True, timeout=PATIENCE)
    assert receive_from_client(server) == (guest.cid, b"hello")


def test_options_of_subprocess(vsock_fabric: PrivateFabric, tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("raise SystemExit('not this one')")
    done = vsock_fabric.run(
        vsock_fabric.guest(),
        ["sh", "-c", "cat; echo $WORD-$HOME; pwd; exit 3"],
        input="in\n",
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"WORD": "given", "PATH": os.environ["PATH"]},
        timeout=PATIENCE,
    )
    assert (done.stdout, done.returncode) == (f"in\ngiven-\n{tmp_path}\n", 3), done.stderr


def test_signals_reach_the_program_and_the_fabric_kills_it(tmp_path: Path) -> None:
    with PrivateFabric() as fabric:
        guest = fabric.guest()
        script = "echo $$; read line"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with fabric.popen(guest, ["sh", "-c", script], **pipes) as process:
            assert process.stdout is not None and process.stdout.readline()
            process.terminate()
            assert process.wait(PATIENCE) == -signal.SIGTERM
        left = fabric.popen(guest, ["sh", "-c", script], **pipes)
        assert left.stdout is not None
        pid = int(left.stdout.readline())
    assert left.returncode == -signal.SIGKILL
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the program to be killed")


def test_program_in_the_host_context(vsock_fabric: PrivateFabric) -> None:
    script = (
        "import socket; sock = socket.socket(socket.AF_VSOCK);"
        "sock.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY)); print(sock.getsockname()[0])"
    )
    done = vsock_fabric.run(
        vsock_fabric.host, [sys.executable, "-c", script], capture_output=True, text=True
    )
    assert done.stdout == "2\n", done.stderr
