"""Capture of the traffic of a virtual machine's device, which a slow reader does not slow down.

A reader that is too slow misses records and learns how many.
"""

from __future__ import annotations

import signal
import socket
from typing import BinaryIO

from ..attachment import Attachment
from ..limits import CAPTURE_PAYLOAD_MAX_BYTES
from ..model.constants import VMADDR_PORT_ANY
from ..protocol import client
from ..protocol.vsockmon import Captured
from .pcap import captured_record, file_header

#: Size in bytes of the largest message: payload and headers.
_MESSAGE = CAPTURE_PAYLOAD_MAX_BYTES + 4096


def open_capture(
    host: Attachment, cid: int, limit: int = CAPTURE_PAYLOAD_MAX_BYTES, port: int = VMADDR_PORT_ANY
) -> socket.socket:
    """Return a socket that receives the traffic of the device of context ``cid``.

    Each message is one :class:`.Captured`.  ``limit`` is the number of bytes kept of a payload;
    ``port`` restricts the capture to one port unless it is VMADDR_PORT_ANY.

    Raises OSError: EACCES (not permitted), ENOENT (no such context), ENOTSUP (the context has no
    device), ENOBUFS.
    """
    _, fd = host.ask(client.capture(cid, port=port, limit=limit))
    return socket.socket(fileno=client.require_descriptor(fd))


class Counts:
    """The numbers of records written and missed."""

    records = 0
    missed = 0


def write_capture(records: socket.socket, file: BinaryIO) -> Counts:
    """Write a capture file until the device ends, or SIGINT or SIGTERM arrives.

    After the signal, records already captured are still written; a second signal interrupts that
    (KeyboardInterrupt).  Raises OSError when the file cannot be written.
    """
    counts = Counts()
    file.write(file_header())
    file.flush()

    def end(number: int, frame: object) -> None:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.default_int_handler)
        records.shutdown(socket.SHUT_WR)

    before = [(each, signal.signal(each, end)) for each in (signal.SIGINT, signal.SIGTERM)]
    try:
        while message := records.recv(_MESSAGE):
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
