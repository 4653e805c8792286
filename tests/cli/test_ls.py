"""``vsock ls``."""

from __future__ import annotations

import os
import pwd
import socket as stdlib
from collections.abc import Collection, Iterator

import pytest

import vsockets
from vsockets.cli.ls import Filter
from vsockets.testing import PrivateFabric, wait_until

from .terminal import Terminal
from .vsock import Vsock

USER = pwd.getpwuid(os.geteuid()).pw_name


@pytest.fixture(scope="module")
def sockets(fabric: PrivateFabric) -> Iterator[int]:
    """Open one socket of each kind; yield the CID of the guest with the datagram socket."""
    guest = fabric.guest()
    with (
        vsockets.create_server((2, 5000), context=fabric.host) as server,
        vsockets.socket(type=stdlib.SOCK_DGRAM, context=guest) as datagram,
        vsockets.create_connection((2, 5000), context=guest),
        server.accept()[0],
    ):
        datagram.bind((guest.cid, 4_000_000_000))
        yield guest.cid


def test_every_socket_has_a_row(vsock: Vsock, sockets: int) -> None:
    rows = vsock.json("ls")
    assert [(row["context"], row["type"], row["state"]) for row in rows] == [
        (2, "stream", "listening"),
        (2, "stream", "established"),
        (sockets, "dgram", "unconnected"),
        (sockets, "stream", "established"),
    ]
    assert {row["pid"] for row in rows} == {os.getpid()}
    assert {row["user"] for row in rows} == {USER}
    assert [row["name"] for row in rows] == ["host"] * 2 + [f"guest-{sockets}"] * 2
    assert [row["accepted"] for row in rows] == [None, True, None, False]
    assert rows[1]["peer"] == [rows[3]["cid"], rows[3]["port"]]
    assert (rows[1]["inode"], rows[1]["peer_inode"]) == (rows[3]["peer_inode"], rows[3]["inode"])


def test_filters(vsock: Vsock, fabric: PrivateFabric, sockets: int) -> None:
    rows = fabric.control.sockets()

    def count(port: Collection[int] = (), **values: list[object]) -> int:
        return sum(map(Filter(port, **values), rows))

    assert count() == len(rows) == 4
    assert count(context=[2], state=["listening"]) == 1
    assert count(state=["listening", "unconnected"]) == 2
    # Both ends of the stream: the port of one is the peer's port of the other.
    assert count([5000]) == 3
    assert count([5000, 4_000_000_000]) == 4
    assert count(pid=[os.getpid()], uid=[os.geteuid()]) == 4
    assert count(pid=[1]) == 0
    (listening,) = vsock.json("ls", "-l")
    assert listening["port"] == 5000
    arguments = (*("--type", "dgram", "--context", sockets), *("--pid", os.getpid()))
    (datagram,) = vsock.json("ls", *arguments, "--user", USER, "--port", 4_000_000_000)
    assert datagram["state"] == "unconnected"


def test_bad_filters(vsock: Vsock) -> None:
    vsock.fail(
        ("ls -l --state bound", 2, "exclude each other"),
        ("ls --user no-such-user", 2, "no such user: 'no-such-user'"),
        ("ls --port x", 2, "'x'"),
        ("ls --watch", 2, "standard output is not a terminal"),
    )


def test_queues(vsock: Vsock, fabric: PrivateFabric) -> None:
    guest = fabric.guest()
    with (
        vsockets.create_server((2, 5001), backlog=7, context=fabric.host) as server,
        vsockets.create_connection((2, 5001), context=guest) as client,
        server.accept()[0] as accepted,
        vsockets.create_connection((2, 5001), context=guest),  # pending, not accepted
        vsockets.socket(type=stdlib.SOCK_DGRAM, context=fabric.host) as receiver,
        vsockets.socket(type=stdlib.SOCK_DGRAM, context=guest) as sender,
    ):
        client.sendall(b"12345")
        accepted.sendall(b"123")
        receiver.bind((2, 5001))
        sender.sendto(b"waits", (2, 5001))
        rows = vsock.json("ls", "--port", "5001")
        queues = {
            (row["type"], row["state"], row["cid"], row["port"]): (
                row["receive_queue"],
                row["send_queue"],
            )
            for row in rows
        }
        port = client.getsockname()[1]
        assert queues["stream", "listening", 2, 5001] == (1, 7)
        assert queues["stream", "established", guest.cid, port] == (3, 5)
        assert (5, 3) in [
            (row["receive_queue"], row["send_queue"])
            for row in rows
            if row["accepted"] and row["peer"] == [guest.cid, port]
        ]
        # The kernel counts the memory of a datagram, not its payload.
        waiting, sent = queues["dgram", "unconnected", 2, 5001]
        assert waiting >= 5 and sent == 0
        assert receiver.recv(100) == b"waits"
        (row,) = vsock.json("ls", "--port", "5001", "--type", "dgram")
        assert row["receive_queue"] == 0


def test_the_table_fits_a_terminal_and_cuts_no_address(vsock: Vsock, sockets: int) -> None:
    narrow = ["TYPE", "STATE", "RECV-Q", "SEND-Q", "BYTES/S", "LOCAL", "PEER", "USER", "PROCESS"]
    vsock.environment["COLUMNS"] = "80"
    lines = vsock("ls").stdout.splitlines()
    optional = ("RECV-Q", "SEND-Q", "USER")  # how many have room depends on names and numbers
    shown = [title for title in narrow if title not in optional]
    assert [title for title in lines[0].split() if title not in optional] == shown
    assert all(len(line) <= 80 for line in lines)
    assert any(f"{sockets}:4000000000" in line for line in lines)
    assert any(f" {os.getpid()}" in line for line in lines)
    vsock.environment["COLUMNS"] = "120"
    assert vsock("ls").stdout.split()[:11] == [*narrow[:7], "CONTEXT", "BUFFER", *narrow[7:]]


def test_watching(vsock: Vsock, fabric: PrivateFabric) -> None:
    with Terminal(vsock.environment, "ls", "--watch", "--port", 5002, "--interval", 0.2) as view:
        view.wait_for(lambda lines: lines[0].startswith("0 sockets"))
        with vsockets.create_server((2, 5002), context=fabric.host):
            lines = view.wait_for(lambda lines: lines[0].startswith("1 sockets"))
            assert "TYPE" in lines[1] and "CONTEXT" in lines[1]
            assert "2:5002" in lines[2] and "listening" in lines[2]
        view.wait_for(lambda lines: lines[0].startswith("0 sockets"))
        view.press("q")
        view.finish()


def test_watching_as_json(vsock: Vsock, fabric: PrivateFabric) -> None:
    running = vsock.start("ls", "--watch", "--json", "--port", 5003, "--interval", 0.1)
    assert running.read_line() == "[]"
    with vsockets.create_server((2, 5003), context=fabric.host):
        wait_until(lambda: '"listening"' in running.read_line(), "the listener's row")
