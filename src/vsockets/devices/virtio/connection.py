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

    ASKED = auto()
    OFFERED = auto()
    OPEN = auto()
    CLOSING = auto()
    GONE = auto()


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
    END_WRITING = 4  #: the guest sends no more: pass on what there is, then the end
    END_READING = 8  #: the guest receives no more
    CLOSE = 16  #: at once


_CREDIT, _CREDIT_REQUEST = int(PendingTx.CREDIT), int(PendingTx.CREDIT_REQUEST)
# Names of our own: looking a member up in its enum costs as much as a short function.
_OPEN, _CLOSING, _GONE = ConnectionState.OPEN, ConnectionState.CLOSING, ConnectionState.GONE

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
        "guest_ended",
        "guest_port",
        "host_ended",
        "peer",
        "receive",
        "say",
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
        self.guest_ended = 0  #: of Shutdown: what the guest has said
        self.host_ended = 0  #: what the host's side is done with
        self.say = int(PendingTx.REQUEST) if state is ConnectionState.OFFERED else 0

    # The host's side

    def host_accepts(self) -> None:
        """What the guest asked for was granted."""
        assert self.state is ConnectionState.ASKED
        self.state = _OPEN
        self.say = int(PendingTx.RESPONSE)

    def host_refuses(self) -> None:
        """It was not, or nobody listens: the guest's connect fails at once."""
        self.reset()

    def host_ends(self, flags: int) -> None:
        """The host will not do any more what ``flags`` (Shutdown) say."""
        ended = self.host_ended | flags
        if self.state is not _OPEN or ended == self.host_ended:
            return
        self.host_ended = ended
        self.say |= PendingTx.SHUTDOWN
        if ended == BOTH:
            self.state = _CLOSING

    def passed_on(self, length: int) -> None:
        """The host has taken ``length`` bytes of what the guest sent."""
        self.receive.forward(length)
        if self.receive.is_due(self.send.buffer):
            self.tell_credit()

    def tell_credit(self) -> None:
        """The guest should know now how much it may send."""
        if self.state is _OPEN:
            self.say |= _CREDIT

    def ask_for_credit(self) -> None:
        """The guest should tell what it has passed on."""
        self.say |= _CREDIT_REQUEST

    def reset(self) -> None:
        """End it at once, and say so."""
        if self.state is not _GONE:
            self.state = _GONE
            self.say = int(PendingTx.RST)

    def forget(self) -> None:
        """It has ended, and there is nobody to be told."""
        self.state = _GONE
        self.say = 0

    # The guest's side

    def take(self, length: int) -> bool:
        """RW of ``length`` bytes; returns whether they are to be passed on.

        A guest that sends what it has no credit for, or before or after its time, is reset.
        """
        if self.state is _OPEN and not self.guest_ended & _SEND:
            if self.receive.receive(length):
                return not self.host_ended & _RECEIVE
            self.reset()
        elif self.state is not _CLOSING:  # there it may be on its way since before
            self.reset()
        return False

    def hear(self, op: int, flags: int) -> Action:
        """Any other packet of the guest; returns what to do for it."""
        if op == Op.CREDIT_UPDATE:
            return Action.NOTHING  # the credit is in every header
        if op == Op.CREDIT_REQUEST:
            self.tell_credit()
            return Action.NOTHING
        if op == Op.RST:
            return self._guest_resets()
        if op == Op.SHUTDOWN and self.state in (_OPEN, _CLOSING):
            return self._guest_ends(flags & BOTH)
        if op == Op.RESPONSE and self.state is ConnectionState.OFFERED:
            self.state = _OPEN
            return Action.ACCEPT
        offered = self.state is ConnectionState.OFFERED
        self.reset()
        return Action.REFUSE if offered else Action.CLOSE

    def _guest_resets(self) -> Action:
        offered = self.state is ConnectionState.OFFERED
        self.forget()
        return Action.REFUSE if offered else Action.CLOSE

    def _guest_ends(self, flags: int) -> Action:
        fresh = flags & ~self.guest_ended
        self.guest_ended |= flags
        if self.state is _CLOSING:
            if self.guest_ended == BOTH:
                self.reset()
                return Action.CLOSE
            return Action.NOTHING
        do = Action.NOTHING
        if fresh & _SEND:
            do |= Action.END_WRITING
        if fresh & _RECEIVE:
            do |= Action.END_READING
        return do

    def all_passed_on(self) -> None:
        """Nothing of what the guest sent is left here."""
        if self.guest_ended == BOTH and self.state is _OPEN:
            self.reset()

    # Packets to the guest

    def next_packet(self) -> tuple[int, int] | None:
        """The operation and flags of what is to be said next, if anything is."""
        say = self.say
        if say:
            for bit, op in _ORDER:
                if say & bit:
                    self.say = say & ~bit
                    return op, self.host_ended if op == Op.SHUTDOWN else 0
        return None

    @property
    def may_send(self) -> bool:
        """Whether the guest takes payload, as far as credit allows."""
        return self.state is _OPEN and not self.guest_ended & _RECEIVE

    @property
    def is_silent(self) -> bool:
        """GONE, and the guest knows."""
        return self.state is _GONE and not self.say
