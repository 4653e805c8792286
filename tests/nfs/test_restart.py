"""A server process that is killed, and clients that retransmit their calls to the next one.

A played client, so that the datagrams are known to the byte; tests/nfs/test_mounted.py has a real
one.  Over UDP, which an ordinary user has without vsockd.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vsockets.nfs import mount_protocol, nfs3, rpc
from vsockets.nfs.nfs3 import NUMBERS, PROCEDURES, CreateMode, NewAttributes, Status, Target
from vsockets.nfs.nfs_client import credentials

from .stage import NFS, Program

NEW = NewAttributes(mode=0o700)


class RetransmittingClient:
    """A client of servers that follow each other at one port."""

    def __init__(self, folder: Path) -> None:
        self.export, self._state = folder / "export", folder / "state"
        self.export.mkdir()
        self._sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._sock.settimeout(20)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.bind(("127.0.0.1", 0))
            self._address = probe.getsockname()
        self._xid = 0
        self._server: Program | None = None

    def serve(self) -> None:
        self.end()
        self._server = Program(
            (
                *(*NFS, "serve", "--listen", f"udp:127.0.0.1:{self._address[1]}"),
                *("--state", str(self._state), f"--export={self.export},no-root-squash"),
            ),
            dict(os.environ),
        )
        assert "listening" in self._server.line, self._server.line

    def serve_until_killed(self, function: str, stage: str) -> None:
        self.end()
        program = str(Path(__file__).with_name("killed_server.py"))
        export, port = f"{self.export},no-root-squash", str(self._address[1])
        self._server = Program(
            (sys.executable, program, export, str(self._state), port, function, stage),
            dict(os.environ),
        )
        assert self._server.line == "ready\n", self._server.line

    def server_process(self) -> subprocess.Popen[bytes]:
        assert self._server is not None
        return self._server.process

    def server_output(self) -> str:
        """Return the server's next line; "" if no line has arrived yet."""
        output = self.server_process().stdout
        assert output is not None
        readable, _, _ = select.select([output], [], [], 0)
        return output.readline().decode() if readable else ""

    def kill_server(self) -> None:
        assert self._server is not None
        self._server.end(signal.SIGKILL)

    def wait_until_killed(self) -> None:
        assert self._server is not None
        assert self._server.process.wait(20) == -signal.SIGKILL

    def end(self) -> None:
        if self._server is not None:
            self._server.end()
            self._server = None

    def close(self) -> None:
        self.end()
        self._sock.close()

    def call(self, name: str, *arguments: Any) -> bytes:
        packed = PROCEDURES[NUMBERS[name]].arguments.pack(
            arguments[0] if len(arguments) == 1 else arguments
        )
        return self._encode(nfs3.PROGRAM, NUMBERS[name], packed)

    def _encode(self, program: int, number: int, packed: bytes) -> bytes:
        self._xid += 1
        own = credentials(os.geteuid(), os.getegid())
        header = rpc.CallHeader(self._xid, 2, program, 3, number, own, rpc.NO_AUTH)
        return rpc.encode_call(header, packed)

    def send(self, call: bytes) -> None:
        self._sock.sendto(call, self._address)

    def answer(self, call: bytes) -> bytes:
        self.send(call)
        return self._sock.recv(65_536)

    def status(self, name: str, call: bytes) -> int:
        status, _ = nfs3.decode_result(
            PROCEDURES[NUMBERS[name]], rpc.decode_reply(self.answer(call))
        )
        return status

    def root(self) -> bytes:
        packed = mount_protocol.path.pack(os.fsencode(self.export))
        reply = self.answer(self._encode(mount_protocol.PROGRAM, mount_protocol.MNT, packed))
        _, granted = mount_protocol.mount_result.unpack(rpc.decode_reply(reply))
        assert granted is not None
        root = granted[0]
        assert isinstance(root, bytes)
        return root

    def handle(self, root: bytes, name: bytes) -> bytes:
        reply = rpc.decode_reply(self.answer(self.call("lookup", root, name)))
        _, (handle, *_) = nfs3.decode_result(PROCEDURES[NUMBERS["lookup"]], reply)
        assert isinstance(handle, bytes)
        return handle


@pytest.fixture
def client(tmp_path: Path) -> Iterator[RetransmittingClient]:
    client = RetransmittingClient(tmp_path)
    yield client
    client.close()


