"""One connection's state machine, without any I/O.

Two peers talk through it: the guest, in packets, and a socket of the host.

    state      begins with                                ends with
    ASKED      the guest's REQUEST                        the host's answer: RESPONSE or RST
    OFFERED    a connect of the host: REQUEST             the guest's RESPONSE or RST, or too late
    OPEN       either's agreement                         see below
    CLOSING    the host has ended both directions:        the guest's RST, or a while later ours
               SHUTDOWN of both
    GONE       RST, sent or received

Each direction of an OPEN connection ends by itself.  Who will send no more says SHUTDOWN with
SEND, who will receive no more says it with RECEIVE.  Once the guest has said both, and what it
sent is passed on, RST is the answer that ends it all.  An RST is never answered by another: the
two ports may belong to somebody else by then.

What is to be said to the guest waits in :attr:`Connection.say` until there is a buffer for it,
each thing once; so a guest that offers no buffers cannot make it grow.
"""

from __future__ import annotations

from enum import Enum, IntFlag, auto

from .credit import ReceiveCredit, SendCredit
from .packet import Op, Shutdown, Type

BOTH = int(Shutdown.RECEIVE | Shutdown.SEND)
_RECEIVE, _SEND = int(Shutdown.RECEIVE), int(Shutdown.SEND)


class ConnectionState(Enum):
    """Where in its life a connection is; the table above."""

    PEER_INIT = auto()
    LOCAL_INIT = auto()
    ESTABLISHED = auto()
    CLOSING = auto()
    CLOSED = auto()


class PendingTx(IntFlag):
    """What waits to be said to the guest, the first one first."""

    REQUEST = 1
    RESPONSE = 2
    CREDIT = 4
    CREDIT_REQUEST = 8
    SHUTDOWN = 16
    RST = 32


class Action(IntFlag):
    """What is to be done on the host's side."""

    NOTHING = 0
    ACCEPT = 1  #: tell who connects that the connection stands
    REFUSE = 2  #: tell who connects that nobody listens
    SHUTDOWN_WRITE = 4  #: the guest sends no more: pass on what there is, then the end
    SHUTDOWN_READ = 8  #: the guest receives no more
    CLOSE = 16  #: at once


_CREDIT, _CREDIT_REQUEST = int(PendingTx.CREDIT), int(PendingTx.CREDIT_REQUEST)
# Names of our own: looking a member up in its enum costs as much as a short function.
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
    """Between the guest's port ``guest_port`` and ``peer``; ``size`` bytes are held for it."""

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
        self.guest_shutdown = 0  #: of Shutdown: what the guest has said
        self.host_shutdown = 0  #: what the host's side is done with
        self.pending_tx = int(PendingTx.REQUEST) if state is ConnectionState.LOCAL_INIT else 0

    # The host's side

    def accept(self) -> None:
        """What the guest asked for was granted."""
        assert self.state is ConnectionState.PEER_INIT
        self.state = _ESTABLISHED
        self.pending_tx = int(PendingTx.RESPONSE)

    def refuse(self) -> None:
        """It was not, or nobody listens: the guest's connect fails at once."""
        self.reset()

    def shut_down(self, flags: int) -> None:
        """The host will not do any more what ``flags`` (Shutdown) say."""
        ended = self.host_shutdown | flags
        if self.state is not _ESTABLISHED or ended == self.host_shutdown:
            return
        self.host_shutdown = ended
        self.pending_tx |= PendingTx.SHUTDOWN
        if ended == BOTH:
            self.state = _CLOSING

    def on_forwarded(self, length: int) -> None:
        """The host has taken ``length`` bytes of what the guest sent."""
        self.receive.forward(length)
        if self.receive.update_is_due(self.send.buffer):
            self.queue_credit_update()

    def queue_credit_update(self) -> None:
        """The guest should know now how much it may send."""
        if self.state is _ESTABLISHED:
            self.pending_tx |= _CREDIT

    def queue_credit_request(self) -> None:
        """The guest should tell what it has passed on."""
        self.pending_tx |= _CREDIT_REQUEST

    def reset(self) -> None:
        """End it at once, and say so."""
        if self.state is not _CLOSED:
            self.state = _CLOSED
            self.pending_tx = int(PendingTx.RST)

    def discard(self) -> None:
        """It has ended, and there is nobody to be told."""
        self.state = _CLOSED
        self.pending_tx = 0

    # The guest's side

    def on_payload(self, length: int) -> bool:
        """RW of ``length`` bytes; returns whether they are to be passed on.

        A guest that sends what it has no credit for, or before or after its time, is reset.
        """
        if self.state is _ESTABLISHED and not self.guest_shutdown & _SEND:
            if self.receive.receive(length):
                return not self.host_shutdown & _RECEIVE
            self.reset()
        elif self.state is not _CLOSING:  # there it may be on its way since before
            self.reset()
        return False

    def on_packet(self, op: int, flags: int) -> Action:
        """Any other packet of the guest; returns what to do for it."""
        if op == Op.CREDIT_UPDATE:
            return Action.NOTHING  # the credit is in every header
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
        """Nothing of what the guest sent is left here."""
        if self.guest_shutdown == BOTH and self.state is _ESTABLISHED:
            self.reset()

    # Packets to the guest

    def next_packet(self) -> tuple[int, int] | None:
        """The operation and flags of what is to be said next, if anything is."""
        pending = self.pending_tx
        if pending:
            for bit, op in _ORDER:
                if pending & bit:
                    self.pending_tx = pending & ~bit
                    return op, self.host_shutdown if op == Op.SHUTDOWN else 0
        return None

    @property
    def can_send(self) -> bool:
        """Whether the guest takes payload, as far as credit allows."""
        return self.state is _ESTABLISHED and not self.guest_shutdown & _RECEIVE

    @property
    def is_finished(self) -> bool:
        """GONE, and the guest knows."""
        return self.state is _CLOSED and not self.pending_tx
