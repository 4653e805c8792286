"""Reports to vsockd: bytes in the streams of a device, and in all of them together.

Nothing is added to the path of the bytes: the streams' own counters are read once a second, and
only while there are streams.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

from ..model.constants import VMADDR_PORT_ANY
from ..model.rates import REPORT_SECONDS, Moved
from ..protocol import client
from .loop import DeviceLoop

#: Counters of 32 bits wrap; the streams of a second have fewer bytes.
_MODULUS_BITS = 0xFFFF_FFFF

Stream = tuple[int, tuple[int, int]]  # the guest's port, and the peer


class _Counted:
    def __init__(self, sample: Callable[[], tuple[int, int]]) -> None:
        self._sample = sample
        self._last = 0, 0
        self.sent = self.received = 0
        self.reported = 0, 0

    def read(self) -> tuple[int, int]:
        """Read the counters; return the numbers of bytes that were added since the last call."""
        sent, received = self._sample()
        more = sent - self._last[0] & _MODULUS_BITS, received - self._last[1] & _MODULUS_BITS
        self._last = sent, received
        self.sent += more[0]
        self.received += more[1]
        return more


class ByteReports:
    """The reports of one device; ``send`` sends a message to vsockd, or raises OSError."""

    def __init__(self, loop: DeviceLoop, cid: int, send: Callable[[bytes], None]) -> None:
        self._loop = loop
        self._cid = cid
        self._send = send
        self._streams: dict[Stream, _Counted] = {}
        self._total = self._reported = Moved(0, 0)
        self._is_scheduled = False

    def add(self, stream: Stream, sample: Callable[[], tuple[int, int]]) -> None:
        """Begin to report ``stream``, which is identified by its guest's port and its peer.

        ``sample`` returns the bytes that the guest has sent and received, modulo 2**32.
        """
        self._streams[stream] = _Counted(sample)
        self._schedule()

    def remove(self, stream: Stream) -> None:
        """Report a stream for the last time, before it is closed."""
        counted = self._streams.pop(stream, None)
        if counted is not None:
            self._report(stream, counted)

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            self._loop.call_later(REPORT_SECONDS, self._report_all)

    def _report_all(self) -> None:
        self._is_scheduled = False
        for stream, counted in self._streams.items():
            self._report(stream, counted)
        if self._total != self._reported:
            with contextlib.suppress(OSError):  # the link is full: the next report has it
                self._send(client.count(self._total, local=(self._cid, VMADDR_PORT_ANY)))
                self._reported = self._total
        if self._streams or self._total != self._reported:
            self._schedule()

    def _report(self, stream: Stream, counted: _Counted) -> None:
        sent, received = counted.read()
        self._total = self._total.plus(sent, received)
        now = counted.sent, counted.received
        if now != counted.reported:
            port, peer = stream
            with contextlib.suppress(OSError):
                self._send(client.count(Moved(*now), local=(self._cid, port), peer=peer))
                counted.reported = now
