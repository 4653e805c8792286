"""``vsock capture --context``: with vsockd, a device's process and a simulated guest."""

from __future__ import annotations

import os
import re
import signal
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

import vsockets
from capture.dissecting import PAYLOAD, dissect, needs_tshark
from support.virtio_guest import SimulatedGuest, connect, simulated_guest
from vsockets.devices.virtio.packet import Op, Shutdown
from vsockets.testing import PrivateFabric

from .vsock import Vsock

CID = 9


@pytest.fixture
def guest(vsock: Vsock, tmp_path: Path) -> Iterator[SimulatedGuest]:
    """A device with a simulated driver."""
    path = tmp_path / "device"
    device = vsock.start("device", "virtio", "--cid", CID, "--socket", path)
    assert device.read_line() == str(CID)
    with simulated_guest(path, CID) as guest:
        yield guest


def talk(fabric: PrivateFabric, guest: SimulatedGuest, port: int, data: bytes) -> None:
    """Open a stream from the guest to the host, and echo ``data`` on it."""
    with vsockets.create_server((2, port), context=fabric.host) as server:
        stream = connect(guest, 1000 + port, (2, port))
        sock, _ = server.accept()
        with sock:
            for begin in range(0, len(data), 65_536):
                part = data[begin : begin + 65_536]
                stream.send(part)
                assert sock.recv(len(part), socket.MSG_WAITALL) == part
                sock.sendall(part)
                assert stream.receive(len(part)) == part
        while stream.ended != Shutdown.SEND | Shutdown.RECEIVE:
            stream.receive_packet()
        stream.send_packet(Op.RST)


@needs_tshark
def test_a_file(vsock: Vsock, fabric: PrivateFabric, guest: SimulatedGuest, tmp_path: Path) -> None:
    file = tmp_path / "capture.pcap"
    running = vsock.start("capture", "--context", CID, "-w", file, "--port", 5000)
    assert running.error_line() == f"capturing at the device of context {CID}"
    talk(fabric, guest, 5000, b"hello")
    talk(fabric, guest, 5001, b"not of that port")
    running.process.send_signal(signal.SIGINT)
    _, said = running.finish()
    rows = dissect(file)
    ends = f"{CID}:6000", "2:5000"
    assert [row[:3] + row[4:] for row in rows if row[0] == PAYLOAD] == [
        (PAYLOAD, *ends, b"hello"),
        (PAYLOAD, *reversed(ends), b"hello"),
    ]
    assert said == f"vsock: {len(rows)} records\n"
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o600


def test_a_slow_reader_does_not_delay_the_guest(
    vsock: Vsock, fabric: PrivateFabric, guest: SimulatedGuest
) -> None:
    """Send far more than fits in the buffers of a reader that reads nothing."""
    running = vsock.start("capture", "--context", CID, "-w", "-")
    running.error_line()
    talk(fabric, guest, 5000, bytes(8 << 20))
    running.process.send_signal(signal.SIGTERM)
    _, said = running.finish()
    assert re.fullmatch(r"vsock: \d+ records, \d+ were lost\n", said)


def test_the_end_of_the_device_is_the_end(vsock: Vsock, tmp_path: Path) -> None:
    path = tmp_path / "device"
    device = vsock.start("device", "virtio", "--cid", CID + 1, "--socket", path)
    device.read_line()
    running = vsock.start("capture", "--context", CID + 1, "-w", tmp_path / "file")
    running.error_line()
    device.process.send_signal(signal.SIGTERM)
    _, said = running.finish()
    assert said == "vsock: 0 records\n"


def test_invalid_arguments(vsock: Vsock, fabric: PrivateFabric, tmp_path: Path) -> None:
    cid = fabric.guest().cid
    file = tmp_path / "file"
    vsock.fail(
        (f"capture --context {cid} -w {file}", 1, "the context has no device"),
        (f"capture --context 12345 -w {file}", 1, "no such context"),
        (
            f"capture --context {cid} -w {file} vsock::1 tcp:a:1",
            2,
            "--context: not allowed with",
        ),
        (f"capture -w {file}", 2, "FROM and TO: missing"),
        (f"capture -w {file} --port 5 vsock::1 tcp:a:1", 2, "not allowed without --context"),
    )
    assert not file.exists()
    vsock.environment["VSOCKETS_CONTEXT"] = str(fabric.guest().folder)
    assert "a grant" in vsock.fails("capture", "--context", cid, "-w", file)
