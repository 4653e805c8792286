"""Capture files of the traffic of the forwarder, and of a virtual machine's device.

A file is a file header and any number of records (``pcap-savefile(5)``, with nanosecond
timestamps).  Records have the format of Linux's ``vsockmon`` device
(:mod:`vsockets.protocol.vsockmon`).

The forwarder writes each record at once, in its own thread: a slow reader of the file slows down
the traffic and misses no record.  A device does not wait for the reader: a reader that is too slow
misses records, and the next record says how many.
"""

from __future__ import annotations

import signal
import socket
import struct
import time
from collections.abc import Callable
from typing import BinaryIO

from .attachment import Attachment
from .limits import CAPTURE_PAYLOAD_MAX_BYTES
from .model.constants import AF_VSOCK, VMADDR_PORT_ANY
from .protocol import client
from .protocol.vsockmon import HEADER_SIZE, Address, Captured, Operation, encode_header

#: The link type's number in tcpdump.org's list.
LINKTYPE_VSOCK = 271

_MAGIC_NANOSECONDS = 0xA1B23C4D
_VERSION = (2, 4)
_FILE_HEADER = struct.Struct("<IHHiIII")
_RECORD_HEADER = struct.Struct("<IIII")

#: Bytes of a virtio-vsock packet header, the longest header of a transport.
_LONGEST_TRANSPORT_HEADER = 44


def file_header() -> bytes:
    """Return the header that begins a capture file."""
    longest = HEADER_SIZE + _LONGEST_TRANSPORT_HEADER + CAPTURE_PAYLOAD_MAX_BYTES
    return _FILE_HEADER.pack(_MAGIC_NANOSECONDS, *_VERSION, 0, 0, longest, LINKTYPE_VSOCK)


def record(
    nanoseconds: int,
    operation: Operation,
    source: Address,
    destination: Address,
    payload: bytes = b"",
    limit: int = CAPTURE_PAYLOAD_MAX_BYTES,
) -> bytes:
    """Return a record at ``nanoseconds`` since 1970 with at most ``limit`` bytes of payload."""
    header = encode_header(operation, source, destination)
    whole = len(header) + len(payload)
    return captured_record(Captured(nanoseconds, 0, whole, header + payload[:limit]))


def captured_record(captured: Captured) -> bytes:
    """Return the capture file's record for ``captured``, a packet that a device has reported."""
    seconds, rest = divmod(captured.nanoseconds, 1_000_000_000)
    header = _RECORD_HEADER.pack(seconds, rest, len(captured.body), captured.length)
    return header + captured.body


#: Size in bytes of a device's largest message: payload and headers.
_MESSAGE_MAX_BYTES = CAPTURE_PAYLOAD_MAX_BYTES + 4096

#: A function called with the direction (True: from client to target) and the bytes transferred; b""
#: marks the end of the direction.
Capture = Callable[[bool, bytes], None]


class Recorder:
    """A writer of records to ``file``, with at most ``limit`` bytes of each payload.

    If a write fails, recording stops and ``failed`` is called with the OSError.
    """

    failed: Callable[[OSError], None]

    def __init__(self, file: BinaryIO, limit: int = CAPTURE_PAYLOAD_MAX_BYTES) -> None:
        """Write the file header.

        Raises OSError if that fails.
        """
        self._file: BinaryIO | None = file
        self._limit = limit
        file.write(file_header())
        file.flush()

    def stream(self, client: socket.socket, target: socket.socket) -> Capture | None:
        """Return the function that records a new connection; None if neither side is vSockets.

        Records have the two addresses of the client's connection if that is a vSockets connection,
        else those of the target's.
        """
        if client.family == AF_VSOCK:
            source, destination = client.getpeername(), client.getsockname()
        elif target.family == AF_VSOCK:
            source, destination = target.getsockname(), target.getpeername()
        else:
            return None
        self.record(Operation.CONNECT, source, destination)

        def capture(to_target: bool, data: bytes) -> None:
            ends = (source, destination) if to_target else (destination, source)
            self.record(Operation.PAYLOAD if data else Operation.DISCONNECT, *ends, data)

        return capture

    def record(
        self, operation: Operation, source: Address, destination: Address, data: bytes = b""
    ) -> None:
        """Write a record of ``data``, with the present time."""
        self._write(record(time.time_ns(), operation, source, destination, data, self._limit))

    def _write(self, data: bytes) -> None:
        if self._file is None:
            return
        try:
            self._file.write(data)
            self._file.flush()
        except OSError as error:  # the disk is full, or the reader has closed the pipe
            self._file = None
            self.failed(error)


def open_capture(
    host: Attachment, cid: int, limit: int = CAPTURE_PAYLOAD_MAX_BYTES, port: int = VMADDR_PORT_ANY
) -> socket.socket:
    """Return a socket that receives the traffic of the device of context ``cid``.

    Each message is one :class:`.Captured`.  ``limit`` is the number of bytes kept of a payload;
    ``port`` restricts the capture to one port unless it is VMADDR_PORT_ANY.

    Raises OSError: EACCES (not permitted), ENOENT (no such context), ENOTSUP (the context has no
    device), ENOBUFS.
    """
    _, fd = host.request(client.capture(cid, port=port, limit=limit))
    if fd is None:
        raise client.missing_descriptor()
    return socket.socket(fileno=fd)


class CaptureCounts:
    """The numbers of records written and missed."""

    records = 0
    missed = 0


def write_capture(records: socket.socket, file: BinaryIO) -> CaptureCounts:
    """Write a capture file until the device ends, or SIGINT or SIGTERM arrives.

    After the signal, records already captured are still written; a second signal interrupts that
    (KeyboardInterrupt).

    Raises OSError when the file cannot be written.
    """
    counts = CaptureCounts()
    file.write(file_header())
    file.flush()

    def end(number: int, frame: object) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.default_int_handler)
        records.shutdown(socket.SHUT_WR)

    before = [(each, signal.signal(each, end)) for each in (signal.SIGINT, signal.SIGTERM)]
    try:
        while message := records.recv(_MESSAGE_MAX_BYTES):
            captured = Captured.decode(message)
            counts.missed += captured.missed
            if captured.body:
                counts.records += 1
                file.write(captured_record(captured))
                file.flush()
    finally:
        for each, handler in before:
            signal.signal(each, handler)
    return counts
