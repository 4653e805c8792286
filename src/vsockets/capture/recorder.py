"""Writing down what the forwarder carries, as it carries it.

Records are written at once, in the forwarder's own thread: whoever reads along and is slow slows
the traffic down, and misses nothing.
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

#: Called with whether it goes from client to target, and the bytes; none for the end.
Tap = Callable[[bool, bytes], None]


class Recorder:
    """Records to ``file``, of each payload ``limit`` bytes at most.

    ``broken`` is called once when the file takes no more; nothing is recorded from then on.
    """

    broken: Callable[[OSError], None]

    def __init__(self, file: BinaryIO, limit: int = CAPTURE_PAYLOAD_MAX_BYTES) -> None:
        """Raises OSError."""
        self._file: BinaryIO | None = file
        self._limit = limit
        file.write(file_header())
        file.flush()

    def stream(self, client: stdlib.socket, target: stdlib.socket) -> Tap | None:
        """A tap for a connection that has come about; None when neither side is vSockets.

        Addresses are those of the client's side when that is vSockets, else the target's.
        """
        if client.family == AF_VSOCK:
            source, destination = client.getpeername(), client.getsockname()
        elif target.family == AF_VSOCK:
            source, destination = target.getsockname(), target.getpeername()
        else:
            return None
        self.record(Operation.CONNECT, source, destination)

        def tap(there: bool, data: bytes) -> None:
            ends = (source, destination) if there else (destination, source)
            self.record(Operation.PAYLOAD if data else Operation.DISCONNECT, *ends, data)

        return tap

    def record(
        self, operation: Operation, source: Address, destination: Address, data: bytes = b""
    ) -> None:
        """Write one record."""
        self._write(record(time.time_ns(), operation, source, destination, data, self._limit))

    def _write(self, data: bytes) -> None:
        if self._file is None:
            return
        try:
            self._file.write(data)
            self._file.flush()
        except OSError as error:  # the disk is full, or nobody reads any more
            self._file = None
            self.broken(error)
