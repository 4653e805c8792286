"""Dissection of captures by tshark."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from vsockets.capture import captured_record, file_header
from vsockets.devices.capture import CaptureSink
from vsockets.model.constants import VMADDR_PORT_ANY
from vsockets.protocol.vsockmon import Captured

needs_tshark = pytest.mark.skipif(shutil.which("tshark") is None, reason="needs tshark")

CONNECT, DISCONNECT, CONTROL, PAYLOAD = "1", "2", "3", "4"

_FIELDS = (
    *("vsock.op", "vsock.src_cid", "vsock.src_port", "vsock.dst_cid", "vsock.dst_port"),
    *("frame.len", "vsock.payload"),
)


def tapped(tap: CaptureSink, limit: int = 65_536, port: int = VMADDR_PORT_ANY) -> socket.socket:
    """Return a non-blocking socket that receives the records of ``tap``."""
    theirs, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    tap.add(theirs, limit, port)
    return ours


def take_records(records: socket.socket) -> list[Captured]:
    """Return the records received so far."""
    taken = []
    with contextlib.suppress(BlockingIOError):
        while message := records.recv(1 << 17):
            taken.append(Captured.decode(message))
    return taken


def dissect_records(records: socket.socket, file: Path) -> list[tuple[str, str, str, int, bytes]]:
    """Write the records received so far to ``file`` and dissect it with :func:`dissect`."""
    file.write_bytes(file_header() + b"".join(map(captured_record, take_records(records))))
    return dissect(file)


def fields_of(file: Path, *fields: str) -> list[list[str]]:
    """Return tshark's values of ``fields`` for each record."""
    command = ["tshark", "-n", "-r", str(file), "-T", "fields", "-E", "separator=,"]
    for field in fields:
        command += ["-e", field]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50, check=True)
    return [line.split(",") for line in done.stdout.splitlines()]


def dissect(file: Path) -> list[tuple[str, str, str, int, bytes]]:
    """Return operation, source, destination, full length and payload of each record."""
    records = []
    for operation, *addresses, length, payload in fields_of(file, *_FIELDS):
        source, destination = ":".join(addresses[:2]), ":".join(addresses[2:])
        records.append((operation, source, destination, int(length), bytes.fromhex(payload)))
    return records
