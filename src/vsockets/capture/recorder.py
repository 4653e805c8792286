"""Recording of the forwarder's traffic.

Records are written at once, in the forwarder's thread: a slow reader slows the traffic down and
misses nothing.
"""

from __future__ import annotations

import socket as stdlib
import time
from collections.abc import Callable
from typing import BinaryIO

from ..limits import CAPTURE_PAYLOAD_MAX_BYTES
from ..model.constants import AF_VSOCK
from ..protocol.vsockmon import Address, Operation
from .pcap import file_header, record

#: Called with True for the direction from client to target, and the bytes; b"" for the end.
Capture = Callable[[bool, bytes], None]


class Recorder:
    """A writer of records to ``file``, with at most ``limit`` bytes of each payload.

    ``failed`` is called once, when the file cannot be written; recording stops then.
    """

    failed: Callable[[OSError], None]

    def __init__(self, file: BinaryIO, limit: int = CAPTURE_PAYLOAD_MAX_BYTES) -> None:
        """Write the file header.

        Raises OSError.
        """
        self._file: BinaryIO | None = file
        self._limit = limit
        file.write(file_header())
        file.flush()

    def stream(self, client: stdlib.socket, target: stdlib.socket) -> Capture | None:
        """Return the capture function of a new connection; None if neither side is vSockets.

        Records have the addresses of the client's side if that is vSockets, else the target's.
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
        """Write a record with the present time."""
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
