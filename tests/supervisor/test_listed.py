"""``vsock ls`` lists the programs, not their supervisor."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from cli.vsock import Vsock
from daemon.users import CAP_SYS_ADMIN, has_capability
from vsockets.testing import PrivateFabric

PROGRAM = """
import os, socket, sys
if len(sys.argv) > 1: os.setgroups([]), os.setresuid(*3 * [int(sys.argv[1])])
server, datagrams = socket.socket(40, 1), socket.socket(40, 2)
server.bind((1, 7600))
server.listen()
datagrams.bind((-1 % 2**32, 7601))
reader, writer = os.pipe()
client = os.fork()
if client == 0:
    server.close()
    sock = socket.socket(40, 1)
    sock.connect((1, 7600))
    sys.stdin.readline()
    os._exit(0)
accepted = server.accept()[0]
worker = os.fork()
if worker == 0:
    server.close()
    sys.stdin.readline()
    os._exit(0)
accepted.close()
print(os.getpid(), client, worker, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("user", [None, 65534])
def test_each_socket_is_listed_with_its_process(vsock: Vsock, user: int | None) -> None:
    if user is not None and os.getuid() != 0:
        pytest.skip("only root can change its user")
    running = vsock.start(
        *("run", "--cid", "75", "sh", "-c", '"$0" -c "$@"; exit 0', sys.executable, PROGRAM),
        *([] if user is None else [user]),
    )
    server, client, worker = map(int, running.read_line().split())
    rows = vsock.json("ls", "--context", 75)
    known = {(row["type"], row["state"], row["port"] == 7600): row for row in rows}
    assert len(known) == len(rows) == 4
    who = {key: row["pid"] for key, row in known.items()}
    assert who == {
        ("stream", "listening", True): server,
        ("stream", "established", False): client,
        ("stream", "established", True): worker,
        ("dgram", "unconnected", False): server,
    }
    registered = {key: row["registered_by"]["pid"] for key, row in known.items()}
    if has_capability(CAP_SYS_ADMIN):  # the supervisor can send its programs' credentials
        assert registered == {**who, ("stream", "established", True): server}
    else:
        (supervisor,) = set(registered.values())
        assert supervisor not in who.values()
    for row in rows:
        assert row["uid"] == row["registered_by"]["uid"] == (os.getuid() if user is None else user)
        assert row["command"].startswith("python")
    running.finish()


CLAIM = """
import socket, sys, vsockets.attachment
from vsockets.protocol import Op, Request
sock = socket.socket(socket.AF_UNIX)
vsockets.attachment.current().open_channel(sock, socket.SOCK_STREAM)
sock.send(Request(Op.BIND, 0, 2, 7602, inode=int(sys.argv[1])).encode())
sock.recv(200)
print("bound", flush=True)
sys.stdin.read()
"""


def test_a_process_cannot_claim_another_processs_socket(
    vsock: Vsock, fabric: PrivateFabric
) -> None:
    with (
        socket.socket() as ours,
        subprocess.Popen(
            [sys.executable, "-c", CLAIM, str(os.fstat(ours.fileno()).st_ino)],
            env=fabric.environment(fabric.host),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as claiming,
    ):
        assert claiming.stdout and claiming.stdout.readline() == b"bound\n"
        (row,) = vsock.json("ls", "--context", "host")
        assert row["inode"] is None  # vsockd trusts the kernel's data alone
        assert row["pid"] == row["registered_by"]["pid"] == claiming.pid
        claiming.communicate(timeout=20)
