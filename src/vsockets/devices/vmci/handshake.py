"""Handshake of a stream: control packets in, control packets out, no I/O.

The guest connects::

    guest                         device
    REQUEST2 size, protocols  →        asks the fabric
                              ←   NEGOTIATE2 size, protocol      or RST
    allocates the queue pair
    OFFER handle              →
                              ←   ATTACH handle                  both are connected

When a client connects to the guest, the two sides exchange their roles.  But the guest still
provides the memory, when it attaches to the queue pair that the device has only named::

                              ←   REQUEST2 size, protocols
    NEGOTIATE2 size, protocol →                                  or RST
                              ←   OFFER handle
    attaches with its pages
    ATTACH handle             →                                  both are connected

Version 1 of the protocol has REQUEST and NEGOTIATE instead of REQUEST2 and NEGOTIATE2, and another
flow control.  A side that does not know a packet replies INVALID; the sender of a REQUEST2 then
sends REQUEST.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum, auto

from ...model.buffers import BufferSizes
from .packets import Handle, Kind, Packet, Protocol, handle_value


@dataclass(slots=True)
class Step:
    """Result of an event: packets to send, and the outcome if the handshake has ended."""

    #: packets to send: kind, value, protocol
    packets: list[tuple[Kind, int, int]] = field(default_factory=list)
    handle: Handle | None = None  #: the stream is established with this queue pair
    error: int = 0  #: the handshake has failed with this errno

    def send(self, kind: Kind, value: int = 0, protocol: int = 0) -> Step:
        """Add a packet and return this step."""
        self.packets.append((kind, value, protocol))
        return self


def _fail(error: int, tell: bool = True) -> Step:
    step = Step(error=error)
    return step.send(Kind.RST) if tell else step


class State(Enum):
    """State of a handshake, named after the last packet; a comment names the expected event."""

    ASKING = auto()  #: the fabric's reply
    REQUESTED = auto()  #: NEGOTIATE or NEGOTIATE2
    NEGOTIATED = auto()  #: OFFER
    OFFERED = auto()  #: ATTACH
    OVER = auto()


# A plain integer: an enum's & costs as much as a system call.
_QUEUE_STATE = int(Protocol.QUEUE_STATE)

#: Predicate: an unused queue pair with this handle and these sizes exists.
FindQueuePair = Callable[[Handle, int], bool]


class Accepting:
    """Handshake of a connect from the guest; ``request`` is the guest's first packet."""

    def __init__(self, request: Packet, find: FindQueuePair) -> None:
        self.state = State.ASKING
        self.wanted = request.value  #: the size that the guest proposes, in bytes
        self.protocol_v1 = request.kind == Kind.REQUEST
        self.size = 0
        self._protocol = request.protocol & _QUEUE_STATE
        self._find = find
        self._possible = self.wanted > 0 and (self.protocol_v1 or self._protocol)

    @property
    def possible(self) -> bool:
        """Flag: true if the request has a size and a supported flow control."""
        return bool(self._possible)

    def accepted(self, size: int) -> Step:
        """Accept the guest's request with a buffer size of ``size`` bytes.

        Call it when the fabric has connected the stream.
        """
        self.state, self.size = State.NEGOTIATED, size
        kind = Kind.NEGOTIATE if self.protocol_v1 else Kind.NEGOTIATE2
        return Step().send(kind, size, self._protocol)

    def refused(self, error: int) -> Step:
        """Refuse the guest's request, which the fabric has refused with the errno ``error``."""
        self.state = State.OVER
        return _fail(error)

    def receive(self, packet: Packet) -> Step:
        """Handle a packet of the guest."""
        waits = self.state is State.NEGOTIATED
        self.state = State.OVER
        if packet.kind == Kind.RST:
            return _fail(errno.ECONNRESET, tell=False)
        if packet.kind != Kind.OFFER or not waits or not self._find(packet.handle, self.size):
            return _fail(errno.ECONNRESET)
        return Step(handle=packet.handle).send(Kind.ATTACH, packet.value)


class Connecting:
    """Handshake of a connect to the guest.

    ``sizes`` are the proposed buffer size and the limits of the guest's choice, in bytes.
    ``handle`` is the handle of the queue pair to be created.
    """

    def __init__(
        self, sizes: BufferSizes, handle: Handle, find: FindQueuePair, protocol_v1: bool = False
    ) -> None:
        self.state = State.REQUESTED
        self.handle = handle
        self.protocol_v1 = protocol_v1
        self.size = 0
        self._sizes = sizes
        self._find = find
        self._fell_back = False

    def begin(self) -> Step:
        """Return the first step: send REQUEST2, or REQUEST in version 1."""
        if self.protocol_v1:
            return Step().send(Kind.REQUEST, self._sizes.size)
        return Step().send(Kind.REQUEST2, self._sizes.size, Protocol.QUEUE_STATE)

    def receive(self, packet: Packet) -> Step:
        """Handle a packet of the guest."""
        kind = packet.kind
        if self.state is State.REQUESTED:
            if kind == (Kind.NEGOTIATE if self.protocol_v1 else Kind.NEGOTIATE2):
                return self._negotiated(packet)
            if kind == Kind.INVALID and not self.protocol_v1:
                self.protocol_v1 = self._fell_back = True
                return self.begin()
            if kind == Kind.RST and self._fell_back:
                # INVALID may be followed by an RST for the first request.
                self._fell_back = False
                return Step()
        elif self.state is State.OFFERED and self._is_attached(packet):
            self.state = State.OVER
            return Step(handle=self.handle)
        self.state = State.OVER
        return _fail(errno.ECONNRESET, tell=kind != Kind.RST)

    def _is_attached(self, packet: Packet) -> bool:
        ours = packet.kind == Kind.ATTACH and packet.handle == self.handle
        return ours and self._find(self.handle, self.size)

    def _negotiated(self, packet: Packet) -> Step:
        size = packet.value
        known = self.protocol_v1 or packet.protocol == Protocol.QUEUE_STATE
        if not known or not self._sizes.minimum <= size <= self._sizes.maximum or not size:
            self.state = State.OVER
            return _fail(errno.EINVAL)
        self.state, self.size = State.OFFERED, size
        return Step().send(Kind.OFFER, handle_value(self.handle))
