"""The guest's transmit queue: packets from the guest, understood and handed on.

Packets of one stream that come one after another are handed on together, so that many of them
go by one system call.
"""

from __future__ import annotations

from time import monotonic
from typing import Protocol

from ..capture import CaptureSink
from ..limits import IO_VECTORS_MAX
from .capture import record
from .host_stream import HostStream
from .kick_coalescing import KickCoalescing
from .limits import VIRTIO_PACKETS_PER_TURN_MAX
from .packet import HEADER, HEADER_SIZE, Header, Op, Type
from .ring import Ring, RingError, total

_unpack_header = HEADER.unpack_from
_RW = int(Op.RW)
_STREAM = int(Type.STREAM)


class Receiver(Protocol):
    """Where packets go."""

    #: by the peer's CID and port and the guest's port
    links: dict[tuple[int, int, int], HostStream]

    @property
    def is_overwhelmed(self) -> bool:
        """Whether no more packets are to be looked at now."""

    def receive(self, header: Header, link: HostStream | None) -> None:
        """A packet without payload for anybody; its credit was taken note of."""

    def touched(self, link: HostStream) -> None:
        """What the guest may be sent, or is to be told, has changed."""


class TransmitQueue:
    """Takes packets of the guest ``cid``."""

    def __init__(self, ring: Ring, cid: int, receiver: Receiver, tap: CaptureSink) -> None:
        self.packets = 0  #: taken in the last turn
        self._ring = ring
        self._cid = cid
        self._receiver = receiver
        self._tap = tap

    def stop(self) -> int:
        """Let go of the guest's memory; returns where to go on."""
        self._ring.rewind()
        self._ring.publish()
        return self._ring.base

    def run(self, pace: KickCoalescing) -> tuple[bool, bool]:
        """Take packets, for a turn.

        Returns whether there are more, and whether the guest wants to be told.  If there are
        no more, a kick will come with as many as ``pace`` asks for, by what came now.
        """
        receiver, pop = self._receiver, self._ring.pop
        links = receiver.links
        notes: list[int] = []
        run: HostStream | None = None  # whose payload was collected and not yet handed on
        views: list[memoryview] = []
        length = 0
        taken = 0  # bytes of payload
        paced = False
        more = True
        cid, tap = self._cid, self._tap
        turn = 0 if receiver.is_overwhelmed else VIRTIO_PACKETS_PER_TURN_MAX
        while turn:
            turn -= 1
            chain = pop()
            if chain is None:
                if run is not None and pace.packets == 1:  # an answer may be waited for
                    run.pass_on(views, length)
                    receiver.touched(run)
                    run, views, length = None, [], 0
                if not paced:  # those that come just now are not counted
                    pace.took(len(notes), taken, monotonic())
                    paced = True
                if self._ring.want_kick(pace.packets):
                    continue
                more = False
                break
            note, parts, writable = chain
            if writable:
                raise RingError("a buffer of the transmit queue that is not to be read")
            notes.append(note)
            # As Linux has it, without a call: the header apart from the payload.
            if len(parts) == 2 and len(parts[0]) == HEADER_SIZE:
                fields = _unpack_header(parts[0])
                del parts[0]
            else:
                fields = _take_header(parts)
            if tap.sinks:
                record(tap, HEADER.pack(*fields), parts)
            src_cid, dst_cid, src_port, dst_port, size, type_, op, flags, alloc, fwd = fields
            link = links.get((dst_cid, dst_port, src_port))
            if link is not None and link.type == type_ and src_cid == cid:
                link.send.update(alloc, fwd)
                if op == _RW:
                    taken += size
                    if (len(parts) != 1 or len(parts[0]) != size) and not _limit(parts, size):
                        link.reset()
                    elif link.take(size):
                        if type_ != _STREAM:
                            link.pass_on_fragment(parts, size, flags)
                        elif size:
                            if link is not run or len(views) + len(parts) > IO_VECTORS_MAX:
                                if run is not None:
                                    run.pass_on(views, length)
                                    receiver.touched(run)
                                run, views, length = link, parts, size
                            else:
                                views += parts
                                length += size
                            continue
                    receiver.touched(link)
                    continue
            if run is not None:  # first what came first
                run.pass_on(views, length)
                receiver.touched(run)
                run, views, length = None, [], 0
            receiver.receive(Header(*fields), link)
            if receiver.is_overwhelmed:
                break
        if run is not None:
            run.pass_on(views, length)
            receiver.touched(run)
        push = self._ring.push
        for note in notes:
            push(note, 0)
        self.packets = len(notes)
        return more, self._ring.publish()


def _take_header(parts: list[memoryview]) -> tuple[int, ...]:
    """Read the header, once, and take it off ``parts``."""
    if not parts:
        raise RingError("a packet without a header")
    first = parts[0]
    if len(first) >= HEADER_SIZE:
        fields = _unpack_header(first)
        if len(first) == HEADER_SIZE:
            del parts[0]
        else:
            parts[0] = first[HEADER_SIZE:]
        return fields
    data = b""
    while parts and len(data) < HEADER_SIZE:
        part = parts.pop(0)
        missing = HEADER_SIZE - len(data)
        data += part[:missing]
        if len(part) > missing:
            parts.insert(0, part[missing:])
    if len(data) < HEADER_SIZE:
        raise RingError(f"a packet of {len(data)} bytes")
    return _unpack_header(data)


def _limit(parts: list[memoryview], size: int) -> bool:
    """Make ``parts`` ``size`` bytes long; False when they are shorter."""
    there = len(parts[0]) if len(parts) == 1 else total(parts)
    while there > size:
        excess = there - size
        last = parts.pop()
        if len(last) > excess:
            parts.append(last[:-excess])
            return True
        there -= len(last)
    return there == size