def _calls(client: RetransmittingClient, root: bytes) -> list[tuple[str, bytes]]:
    """Return a call of each procedure that changes names."""
    file = client.handle(root, b"file")
    arguments: list[tuple[str, tuple[Any, ...]]] = [
        ("remove", (Target(root, b"removed"),)),
        ("rename", (Target(root, b"old"), Target(root, b"new"))),
        ("rmdir", (Target(root, b"folder"),)),
        ("mkdir", (Target(root, b"made"), NEW)),
        ("symlink", (Target(root, b"symlink"), NewAttributes(), b"file")),
        ("link", (file, Target(root, b"link"))),
        ("create", (Target(root, b"guarded"), (CreateMode.GUARDED, NEW))),
        ("create", (Target(root, b"exclusive"), (CreateMode.EXCLUSIVE, b"12345678"))),
    ]
    return [(name, client.call(name, *each)) for name, each in arguments]


def test_killed_server_repeats_no_call(client: RetransmittingClient) -> None:
    """The next server sends the replies of the killed one, and performs nothing a second time."""
    for name in ("removed", "old", "file"):
        (client.export / name).touch()
    (client.export / "folder").mkdir()
    client.serve()
    calls = _calls(client, client.root())
    replies = [client.answer(call) for _, call in calls]
    for name, call in calls:
        assert client.status(name, call) == Status.OK, name
    client.kill_server()
    # Another client has used the same names since.
    for name in ("removed", "old"):
        (client.export / name).write_text("another's")
    (client.export / "folder").mkdir()
    for name in ("symlink", "link", "guarded", "exclusive"):
        (client.export / name).unlink()
    (client.export / "made").rmdir()
    left = sorted(os.listdir(client.export))
    for _ in range(2):  # also if the next server is killed
        client.serve()
        assert [client.answer(call) for _, call in calls] == replies
        client.kill_server()
        assert sorted(os.listdir(client.export)) == left


@pytest.mark.parametrize(
    ("procedure", "function", "stage"),
    [
        ("remove", "unlink", "after"),
        ("link", "link", "after"),
        ("mkdir", "mkdir", "after"),
        ("rename", "rename", "before"),
    ],
)
def test_interrupted_call_is_performed_once(
    client: RetransmittingClient, procedure: str, function: str, stage: str
) -> None:
    """The next server finds whether a killed one has performed its last call.

    It does not know that of a directory, which a program of the host may have made.
    """
    for name in ("removed", "old", "file"):
        (client.export / name).touch()
    (client.export / "folder").mkdir()
    client.serve_until_killed(function, stage)
    call = dict(_calls(client, client.root()))[procedure]
    client.send(call)
    client.wait_until_killed()
    for name in ("removed", "old"):  # used by another program meanwhile
        (client.export / name).touch()
    left = set(os.listdir(client.export))
    expected = Status.SERVERFAULT if procedure == "mkdir" else Status.OK
    changed = {"old", "new"} if stage == "before" else set()
    for _ in range(2):
        client.serve()
        assert client.status(procedure, call) == expected
        assert client.status(procedure, call) == expected
        assert set(os.listdir(client.export)) ^ left == changed
        client.kill_server()


def test_interrupted_exclusive_create_is_completed(client: RetransmittingClient) -> None:
    (client.export / "file").touch()
    client.serve_until_killed("link", "after")  # gives the file its name
    (call,) = [call for name, call in _calls(client, client.root()) if name == "create"][1:]
    client.send(call)
    client.wait_until_killed()
    client.serve()
    assert client.status("create", call) == Status.OK


def test_replaced_server_answers_every_call_once(client: RetransmittingClient) -> None:
    """Another process takes over at SIGUSR2: no call is lost, and none needs a retransmission."""
    client.serve()
    root = client.root()
    process, made = client.server_process(), 0
    for _ in range(2):
        process.send_signal(signal.SIGUSR2)
        while "replaced" not in client.server_output():
            for _ in range(20):
                call = client.call("mkdir", Target(root, b"%d" % made), NEW)
                assert client.status("mkdir", call) == Status.OK
                made += 1
    assert sorted(map(int, os.listdir(client.export))) == list(range(made))
    assert client.status("mkdir", call) == Status.OK  # from the cache of the old process
