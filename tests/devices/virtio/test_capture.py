"""Capture of a virtio device with a simulated guest, decoded by tshark."""

from __future__ import annotations

import socket
from pathlib import Path

from capture.dissecting import (
    CONNECT,
    CONTROL,
    DISCONNECT,
    PAYLOAD,
    dissect_records,
    fields_of,
    needs_tshark,
    take_records,
    tapped,
)
from support.virtio_guest import accept, connect
from vsockets.devices.virtio.packet import HEADER_SIZE, Header, Op, Sequenced, Type
from vsockets.testing.waiting import wait_until

from .conftest import CID, Rig

HOST = (2, 5000)
#: Length of a record without payload: vsockmon's header and virtio's.
BARE = 32 + HEADER_SIZE


def begin(rig: Rig, limit: int = 65_536) -> socket.socket:
    taps: list[socket.socket] = []
    rig.call(lambda: taps.append(tapped(rig.device.capture, limit)))
    return taps[0]


@needs_tshark
def test_a_stream(rig: Rig, tmp_path: Path) -> None:
    rig.host.open_ports.add(5000)
    guest = rig.guest()
    file = tmp_path / "stream.pcap"
    with begin(rig) as records:
        stream = connect(guest, 1024, HOST)
        (sock,) = rig.host.accepted
        stream.send(b"question")
        assert sock.recv(100) == b"question"
        sock.send(b"answer")
        assert stream.receive(6) == b"answer"
        stream.send_packet(Op.CREDIT_REQUEST)
        assert stream.receive_packet().op == Op.CREDIT_UPDATE
        stream.send_packet(Op.RST)
        assert sock.recv(1) == b""
        rows = dissect_records(records, file)
    there, back = (f"{CID}:1024", "2:5000"), ("2:5000", f"{CID}:1024")
    assert rows == [
        (CONNECT, *there, BARE, b""),
        (CONNECT, *back, BARE, b""),
        (PAYLOAD, *there, BARE + 8, b"question"),
        (PAYLOAD, *back, BARE + 6, b"answer"),
        (CONTROL, *there, BARE, b""),
        (CONTROL, *back, BARE, b""),
        (DISCONNECT, *there, BARE, b""),
    ]
    headers = fields_of(file, "vsock.trans", "vsock.virtio.op", "vsock.virtio.len")
    assert headers == [
        ["2", str(int(op)), str(length)]
        for op, length in (
            (Op.REQUEST, 0),
            (Op.RESPONSE, 0),
            (Op.RW, 8),
            (Op.RW, 6),
            (Op.CREDIT_REQUEST, 0),
            (Op.CREDIT_UPDATE, 0),
            (Op.RST, 0),
        )
    ]


@needs_tshark
def test_bulk_data_in_single_descriptor_buffers(rig: Rig, tmp_path: Path) -> None:
    """Header and payload in one descriptor, and a limit for the payload."""
    guest = rig.guest(split=False)
    with begin(rig, limit=4) as records:
        sock, _ = rig.connect_to_guest(7000)
        stream = accept(guest)
        sock.sendall(b"abcdef" * 2000)
        stream.receive(12_000)
        rows = dissect_records(records, tmp_path / "much.pcap")
    assert [row[0] for row in rows[:2]] == [CONNECT, CONNECT]
    payloads = [row for row in rows if row[0] == PAYLOAD]
    assert sum(length - BARE for _, _, _, length, _ in payloads) == 12_000


@needs_tshark
def test_messages(rig: Rig, tmp_path: Path) -> None:
    rig.host.open_ports.add(5000)
    guest = rig.guest()
    with begin(rig) as records:
        stream = connect(guest, 1024, HOST, type=Type.SEQPACKET)
        (sock,) = rig.host.accepted
        stream.send(b"one message", flags=Sequenced.END_OF_MESSAGE)
        assert sock.recv(100) == b"one message"
        sock.send(b"another")
        assert stream.receive(7) == b"another"
        rows = dissect_records(records, tmp_path / "messages.pcap")
    assert [row[4] for row in rows if row[0] == PAYLOAD] == [b"one message", b"another"]


def test_packets_of_a_hostile_guest(rig: Rig) -> None:
    guest = rig.guest()
    with begin(rig) as records:
        for op, length, payload in ((Op.RW, 0xFFFF_FFFF, b"short"), (77, 5, b""), (Op.RST, 9, b"")):
            header = Header(CID, 2, 1, 2, length, op=op)
            guest.send(header, payload)
        came = []
        wait_until(lambda: came.extend(take_records(records)) or len(came) >= 3, "them")  # type: ignore[func-returns-value]
        assert all(record.length == len(record.body) for record in came)
        assert came[0].body.endswith(b"short")
