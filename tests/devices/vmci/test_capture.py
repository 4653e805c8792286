"""Capture of a VMCI device with a simulated guest, decoded by tshark."""

from __future__ import annotations

from pathlib import Path

from capture.dissecting import (
    CONNECT,
    CONTROL,
    DISCONNECT,
    PAYLOAD,
    dissect_records,
    needs_tshark,
    tapped,
)
from support.vmci_driver import CID, SimulatedGuest
from vsockets.devices.vmci.packets import Handle

pytestmark = needs_tshark

THERE, BACK = (f"{CID}:1234", "2:5000"), ("2:5000", f"{CID}:1234")


def test_a_stream(guest: SimulatedGuest, tmp_path: Path) -> None:
    with tapped(guest.fabric.capture) as records:
        stream = guest.connect(1234, 65_536)
        (theirs,) = guest.fabric.streams
        stream.write(b"question")
        assert theirs.recv(100) == b"question"
        theirs.send(b"answer")
        guest.loop.turn()
        assert stream.read() == b"answer"
        guest.detach(stream.handle)
        rows = dissect_records(records, tmp_path / "stream.pcap")
    # REQUEST, NEGOTIATE, OFFER, ATTACH
    assert rows[:4] == [
        (CONNECT, *THERE, 32, b""),
        (CONNECT, *BACK, 32, b""),
        (CONNECT, *THERE, 32, b""),
        (CONNECT, *BACK, 32, b""),
    ]
    # Each side also sends WROTE.
    assert [row for row in rows[4:] if row[0] == CONTROL] == [
        (CONTROL, *THERE, 32, b""),
        (CONTROL, *BACK, 32, b""),
    ]
    assert [row for row in rows[4:] if row[0] != CONTROL] == [
        (PAYLOAD, *THERE, 32 + 8, b"question"),
        (PAYLOAD, *BACK, 32 + 6, b"answer"),
        (DISCONNECT, *THERE, 32, b""),
    ]


def test_data_in_the_queue_at_close_is_recorded(guest: SimulatedGuest, tmp_path: Path) -> None:
    stream = guest.connect(1234, 65_536)
    while stream.write(bytes(65_535)):  # until the program's buffer and the queue are full
        guest.loop.turn()
    with tapped(guest.fabric.capture) as records:
        guest.detach(stream.handle)
        rows = dissect_records(records, tmp_path / "rest.pcap")
    assert rows[-1][0] == DISCONNECT
    assert sum(length - 32 for op, *_, length, _ in rows if op == PAYLOAD) > 0


def test_datagrams(guest: SimulatedGuest, tmp_path: Path) -> None:
    with tapped(guest.fabric.capture) as records:
        guest.send(Handle(2, 700), b"there", Handle(CID, 800))
        guest.send(Handle(2, 700), b"", Handle(CID, 800))
        guest.fabric.on_datagram((2, 700), 800, b"and back")
        rows = dissect_records(records, tmp_path / "datagrams.pcap")
    there, back = (f"{CID}:800", "2:700"), ("2:700", f"{CID}:800")
    assert rows == [
        (PAYLOAD, *there, 32 + 5, b"there"),
        (PAYLOAD, *there, 32, b""),
        (PAYLOAD, *back, 32 + 8, b"and back"),
    ]
