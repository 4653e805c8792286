"""``vsock ls``."""

from __future__ import annotations

import os
import socket as stdlib
from collections.abc import Iterator

import pytest

import vsockets
from vsockets.testing import PrivateFabric

from .vsock import Vsock


@pytest.fixture(scope="module")
def sockets(fabric: PrivateFabric) -> Iterator[int]:
    """One of each, of this process; the CID of the guest that has the datagram socket."""
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
    assert rows[1]["peer"] == [rows[3]["cid"], rows[3]["port"]]


def test_filters(vsock: Vsock, sockets: int) -> None:
    listening = vsock.json("ls", "--listening")
    assert [row["port"] for row in listening] == [5000]
    assert listening == vsock.json("ls", "--state", "listening", "--context", "host")
    (datagram,) = vsock.json("ls", "--type", "dgram", "--context", sockets)
    assert datagram["port"] == 4_000_000_000


def test_the_table_fits_a_terminal_and_cuts_no_address(vsock: Vsock, sockets: int) -> None:
    vsock.environment["COLUMNS"] = "80"
    lines = vsock("ls").stdout.splitlines()
    assert lines[0].split() == ["TYPE", "STATE", "LOCAL", "PEER", "USER", "PROCESS"]
    assert all(len(line) <= 80 for line in lines)
    assert any(f"{sockets}:4000000000" in line for line in lines)
    assert any(f" {os.getpid()}" in line for line in lines)
