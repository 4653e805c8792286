"""Records of the packets that pass a device.

A capturing program passes a message socket to the device through vsockd, which checks the policy.
The program then receives one message for each record.  A program that reads too slowly misses
records; the next record has the number of missed records.  A slow program never blocks the device.
"""

from __future__ import annotations

import errno
import select
import socket
import time
from collections.abc import Sequence
from socket import MSG_DONTWAIT, MSG_NOSIGNAL

from ..limits import CAPTURE_PAYLOAD_MAX_BYTES
from ..model.constants import VMADDR_PORT_ANY
from ..protocol.vsockmon import Address, Captured, Operation, Transport, encode_header
from .limits import DEVICE_CAPTURES_MAX
from .loop import DeviceLoop

_SEND = int(MSG_DONTWAIT | MSG_NOSIGNAL)


class _Recorder:
    def __init__(self, sock: socket.socket, limit: int, port: int) -> None:
        self.sock = sock
        self.limit = limit
        self.port = port
        self.missed = 0

    def send(self, length: int, body: bytes) -> None:
        """Send a record: the packet's ``length`` in bytes, and the captured part of it, ``body``.

        Raises BlockingIOError when the socket has no room, another OSError when the program has
        closed the socket.
        """
        self.sock.send(Captured(time.time_ns(), self.missed, length, body).encode(), _SEND)
        self.missed = 0


class CaptureSink:
    """All running captures of a device.

    The device makes a record only if :attr:`recorders` is not empty.
    """

    def __init__(self, loop: DeviceLoop) -> None:
        self.recorders: tuple[_Recorder, ...] = ()
        self._loop = loop

    def add(self, sock: socket.socket, limit: int, port: int) -> None:
        """Send records to ``sock``, with at most ``limit`` bytes of each payload.

        ``port`` selects the records of one port, VMADDR_PORT_ANY those of all ports.  ``sock`` is
        closed at once if the device has DEVICE_CAPTURES_MAX captures.  When the program shuts down
        its sending side, a last record with the number of missed records follows, then end of
        file.
        """
        if len(self.recorders) >= DEVICE_CAPTURES_MAX:
            sock.close()
            return
        sock.setblocking(False)
        recorder = _Recorder(sock, limit, port)
        self.recorders += (recorder,)
        self._loop.watch(sock.fileno(), lambda events: self._on_readable(recorder))

    def record(
        self,
        operation: Operation,
        source: Address,
        destination: Address,
        payload: Sequence[memoryview] = (),
        length: int = 0,
        transport: bytes = b"",
    ) -> None:
        """Send a record with the first ``length`` bytes of ``payload`` to each capturing program.

        ``transport`` is the encoded virtio header of the packet, empty for other transports.
        """
        whose = Transport.VIRTIO if transport else Transport.NONE
        header = encode_header(operation, source, destination, whose, len(transport)) + transport
        # The length in the guest's header may be wrong.
        length = min(length, sum(map(len, payload)))
        for recorder in self.recorders:
            if recorder.port not in (VMADDR_PORT_ANY, source[1], destination[1]):
                continue
            try:
                recorder.send(
                    len(header) + length, header + _first(payload, min(length, recorder.limit))
                )
            except OSError as error:
                if error.errno in (errno.EAGAIN, errno.ENOBUFS, errno.EMSGSIZE):
                    recorder.missed = min(recorder.missed + 1, 0xFFFF_FFFF)
                else:
                    self._remove(recorder)

    def stream(
        self, source: Address, destination: Address, payload: Sequence[memoryview], length: int
    ) -> None:
        """Send the first ``length`` bytes of a stream's ``payload``, in one or more records."""
        data = memoryview(_first(payload, length))
        for begin in range(0, length, CAPTURE_PAYLOAD_MAX_BYTES):
            part = data[begin : begin + CAPTURE_PAYLOAD_MAX_BYTES]
            self.record(Operation.PAYLOAD, source, destination, (part,), len(part))

    def close(self) -> None:
        """End all captures."""
        for recorder in self.recorders:
            self._remove(recorder)

    def _on_readable(self, recorder: _Recorder) -> None:
        """Handle readiness of a capture's socket: ignore data; end the capture at end of file."""
        try:
            if recorder.sock.recv(1, MSG_DONTWAIT):
                return
        except BlockingIOError:
            return
        except OSError:
            pass  # the program has closed the socket, which the send below detects, too
        try:
            recorder.send(0, b"")
        except BlockingIOError:
            # The last record waits for room; then the loop reports the end of file again.
            self._loop.change(recorder.sock.fileno(), select.EPOLLOUT)
            return
        except OSError:
            pass
        self._remove(recorder)

    def _remove(self, recorder: _Recorder) -> None:
        self._loop.unwatch(recorder.sock.fileno())
        recorder.sock.close()
        self.recorders = tuple(other for other in self.recorders if other is not recorder)


def _first(parts: Sequence[memoryview], length: int) -> bytes:
    """Return the first ``length`` bytes of ``parts``, or all bytes if ``parts`` are shorter."""
    pieces = []
    for part in parts:
        if length <= 0:
            break
        pieces.append(part[:length])
        length -= len(part)
    return b"".join(pieces)
