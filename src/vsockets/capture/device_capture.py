"""Writing down what passes a virtual machine's device, which goes on whoever reads along.

A reader that is slow misses records, and is told how many.
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

#: Room for the largest message: the payload and some headers.
_MESSAGE = CAPTURE_PAYLOAD_MAX_BYTES + 4096


def open_capture(
    host: Attachment, cid: int, limit: int = CAPTURE_PAYLOAD_MAX_BYTES, port: int = VMADDR_PORT_ANY
) -> socket.socket:
    """A socket on which comes, a :class:`.Captured` a message, what passes the device of ``cid``.

    ``limit`` bytes of a payload come, of one ``port`` alone unless it is VMADDR_PORT_ANY.
    OSError: EACCES (it is not for this program), ENOENT, ENOTSUP (no device), ENOBUFS.
    """
    _, fd = host.ask(client.capture(cid, port=port, limit=limit))
    return socket.socket(fileno=client.require_descriptor(fd))


class Counts:
    """What was written, and what was not."""

    records = 0
    missed = 0


def write_down(records: socket.socket, file: BinaryIO) -> Counts:
    """Write a capture file until the device ends, or SIGINT or SIGTERM comes.

    Then what is on its way is written, too; a second signal, and that is left.  OSError when the
    file takes no more, or nobody reads it any more.
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
