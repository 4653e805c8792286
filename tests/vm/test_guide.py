"""The guide's C programs in a stock guest, with Python programs on the host."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

import vsockets
from c_compiler import compile_c

from .exchanges import PATIENCE, datagram, serve
from .machine import Machine

ROOT = Path(__file__).parents[2]
PROGRAMS = ("stream_client", "stream_server", "datagram_client", "datagram_server")

_RUN = "import subprocess; result = subprocess.run(command, capture_output=True, text=True).stdout"
_SERVE = """
import subprocess, sys
sys.serving = subprocess.Popen([program, "0"], stdout=subprocess.PIPE, text=True)
result = int(sys.serving.stdout.readline().rpartition(" ")[2])
"""
_HEARD = "import sys; result = sys.serving.communicate()[0]"


@pytest.fixture(scope="module")
def guest(machine: Machine, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """A guest with the programs in its root directory."""
    folder = tmp_path_factory.mktemp("programs")
    include = ROOT / "src/vsockets/include"
    for name in PROGRAMS:
        source, program = ROOT / f"examples/c/{name}.c", folder / name
        compile_c("-static", f"-I{include}", "-o", program, source)
        machine.put({f"/{name}": program.read_bytes()})
    return machine


def test_stream_client(guest: Machine) -> None:
    server, port = serve(guest)
    with server:
        job = guest.start(_RUN, command=["/stream_client", "2", str(port)])
        connection, (cid, _) = server.accept()
        assert cid == guest.cid
        with connection:
            while data := connection.recv(4096):
                connection.sendall(data.upper())
        assert job.result() == f"HELLO FROM CONTEXT {guest.cid}\n"


def test_stream_server(guest: Machine) -> None:
    port = guest.run(_SERVE, program="/stream_server")
    with vsockets.create_connection((guest.cid, port), context=guest.host) as connection:
        connection.settimeout(PATIENCE)
        connection.sendall(b"hello from python")
        connection.shutdown(socket.SHUT_WR)
        assert connection.makefile().read() == "HELLO FROM PYTHON"
    assert guest.run(_HEARD) == "serving context 2\n"


def test_datagram_client(guest: Machine) -> None:
    with datagram(guest) as service:
        port = service.getsockname()[1]
        job = guest.start(_RUN, command=["/datagram_client", "2", str(port)])
        for question in (b"sendto", b"send"):
            data, source = service.recvfrom(4096)
            assert (data, source[0]) == (question, guest.cid)
            service.sendto(b"you are context %d" % source[0], source)
        you = f"you are context {guest.cid}\n"
        assert job.result() == f"context 2 says: {you}and again: {you}"


def test_datagram_server(guest: Machine) -> None:
    port = guest.run(_SERVE, program="/datagram_server")
    with datagram(guest) as client:
        for question in (b"first", b"second"):
            client.sendto(question, (guest.cid, port))
            assert client.recvfrom(4096) == (b"you are context 2", (guest.cid, port))
    assert guest.run(_HEARD) == "first from context 2\nsecond from context 2\n"
