"""Programs of root's supervisor that have dropped privileges: the supervisor's do not count."""

from __future__ import annotations

import socket
import sys

import pytest

import vsockets
from cli.vsock import Vsock
from daemon.users import NOBODY, as_administrator
from vsockets.testing import PrivateFabric

from .conftest import Compile

pytestmark = as_administrator

#: Sends a request to vsockd on the program's own socket; prints the reply's status or the error.
SAYS_ITSELF = """
import os, socket, sys
from vsockets.protocol import Op, RECORD_SIZE, Record, Request
SIZES = 65536, 128, 262144
BIND = Request(Op.BIND, 0, 0xFFFFFFFF, 80, 0, 0, 0, *SIZES)
CAPTURE = Request(Op.CAPTURE, peer_cid=3, size=100)
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
def say(sock, request):
    try:
        os.write(sock.fileno(), request.encode())
        return os.strerror(Record.decode(sock.recv(RECORD_SIZE)).status)
    except OSError as error:
        return "not connected to vsockd"
for kind in (socket.SOCK_STREAM, socket.SOCK_SEQPACKET):
    sock = socket.socket(40, kind)
    try: sock.bind((0xFFFFFFFF, 80))
    except OSError as error: print(error.strerror)
    try: sock.connect((2, 9))
    except OSError as error: print(error.strerror)
    print(say(sock, BIND))
    sock = socket.socket(40, kind)
    sock.setblocking(False)
    sock.connect_ex((2, 9))
    print(say(sock, BIND))
    sock = socket.socket(40, kind)
    sock.bind((0xFFFFFFFF, 0xFFFFFFFF))
    print(say(sock, CAPTURE))
    sock.listen()
    print(say(sock, CAPTURE))
"""


@pytest.mark.parametrize("cid", ["host", "3"])
def test_a_programs_own_request_has_its_own_rights(vsock: Vsock, cid: str) -> None:
    done = vsock("run", "--cid", cid, sys.executable, "-c", SAYS_ITSELF)
    refused = {"Permission denied", "not connected to vsockd"}
    for lines in (done.stdout.splitlines()[:6], done.stdout.splitlines()[6:]):
        assert lines[:2] == ["Permission denied", "Connection reset by peer"]
        assert len(lines) == 6
        assert set(lines[2:]) <= refused
    assert done.stderr == ""


def test_a_programs_request_during_a_connect_has_its_own_rights(
    vsock: Vsock, compile_c: Compile
) -> None:
    """One thread connects to an unused port, another keeps writing requests of its own."""
    done = vsock("run", "--cid", "host", compile_c("interjects.c", "-pthread"), "200")
    assert done.stdout == "0 of 200 have port 80\n"


RIGHTS = """
import ctypes, os, socket, struct, sys
user, port = map(int, sys.argv[1:])
os.setgroups([])
os.setgid(user)
os.setuid(user)
ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE, as after an execution
def trusted(sock):
    value, size = ctypes.c_int(), ctypes.c_int(4)
    libc = ctypes.CDLL(None)
    assert libc.getsockopt(sock.fileno(), 40, 5, ctypes.byref(value), ctypes.byref(size)) == 0
    return value.value
sock = socket.socket(40, socket.SOCK_STREAM)
print(os.getpid(), trusted(sock), flush=True)
sock.connect((2, port))
datagrams = socket.socket(40, socket.SOCK_DGRAM)
try: datagrams.bind((0xFFFFFFFF, 81)); print("bound")
except OSError as error: print(error.strerror)
datagrams.sendto(b"hello", (2, port))
"""


@pytest.mark.parametrize("user", [0, NOBODY])
def test_vsockd_and_peers_get_the_programs_credentials(
    vsock: Vsock, fabric: PrivateFabric, user: int
) -> None:
    with (
        vsockets.create_server((2, 7600), context=fabric.host) as server,
        vsockets.socket(type=socket.SOCK_DGRAM, context=fabric.host) as receiver,
    ):
        receiver.bind((2, 7600))
        receiver.settimeout(20)
        running = vsock.start("run", "--cid", "host", sys.executable, "-c", RIGHTS, user, 7600)
        pid, trusted = map(int, running.read_line().split())
        assert trusted == (user == 0)
        connection, _ = server.accept()
        with connection:
            credentials = connection.peer_credentials()
            assert (credentials.pid, credentials.uid, credentials.gid) == (pid, user, user)
        assert running.read_line() == ("bound" if user == 0 else "Permission denied")
        assert receiver.recv(10) == b"hello"
        running.finish()


CONNECT = """
import os, socket, sys
user, cid = map(int, sys.argv[1:])
os.setgid(user)
os.setuid(user)
for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
    sock = socket.socket(40, kind)
    try: sock.connect((cid, 7700)) or sock.send(b"x"); print("reached")
    except OSError as error: print(error.strerror)
"""


def test_a_restricted_guest_accepts_trusted_programs_only(
    vsock: Vsock, fabric: PrivateFabric
) -> None:
    guest = fabric.guest(profile="restricted", owner=NOBODY - 1)
    with (
        vsockets.create_server((guest.cid, 7700), context=guest),
        vsockets.socket(type=socket.SOCK_DGRAM, context=guest) as receiver,
    ):
        receiver.bind((guest.cid, 7700))
        outcomes = {0: "reached", NOBODY - 1: "reached", NOBODY: "Permission denied"}
        for user, outcome in outcomes.items():
            done = vsock("run", "--cid", "host", sys.executable, "-c", CONNECT, user, guest.cid)
            assert done.stdout.splitlines() == [outcome] * 2, user
