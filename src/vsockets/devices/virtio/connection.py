"""Connections of the virtio-vsock device: state machine, credit and socket of each.

A connection links the guest, which exchanges packets (virtio 1.3, 5.10.6), and a host socket.

    state        entered with                          left with
    PEER_INIT    the guest's REQUEST                   the fabric's reply: RESPONSE or RST
    LOCAL_INIT   a connect from the host: REQUEST      the guest's RESPONSE or RST, or a timeout
    ESTABLISHED  RESPONSE, in either direction         see below
    CLOSING      the host's SHUTDOWN of both           the guest's RST; after a timeout the
                 directions                            device's RST
    CLOSED       RST, sent or received

A header names both ends by CID and port, and carries its sender's credit (:mod:`.credit`).  RW
carries payload; CREDIT_UPDATE and CREDIT_REQUEST exchange credit alone.

Each direction of an ESTABLISHED connection ends separately.  SHUTDOWN with SEND announces that its
sender sends nothing more, with RECEIVE that it receives nothing more.  Once the guest has announced
both, and its payload is forwarded, the device sends RST, which ends the connection.  An RST is
never answered with an RST: another connection may use the two ports by then.

Packets for the guest wait in ``pending_tx`` until the guest has a buffer for them.  Each operation
waits at most once, so a guest that provides no buffers cannot make the device's memory grow.

Payload goes from guest memory to the socket without a copy.  Only what the socket does not accept
is copied to a buffer, whose size the guest's credit bounds.
"""

from __future__ import annotations

from enum import Enum, IntFlag, auto

from .credit import ReceiveCredit, SendCredit
from .packet import Op, Shutdown, Type

BOTH = int(Shutdown.RECEIVE | Shutdown.SEND)
_RECEIVE, _SEND = int(Shutdown.RECEIVE), int(Shutdown.SEND)


class ConnectionState(Enum):
    """State of a connection; see the table above."""

    PEER_INIT = auto()
    LOCAL_INIT = auto()
    ESTABLISHED = auto()
    CLOSING = auto()
    CLOSED = auto()


class PendingTx(IntFlag):
    """Packets that wait for the guest, in the order in which they are sent."""

    REQUEST = 1
    RESPONSE = 2
    CREDIT = 4
    CREDIT_REQUEST = 8
    SHUTDOWN = 16
    RST = 32


class Action(IntFlag):
    """Actions of the host's side."""

    NOTHING = 0
    ACCEPT = 1  #: report to the client that the connection is established
    REFUSE = 2  #: report to the client that the connect was refused
    SHUTDOWN_WRITE = 4  #: the guest sends nothing more: forward the rest, then end of file
    SHUTDOWN_READ = 8  #: the guest receives nothing more
    CLOSE = 16  #: close the socket at once


_CREDIT, _CREDIT_REQUEST = int(PendingTx.CREDIT), int(PendingTx.CREDIT_REQUEST)
_ESTABLISHED, _CLOSING, _CLOSED = (
    ConnectionState.ESTABLISHED,
    ConnectionState.CLOSING,
    ConnectionState.CLOSED,
)

_ORDER = (
    (int(PendingTx.REQUEST), int(Op.REQUEST)),
    (int(PendingTx.RESPONSE), int(Op.RESPONSE)),
    (int(PendingTx.CREDIT), int(Op.CREDIT_UPDATE)),
    (int(PendingTx.CREDIT_REQUEST), int(Op.CREDIT_REQUEST)),
    (int(PendingTx.SHUTDOWN), int(Op.SHUTDOWN)),
    (int(PendingTx.RST), int(Op.RST)),
)


