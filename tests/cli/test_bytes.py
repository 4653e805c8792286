"""Bytes a second, in streams whose bytes a process moves and counts."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import vsockets
from support.virtio_guest import connect, simulated_guest
from vsockets.model.rates import Moved
from vsockets.protocol import client
from vsockets.testing import PrivateFabric, wait_until

from .forwarding import start
from .terminal import Terminal
from .vsock import PATIENCE, Vsock

SIZE = 300_000


def streams(fabric: PrivateFabric, port: int) -> list[dict[str, Any]]:
    """Return the ends of streams to a port of the host, the connecting one first."""
    rows = [row for row in fabric.control.sockets() if row["peer"] and row["accepted"] is not None]
    rows = [row for row in rows if port in (row["port"], row["peer"][1])]
    return sorted(rows, key=lambda row: bool(row["accepted"]))


@contextmanager
def device(vsock: Vsock, path: Path, cid: int) -> Iterator[None]:
    running = vsock.start("device", "virtio", "--cid", cid, "--socket", path)
    assert running.read_line() == str(cid)
    yield
    running.process.terminate()
    running.finish()


def test_a_device_counts_the_bytes_of_its_guest(
    vsock: Vsock, fabric: PrivateFabric, tmp_path: Path
) -> None:
    path, cid = tmp_path / "device", fabric.guest(60).cid
    with (
        vsockets.create_server((2, 5060), context=fabric.host) as server,
        device(vsock, path, cid),
        simulated_guest(path, cid) as guest,
    ):
        stream = connect(guest, 7000, (2, 5060))
        sock, _ = server.accept()
        with sock:
            sock.settimeout(PATIENCE)
            stream.send(bytes(SIZE))
            left = SIZE
            while left:
                left -= len(sock.recv(left))
            sock.sendall(bytes(100))
            assert len(stream.receive(100)) == 100
            wait_until(lambda: streams(fabric, 5060)[0]["bytes_sent"], "a report", PATIENCE)
            ours, theirs = streams(fabric, 5060)
            assert (ours["bytes_sent"], ours["bytes_received"]) == (SIZE, 100)
            assert (theirs["bytes_sent"], theirs["bytes_received"]) == (100, SIZE)
            assert (ours["send_rate"], theirs["send_rate"]) == (SIZE, 100)
            (shown,) = (line for line in vsock("ls", "--context", cid).stdout.splitlines()[1:2])
            assert "300k" in shown.split()
        (row,) = (row for row in fabric.control.counts()["contexts"] if row["cid"] == cid)
        assert (row["bytes_sent"], row["bytes_received"]) == (SIZE, 100)
        text = vsock("metrics").stdout
        assert f'vsock_sent_bytes_total{{context="{cid}",name="guest-{cid}"}} {SIZE}' in text
    # The next device of the guest continues.
    with (
        vsockets.create_server((2, 5060), context=fabric.host) as server,
        device(vsock, path, cid),
        simulated_guest(path, cid) as guest,
    ):
        stream = connect(guest, 7000, (2, 5060))
        with server.accept()[0]:
            stream.send(bytes(11))

            def total() -> int:
                rows = fabric.control.counts()["contexts"]
                return next(int(row["bytes_sent"]) for row in rows if row["cid"] == cid)

            wait_until(lambda: total() == SIZE + 11, "a report", PATIENCE)


def test_a_forwarder_counts_the_bytes_of_its_streams(
    vsock: Vsock, fabric: PrivateFabric, echo: int
) -> None:
    guest = fabric.guest(61)
    _, port = start(vsock, "tcp:127.0.0.1:0", f"vsock:host:{echo}")
    _, back = start(vsock, "vsock::any", f"tcp:127.0.0.1:{port}")
    with vsockets.create_connection((2, back), PATIENCE, context=guest) as sock:
        sock.sendall(b"question")
        assert sock.recv(100) == b"question"
        wait_until(lambda: streams(fabric, echo)[0]["bytes_sent"], "a report", PATIENCE)
        wait_until(lambda: streams(fabric, back)[0]["bytes_sent"], "a report", PATIENCE)
        for row in (*streams(fabric, echo), *streams(fabric, back)):
            assert (row["bytes_sent"], row["bytes_received"]) == (8, 8)
    rows = fabric.control.counts()["contexts"]
    assert {row["bytes_sent"] for row in rows if row["cid"] in (2, 61)} == {None}


def test_streams_between_programs_are_not_counted(vsock: Vsock, fabric: PrivateFabric) -> None:
    guest = fabric.guest(62)
    with (
        vsockets.create_server((2, 5062), context=fabric.host) as server,
        vsockets.create_connection((2, 5062), context=guest) as one,
        server.accept()[0],
    ):
        one.sendall(b"unseen")
        assert {row["bytes_sent"] for row in streams(fabric, 5062)} == {None}
        vsock.environment["COLUMNS"] = "80"
        lines = vsock("ls", "--context", 62).stdout.splitlines()
        assert "BYTES/S" in lines[0] and "-" in lines[1].split()
        assert max(map(len, lines)) <= 80
        with Terminal(vsock.environment, "top", "--interval", 0.2) as view:
            view.wait_for(lambda lines: sum("BYTES/S" in line for line in lines) == 2)
            view.press("q")
            view.finish()


def test_reports_on_streams_of_others_change_nothing(fabric: PrivateFabric) -> None:
    guest, other = fabric.guest(63), fabric.guest(64)
    with (
        vsockets.create_server((2, 5063), context=fabric.host) as server,
        vsockets.create_connection((2, 5063), context=guest) as one,
        server.accept()[0],
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as channel,
    ):
        cookie = one.getsockopt(socket.SOL_SOCKET, 57, 8)  # SO_COOKIE
        request = client.count(
            Moved((1 << 64) - 1, 7), cookie=int.from_bytes(cookie, "little"), inode=1
        )
        other.open_channel(channel, socket.SOCK_SEQPACKET)
        channel.send(request)
        assert other.request(client.local_cid())[0].local_cid == 64  # requests are served in turn
        assert streams(fabric, 5063)[0]["bytes_sent"] is None
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as own:
            guest.open_channel(own, socket.SOCK_SEQPACKET)
            for _ in range(2):
                own.send(request)
            wait_until(lambda: streams(fabric, 5063)[0]["bytes_sent"], "the report", PATIENCE)
        assert streams(fabric, 5063)[0]["bytes_sent"] == (1 << 64) - 1


def test_reports_of_a_device_are_on_its_own_guest(fabric: PrivateFabric) -> None:
    guest, machine = fabric.guest(65), fabric.guest(66)
    with (
        vsockets.create_server((2, 5065), context=fabric.host) as server,
        vsockets.create_connection((2, 5065), context=guest) as one,
        server.accept()[0],
        fabric.control.attach_device(machine.cid) as link,
    ):
        link.send(client.count(Moved(5, 6), local=one.getsockname(), peer=(2, 5065)))
        link.send(client.count(Moved(5, 6), local=(65, vsockets.VMADDR_PORT_ANY)))
        link.send(client.count(Moved((1 << 64) - 1, 7), local=(66, vsockets.VMADDR_PORT_ANY)))
        link.send(client.count(Moved(1, 2), local=(66, vsockets.VMADDR_PORT_ANY)))

        def totals() -> dict[int, tuple[object, object]]:
            rows = fabric.control.counts()["contexts"]
            return {row["cid"]: (row["bytes_sent"], row["bytes_received"]) for row in rows}

        largest = ((1 << 64) - 1, 7)
        wait_until(lambda: totals()[66] == largest, "the reports", PATIENCE)
        assert totals()[65] == (None, None)
        assert streams(fabric, 5065)[0]["bytes_sent"] is None
