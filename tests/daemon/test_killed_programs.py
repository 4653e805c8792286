"""A program killed at any step of a connect: its port is released, its peer sees the end."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

import vsockets
from vsockets.testing import PrivateFabric

from .raw_client import PROMPT, guest_of

STREAM, SEQPACKET, DATAGRAM = socket.SOCK_STREAM, socket.SOCK_SEQPACKET, socket.SOCK_DGRAM
both_kinds = pytest.mark.parametrize("kind", [STREAM, SEQPACKET])

#: Steps of programs; each reports its completion, and waits to be killed.
PROLOGUE = "import sys, vsockets, socket\nkind = int(sys.argv[1])\ns = vsockets.socket(type=kind)\n"
EPILOGUE = "\nprint('done', flush=True)\nsys.stdin.read()"


@contextlib.contextmanager
def program(
    shared_fabric: PrivateFabric, context: vsockets.Attachment, kind: int, steps: str
) -> Iterator[subprocess.Popen[str]]:
    """Yield a program that has done ``steps``; it is killed at the end of the context."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROLOGUE + steps + EPILOGUE, str(kind)],
        env=shared_fabric.environment(context),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "done\n"
            yield process
        finally:
            process.kill()


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.wait()


def assert_told(sock: vsockets.socket) -> None:
    """Check that the peer sees the end: no data, or a reset."""
    sock.settimeout(PROMPT)
    with contextlib.suppress(ConnectionResetError):
        assert sock.recv(1) == b""


@both_kinds
@pytest.mark.parametrize("steps", ["s.bind((2, 5000))", "s.bind((2, 5000)); s.listen()"])
def test_after_bind_and_after_listen(shared_fabric: PrivateFabric, kind: int, steps: str) -> None:
    with program(shared_fabric, shared_fabric.host, kind, steps) as holder:
        with vsockets.socket(type=kind, context=shared_fabric.host) as mine:
            with pytest.raises(OSError) as refusal:
                mine.bind((2, 5000))
            assert refusal.value.errno == errno.EADDRINUSE
            kill(holder)
            mine.bind((2, 5000))
        with pytest.raises(ConnectionResetError):
            vsockets.create_connection((2, 5000), context=shared_fabric.host)


def test_a_datagram_socket(shared_fabric: PrivateFabric) -> None:
    with (
        program(shared_fabric, shared_fabric.host, DATAGRAM, "s.bind((2, 5000))") as holder,
        vsockets.socket(type=DATAGRAM, context=shared_fabric.host) as mine,
    ):
        with pytest.raises(OSError) as refusal:
            mine.bind((2, 5000))
        assert refusal.value.errno == errno.EADDRINUSE
        mine.sendto(b"x", (2, 5000))
        kill(holder)
        with pytest.raises(ConnectionRefusedError):
            mine.sendto(b"x", (2, 5000))
        with vsockets.socket(type=DATAGRAM, context=shared_fabric.host) as successor:
            successor.bind((2, 5000))


@both_kinds
def test_the_client_before_accept(shared_fabric: PrivateFabric, kind: int) -> None:
    guest = guest_of(shared_fabric)
    with vsockets.create_server((2, 5000), type=kind, context=shared_fabric.host) as server:
        steps = f"s.bind(({guest.cid}, 6000)); s.connect((2, 5000)); s.send(b'last words')"
        with program(shared_fabric, guest, kind, steps) as client:
            kill(client)
            # Its port is free although the connection was not accepted.
            with vsockets.socket(type=kind, context=guest) as successor:
                successor.bind((guest.cid, 6000))
            accepted, peer = server.accept()
            with accepted:
                assert peer == (guest.cid, 6000)
                assert accepted.recv(100) == b"last words"
                assert_told(accepted)


@both_kinds
def test_the_server_before_accept(shared_fabric: PrivateFabric, kind: int) -> None:
    steps = "s.bind((2, 5000)); s.listen()"
    with (
        program(shared_fabric, shared_fabric.host, kind, steps) as server,
        vsockets.socket(type=kind, context=guest_of(shared_fabric)) as client,
    ):
        client.connect((2, 5000))
        client.send(b"anybody there?")
        kill(server)
        assert_told(client)
        vsockets.create_server((2, 5000), type=kind, context=shared_fabric.host).close()


@both_kinds
def test_the_client_after_accept(shared_fabric: PrivateFabric, kind: int) -> None:
    guest = guest_of(shared_fabric)
    with vsockets.create_server((2, 5000), type=kind, context=shared_fabric.host) as server:
        steps = f"s.bind(({guest.cid}, 6000)); s.connect((2, 5000))"
        with program(shared_fabric, guest, kind, steps) as client:
            accepted, _ = server.accept()
            with accepted:
                kill(client)
                assert_told(accepted)
                with vsockets.socket(type=kind, context=guest) as successor:
                    successor.bind((guest.cid, 6000))


@both_kinds
def test_the_server_after_accept(shared_fabric: PrivateFabric, kind: int) -> None:
    guest = guest_of(shared_fabric)
    steps = (
        "s.bind((2, 5000)); s.listen(); print('listening', flush=True); a, _ = s.accept()\n"
        "a.recv(1)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", PROLOGUE + steps + EPILOGUE, str(kind)],
        env=shared_fabric.environment(shared_fabric.host),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process, vsockets.socket(type=kind, context=guest) as client:
        assert process.stdout is not None
        assert process.stdout.readline() == "listening\n"
        client.bind((guest.cid, 6000))
        client.connect((2, 5000))
        client.send(b"x")
        assert process.stdout.readline() == "done\n"
        kill(process)
        assert_told(client)
        client.close()
        vsockets.create_server((2, 5000), type=kind, context=shared_fabric.host).close()
        with vsockets.socket(type=kind, context=guest) as successor:
            successor.bind((guest.cid, 6000))


@both_kinds
def test_a_stream_lasts_as_long_as_any_descriptor_of_it(
    shared_fabric: PrivateFabric, kind: int
) -> None:
    """The program is killed, and its child has the socket."""
    steps = (
        "s.connect((2, 5000))\n"
        "import os\n"
        "pid = os.fork()\n"
        "if pid == 0:\n"
        "    s.recv(1); s.send(b'child'); os._exit(0)\n"
        "os.write(1, b'child %d\\n' % pid)"
    )
    with vsockets.create_server((2, 5000), type=kind, context=shared_fabric.host) as server:
        with program_with_child(shared_fabric, kind, steps) as (parent, child):
            accepted, _ = server.accept()
            with accepted:
                kill(parent)
                assert len(shared_fabric.control.sockets()) == 3
                accepted.send(b"x")
                accepted.settimeout(PROMPT)
                assert accepted.recv(100) == b"child"
                assert_told(accepted)
        assert child


@contextlib.contextmanager
def program_with_child(
    shared_fabric: PrivateFabric, kind: int, steps: str
) -> Iterator[tuple[subprocess.Popen[str], int]]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROLOGUE + steps + EPILOGUE, str(kind)],
        env=shared_fabric.environment(guest_of(shared_fabric)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        assert process.stdout is not None
        child = int(process.stdout.readline().removeprefix("child "))
        try:
            assert process.stdout.readline() == "done\n"
            yield process, child
        finally:
            process.kill()
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
