"""What passes a device, for whoever captures it.

Who wants it sends the device a socket of packets (through vsockd, which has asked the policy), and
gets a message for each record.  One that does not read them fast enough misses some, and is told
how many: it never holds the device up.
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
        """Raises OSError: BlockingIOError when there is no room."""
        self.sock.send(Captured(time.time_ns(), self.missed, length, body).encode(), _SEND)
        self.missed = 0


class CaptureSink:
    """Where a device says what passes.  It looks at :attr:`sinks` before it does: mostly there
    are none, and then nothing is said.
    """

    def __init__(self, loop: DeviceLoop) -> None:
        self.recorders: tuple[_Recorder, ...] = ()
        self._loop = loop

    def add(self, sock: socket.socket, limit: int, port: int) -> None:
        """Send records to ``sock`` from now on, of a payload ``limit`` bytes at most; of one port
        alone unless that is VMADDR_PORT_ANY.  One too many is hung up on.

        Who shuts down its sending side gets how many it missed last, and then the end.
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
        """One record, with ``length`` bytes of ``payload``; ``transport`` is virtio's header."""
        whose = Transport.VIRTIO if transport else Transport.NONE
        header = encode_header(operation, source, destination, whose, len(transport)) + transport
        length = min(length, sum(map(len, payload)))  # what a guest says may not be so
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
        """The first ``length`` bytes of ``payload``, in as many records as they need."""
        data = memoryview(_first(payload, length))
        for begin in range(0, length, CAPTURE_PAYLOAD_MAX_BYTES):
            part = data[begin : begin + CAPTURE_PAYLOAD_MAX_BYTES]
            self.record(Operation.PAYLOAD, source, destination, (part,), len(part))

    def close(self) -> None:
        """There is no more to come."""
        for recorder in self.recorders:
            self._remove(recorder)

    def _on_readable(self, recorder: _Recorder) -> None:
        """Its reader has said something, which is nothing to us, or ends it, or has room again."""
        try:
            if recorder.sock.recv(1, MSG_DONTWAIT):
                return
        except BlockingIOError:
            return
        except OSError:
            pass  # it has gone, which sending says again
        try:
            recorder.send(0, b"")
        except BlockingIOError:
            # The last word waits for room; the end that was heard is heard again then.
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
    """The first ``length`` bytes of ``parts``, or all."""
    pieces = []
    for part in parts:
        if length <= 0:
            break
        pieces.append(part[:length])
        length -= len(part)
    return b"".join(pieces)
