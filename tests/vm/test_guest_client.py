"""The guest's agent and its client on this machine, with a well-behaved and a hostile guest."""

from __future__ import annotations

import io
import json
import os
import socket
import tarfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import vsockets
from vsockets.testing import PrivateFabric
from vsockets.vm import guest_agent, guest_client

PATIENCE = 30.0


@contextmanager
def served(request: object) -> Iterator[socket.socket]:
    """Start the guest's agent with a request; yield the stream."""
    client_end, agent_end = socket.socketpair()
    client_end.settimeout(PATIENCE)

    def serve() -> None:
        with agent_end:
            guest_agent.serve_command(agent_end, (2, 5000))

    server = threading.Thread(target=serve)
    server.start()
    with client_end:
        client_end.sendall(json.dumps(request).encode() + b"\nits input\n")
        yield client_end
    server.join(PATIENCE)
    assert not server.is_alive()


class TestCommands:
    def test_input_begins_after_the_request(self) -> None:
        with served({"command": ["cat"]}) as sock:
            sock.shutdown(socket.SHUT_WR)
            assert sock.makefile().read() == "its input\n"

    def test_command_on_a_terminal(self) -> None:
        with served({"command": ["sh"], "rows": 33, "columns": 101}) as sock:
            sock.sendall(b"stty size; exit\n")
            output = b"".join(iter(lambda: sock.recv(4096), b""))
        assert b"33 101\r\n" in output

    def test_closed_connection_ends_the_command(self) -> None:
        with served({"command": ["sleep", "1000"], "rows": 24, "columns": 80}):
            pass  # the agent ends, and the command with its terminal


def archive(*files: tuple[str, bytes], link: str = "") -> bytes:
    """Return a tar archive with arbitrary file names."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w|") as tar:
        if link:
            member = tarfile.TarInfo("link")
            member.type, member.linkname = tarfile.SYMTYPE, link
            tar.addfile(member)
        for name, data in files:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture
def copy_out(
    vsock_fabric: PrivateFabric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[bytes], None]]:
    """A function that copies files out of a guest which sends the given bytes."""
    monkeypatch.setattr(guest_client, "COMMAND_PORT", 5022)
    guest = vsock_fabric.guest()
    with vsockets.create_server((guest.cid, 5022), context=guest) as server:

        def copy(data: bytes) -> None:
            def send() -> None:
                sock, _ = server.accept()
                with sock:
                    sock.sendall(data)
                    while sock.recv(4096):
                        pass

            sender = threading.Thread(target=send)
            sender.start()
            client = guest_client.GuestClient(vsock_fabric.host, guest.cid)
            try:
                client.copy_out("/srv", tmp_path / "out", lambda done: None, 1000)
            finally:
                sender.join(PATIENCE)

        yield copy


def test_copy_out(copy_out: Callable[[bytes], None], tmp_path: Path) -> None:
    copy_out(archive(("./a/b", b"hello"), ("./c", bytes(995))))
    assert (tmp_path / "out/a/b").read_bytes() == b"hello"
    assert guest_client.digest(tmp_path / "out") != guest_client.digest(tmp_path / "out/a")


@pytest.mark.parametrize(
    "sent",
    [
        archive(("../evil", b"x")),
        archive(("a/../../evil", b"x")),
        archive(("/evil", b"x")),
        archive(("twice", b"x"), ("twice", b"y")),
        archive(("large", bytes(1001))),
    ],
)
def test_hostile_archives_are_refused(
    copy_out: Callable[[bytes], None], tmp_path: Path, sent: bytes
) -> None:
    with pytest.raises(OSError):
        copy_out(sent)
    assert {path.name for path in tmp_path.rglob("*")} <= {"out", "twice"}


def test_links_are_not_created(copy_out: Callable[[bytes], None], tmp_path: Path) -> None:
    copy_out(archive(("link/evil", b"x"), link=os.fspath(tmp_path)))
    assert not (tmp_path / "evil").exists()
    assert (tmp_path / "out/link/evil").read_bytes() == b"x"
