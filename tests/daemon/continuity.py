"""Checks of what stays when another process of vsockd serves: after a replacement, after a kill."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable

import pytest

import vsockets
from vsockets import AF_VSOCK, Attachment
from vsockets.protocol import RECORD_SIZE, Record
from vsockets.testing import PrivateFabric, wait_until

from .test_device_link import Device

PATIENCE = 10.0


def datagram(context: Attachment, address: tuple[int, int]) -> vsockets.socket:
    sock = vsockets.socket(AF_VSOCK, socket.SOCK_DGRAM, context=context)
    sock.settimeout(PATIENCE)
    sock.bind(address)
    return sock


def check_streams_listeners_and_ports(
    fabric: PrivateFabric, change: Callable[[], object], *differing: str
) -> None:
    """Check that ``change`` leaves all but ``differing``, fields of vsockd's status."""
    guest = fabric.guest()
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        server = enter(vsockets.create_server((2, 5000), context=fabric.host))
        client = enter(vsockets.create_connection((2, 5000), context=guest))
        accepted = enter(server.accept()[0])
        waiting = enter(vsockets.create_connection((2, 5000), context=guest))
        bound = enter(vsockets.socket(context=guest))
        bound.bind((guest.cid, 7000))
        packets = enter(vsockets.socket(AF_VSOCK, socket.SOCK_SEQPACKET, context=fabric.host))
        packets.bind((2, 5001))
        packets.listen()
        before = fabric.control.sockets()
        first, counts = fabric.control.status(), fabric.control.counts()

        change()

        assert fabric.control.sockets() == before
        assert fabric.control.counts() == counts
        status = fabric.control.status()
        assert status["pid"] != first["pid"]
        changed = dict.fromkeys(("pid", "uptime", *differing))
        assert {**status, **changed} == {**first, **changed}
        client.send(b"x")
        assert accepted.recv(1) == b"x"
        late, peer = server.accept()
        enter(late)
        assert peer == waiting.getsockname()
        another = enter(vsockets.create_connection((2, 5000), context=guest))
        assert another.getsockname()[1] == waiting.getsockname()[1] + 1  # no port is reused soon
        enter(server.accept()[0])
        bound.listen()
        enter(vsockets.create_connection((guest.cid, 7000), context=fabric.host))
        with pytest.raises(OSError) as refused:
            vsockets.create_server((2, 5000), context=fabric.host)
        assert refused.value.errno == errno.EADDRINUSE
        accepted.close()
        assert client.recv(1) == b""
    assert fabric.control.sockets() == []
    vsockets.create_server((2, 5000), context=fabric.host).close()


def check_byte_counts(fabric: PrivateFabric, change: Callable[[], object]) -> None:
    """Check that ``change`` leaves reported bytes, of a stream, and of a guest's devices."""
    guest = fabric.guest()
    server = vsockets.create_server((2, 5000), context=fabric.host)
    former = Device(fabric, guest)
    former.count(None, 10, 20)
    wait_until(lambda: _moved(fabric, guest) == (10, 20), "the first device's report")
    former.link.close()
    wait_until(lambda: former.is_detached(fabric), "the device to be detached")
    device = Device(fabric, guest)
    with server, device.link, device.connect(700, 2, 5000) as stream:
        assert Record.decode(stream.recv(RECORD_SIZE)).status == 0
        accepted = server.accept()[0]
        device.count((700, 2, 5000), 3, 4)
        device.count(None, 5, 6)
        wait_until(lambda: _moved(fabric, guest) == (15, 26), "the reports")
        for number in range(2):
            before = _bytes(fabric)
            assert len(before) == 2
            change()
            assert _bytes(fabric) == before
            assert _moved(fabric, guest) == (15 + number, 26)
            device.count(None, 6 + number, 6)
            wait_until(lambda: _moved(fabric, guest)[0] == 16 + number, "another report")  # noqa: B023
        accepted.close()


def _bytes(fabric: PrivateFabric) -> list[tuple[int, int]]:
    rows = fabric.control.sockets()
    return [(one["bytes_sent"], one["bytes_received"]) for one in rows if one["peer"]]


def _moved(fabric: PrivateFabric, guest: Attachment) -> tuple[int, int]:
    (row,) = [one for one in fabric.control.counts()["contexts"] if one["cid"] == guest.cid]
    return row["bytes_sent"], row["bytes_received"]


def check_datagram_sockets_and_routes(fabric: PrivateFabric, change: Callable[[], object]) -> None:
    """Check that ``change`` leaves sockets and routes, and that routes end with their socket."""
    guest = fabric.guest()
    with datagram(fabric.host, (2, 6000)) as service, datagram(guest, (guest.cid, 6001)) as client:
        client.sendto(b"before", (2, 6000))
        route = next(iter(vars(client)["_routes"].values())).dup()
        change()
        assert service.recvfrom(10) == (b"before", (guest.cid, 6001))
        client.sendto(b"after", (2, 6000))
        assert service.recvfrom(10) == (b"after", (guest.cid, 6001))
        service.sendto(b"back", (guest.cid, 6001))
        assert client.recvfrom(10) == (b"back", (2, 6000))
    with route, datagram(guest, (guest.cid, 6001)), pytest.raises(OSError):
        route.send(b"in another's name")  # revoked, or its destination is closed