class Connection:
    """Connection of the guest's ``guest_port`` with ``peer``; its buffer has ``size`` bytes."""

    __slots__ = (
        "guest_port",
        "guest_shutdown",
        "host_shutdown",
        "peer",
        "pending_tx",
        "receive",
        "send",
        "state",
        "type",
    )

    def __init__(
        self, state: ConnectionState, type_: Type, peer: tuple[int, int], guest_port: int, size: int
    ) -> None:
        self.state = state
        self.type = int(type_)
        self.peer = peer
        self.guest_port = guest_port
        self.send = SendCredit()
        self.receive = ReceiveCredit(size)
        self.guest_shutdown = 0  #: directions that the guest has shut down (Shutdown)
        self.host_shutdown = 0  #: directions that the host has shut down (Shutdown)
        self.pending_tx = int(PendingTx.REQUEST) if state is ConnectionState.LOCAL_INIT else 0

    # The host's side

    def accept(self) -> None:
        """Establish a connection that the guest requested."""
        assert self.state is ConnectionState.PEER_INIT
        self.state = _ESTABLISHED
        self.pending_tx = int(PendingTx.RESPONSE)

    def refuse(self) -> None:
        """Refuse a connection that the guest requested; the guest's connect fails at once."""
        self.reset()

    def shut_down(self, flags: int) -> None:
        """Shut down the directions ``flags`` (Shutdown) on behalf of the host."""
        ended = self.host_shutdown | flags
        if self.state is not _ESTABLISHED or ended == self.host_shutdown:
            return
        self.host_shutdown = ended
        self.pending_tx |= PendingTx.SHUTDOWN
        if ended == BOTH:
            self.state = _CLOSING

    def on_forwarded(self, length: int) -> None:
        """Account for ``length`` bytes that were forwarded to the host."""
        self.receive.forward(length)
        if self.receive.update_is_due(self.send.buffer):
            self.queue_credit_update()

    def queue_credit_update(self) -> None:
        """Queue a CREDIT_UPDATE."""
        if self.state is _ESTABLISHED:
            self.pending_tx |= _CREDIT

    def queue_credit_request(self) -> None:
        """Queue a CREDIT_REQUEST."""
        self.pending_tx |= _CREDIT_REQUEST

    def reset(self) -> None:
        """Close the connection at once and queue RST."""
        if self.state is not _CLOSED:
            self.state = _CLOSED
            self.pending_tx = int(PendingTx.RST)

    def discard(self) -> None:
        """Close the connection without sending anything."""
        self.state = _CLOSED
        self.pending_tx = 0

    # The guest's side

    def on_payload(self, length: int) -> bool:
        """Handle RW with ``length`` bytes; return whether to forward them.

        A guest that sends without credit, or before or after its sending direction is open, is
        reset.
        """
        if self.state is _ESTABLISHED and not self.guest_shutdown & _SEND:
            if self.receive.receive(length):
                return not self.host_shutdown & _RECEIVE
            self.reset()
        elif self.state is not _CLOSING:  # a packet sent before the guest's SHUTDOWN is valid
            self.reset()
        return False

    def on_packet(self, op: int, flags: int) -> Action:
        """Handle a packet of the guest other than RW; return the actions it requires."""
        if op == Op.CREDIT_UPDATE:
            return Action.NOTHING  # every header carries the credit
        if op == Op.CREDIT_REQUEST:
            self.queue_credit_update()
            return Action.NOTHING
        if op == Op.RST:
            return self._on_reset()
        if op == Op.SHUTDOWN and self.state in (_ESTABLISHED, _CLOSING):
            return self._on_shutdown(flags & BOTH)
        if op == Op.RESPONSE and self.state is ConnectionState.LOCAL_INIT:
            self.state = _ESTABLISHED
            return Action.ACCEPT
        was_pending = self.state is ConnectionState.LOCAL_INIT
        self.reset()
        return Action.REFUSE if was_pending else Action.CLOSE

    def _on_reset(self) -> Action:
        was_pending = self.state is ConnectionState.LOCAL_INIT
        self.discard()
        return Action.REFUSE if was_pending else Action.CLOSE

    def _on_shutdown(self, flags: int) -> Action:
        fresh = flags & ~self.guest_shutdown
        self.guest_shutdown |= flags
        if self.state is _CLOSING:
            if self.guest_shutdown == BOTH:
                self.reset()
                return Action.CLOSE
            return Action.NOTHING
        action = Action.NOTHING
        if fresh & _SEND:
            action |= Action.SHUTDOWN_WRITE
        if fresh & _RECEIVE:
            action |= Action.SHUTDOWN_READ
        return action

    def on_all_forwarded(self) -> None:
        """End the connection if the guest has shut it down; all its payload was forwarded."""
        if self.guest_shutdown == BOTH and self.state is _ESTABLISHED:
            self.reset()

    # Packets to the guest

    def next_packet(self) -> tuple[int, int] | None:
        """Return operation and flags of the next packet without payload, or None."""
        pending = self.pending_tx
        if pending:
            for bit, op in _ORDER:
                if pending & bit:
                    self.pending_tx = pending & ~bit
                    return op, self.host_shutdown if op == Op.SHUTDOWN else 0
        return None

    @property
    def can_send(self) -> bool:
        """True if payload may be sent to the guest, apart from credit."""
        return self.state is _ESTABLISHED and not self.guest_shutdown & _RECEIVE

    @property
    def is_finished(self) -> bool:
        """True if the connection is CLOSED and nothing remains to be sent."""
        return self.state is _CLOSED and not self.pending_tx
