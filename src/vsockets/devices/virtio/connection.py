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

Each direction of an ESTABLISHED connection ends separately.  The sender of SHUTDOWN announces with
SEND that it has sent its last payload, with RECEIVE that it discards further payload.  Once the
guest has announced both, and its payload is forwarded, the device sends RST, which ends the
connection.  An RST is never answered with an RST: another connection may use the two ports when the
reply arrives.

Packets for the guest wait in ``pending_tx`` until the guest has a buffer for them.  Each operation
waits at most once, so a guest that provides no buffers cannot make the device's memory grow.

Payload goes from guest memory to the socket without a copy.  Only what the socket does not accept
is copied to a buffer, whose size the guest's credit bounds.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections import deque
from collections.abc import Sequence
from enum import Enum, IntFlag, auto
from socket import (
    MSG_DONTWAIT,
    MSG_NOSIGNAL,
    SCM_RIGHTS,
    SHUT_RD,
    SHUT_WR,
    SO_SNDBUF,
    SOCK_SEQPACKET,
    SOCK_STREAM,
    SOL_SOCKET,
)

from ..guest_memory import push
from ..limits import VIRTIO_WAITING_MESSAGES_MAX
from .credit import ReceiveCredit, SendCredit
from .packet import Op, Sequenced, Shutdown, Type

BOTH = int(Shutdown.RECEIVE | Shutdown.SEND)
_RECEIVE, _SEND = int(Shutdown.RECEIVE), int(Shutdown.SEND)

#: The host's socket types for virtio's types, and the reverse.
SOCKET_TYPES = {Type.STREAM: SOCK_STREAM, Type.SEQPACKET: SOCK_SEQPACKET}
VSOCK_TYPES = {int(kind): type_ for type_, kind in SOCKET_TYPES.items()}

_FD = struct.Struct("i")
_SEND_FLAGS = int(MSG_DONTWAIT | MSG_NOSIGNAL)
_END_OF_MESSAGE, _END_OF_RECORD = int(Sequenced.END_OF_MESSAGE), int(Sequenced.END_OF_RECORD)
_SEQPACKET = int(Type.SEQPACKET)


class ConnectionState(Enum):
    """State of a connection; see the table above."""

    PEER_INIT = auto()
    LOCAL_INIT = auto()
    ESTABLISHED = auto()
    CLOSING = auto()
    CLOSED = auto()


class PendingTx(IntFlag):
    """Packets without payload that wait for the guest, in the order in which they are sent."""

    REQUEST = 1
    RESPONSE = 2
    CREDIT = 4
    CREDIT_REQUEST = 8
    SHUTDOWN = 16
    RST = 32


class Action(IntFlag):
    """Actions that a packet of the guest requires of the host's side."""

    NOTHING = 0
    ACCEPT = 1  #: report to the client that the connection is established
    REFUSE = 2  #: report to the client that the connect was refused
    SHUTDOWN_WRITE = 4  #: the guest has sent its last payload: forward the rest, then end of file
    SHUTDOWN_READ = 8  #: the guest discards further payload
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


class VirtioConnection:
    """Connection of the guest's ``guest_port`` with ``peer`` (CID, port).

    ``size`` is the device's buffer for payload of the guest, in bytes.
    """

    __slots__ = (
        "_backlog",
        "_marker",
        "_message",
        "_message_lengths",
        "_write_shut",
        "burst",
        "credit_needed",
        "credit_retry",
        "ends_record",
        "guest_port",
        "guest_shutdown",
        "host_shutdown",
        "peer",
        "peer_closed",
        "pending_tx",
        "queued",
        "read_closed",
        "readable",
        "receive",
        "send",
        "sock",
        "state",
        "type",
        "unsent",
        "watched",
        "watches_writable",
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
        self.sock: socket.socket | None = None
        self.readable = False  #: the socket may have data for the guest
        self.read_closed = False  #: the peer has shut down its sending direction
        self.peer_closed = False  #: the peer has closed the socket
        self.queued = False  #: the connection is in the device's queue of ready connections
        self.watched = False  #: the loop watches the socket
        self.watches_writable = False  #: the loop watches the socket for room, too
        self.burst = 2  #: guest buffers that the connection may fill in one turn
        self.unsent = memoryview(b"")  #: unsent rest of a message for the guest
        self.ends_record = False  #: the end of that message also ends a record
        self.credit_retry = False  #: a retry for the guest's credit is scheduled
        self.credit_needed = 1  #: bytes of credit without which nothing can be sent
        self._backlog = bytearray()  # payload for which the socket had no room
        self._message = bytearray()  # SEQPACKET: a message whose end has not arrived
        # SEQPACKET: length of each waiting message, and whether it ends a record.
        self._message_lengths: deque[tuple[int, int]] = deque()
        self._marker: list[tuple[int, int, bytes]] = []
        self._write_shut = False

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
        """Shut down the directions ``flags`` (:class:`.packet.Shutdown`) from the host's side."""
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
        """Queue a CREDIT_UPDATE for the guest."""
        if self.state is _ESTABLISHED:
            self.pending_tx |= _CREDIT

    def queue_credit_request(self) -> None:
        """Queue a CREDIT_REQUEST to the guest."""
        self.pending_tx |= _CREDIT_REQUEST

    def reset(self) -> None:
        """Close the connection at once and queue RST."""
        if self.state is not _CLOSED:
            self.state = _CLOSED
            self.pending_tx = int(PendingTx.RST)

    def discard(self) -> None:
        """Close the connection without a packet to the guest."""
        self.state = _CLOSED
        self.pending_tx = 0

    # The guest's side

    def on_payload(self, length: int) -> bool:
        """Handle RW with ``length`` bytes; return whether to forward them.

        The connection is reset if the guest had no credit for the payload, or its sending direction
        is not open.
        """
        if self.state is _ESTABLISHED and not self.guest_shutdown & _SEND:
            if self.receive.receive(length):
                return not self.host_shutdown & _RECEIVE
            self.reset()
        elif self.state is not _CLOSING:  # a packet sent before the guest's SHUTDOWN is valid
            self.reset()
        return False

    def on_packet(self, op: int, flags: int) -> Action:
        """Handle a packet of the guest other than RW and CREDIT_UPDATE.

        Return the actions it requires.
        """
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
        """Reset the connection if the guest has shut down both directions.

        Call it when all payload of the guest was forwarded.
        """
        if self.guest_shutdown == BOTH and self.state is _ESTABLISHED:
            self.reset()

    # Packets to the guest

    def next_packet(self) -> tuple[int, int] | None:
        """Take the next pending packet without payload; return its operation and flags, or None."""
        pending = self.pending_tx
        if pending:
            for bit, op in _ORDER:
                if pending & bit:
                    self.pending_tx = pending & ~bit
                    return op, self.host_shutdown if op == Op.SHUTDOWN else 0
        return None

    @property
    def can_send(self) -> bool:
        """Flag: true while the state allows payload to the guest (credit is checked separately)."""
        return self.state is _ESTABLISHED and not self.guest_shutdown & _RECEIVE

    @property
    def is_finished(self) -> bool:
        """Flag: true once the connection is CLOSED and no packet for the guest is pending."""
        return self.state is _CLOSED and not self.pending_tx

    # The socket of a connection

    def attach(self, sock: socket.socket, marker: int) -> None:
        """Attach the host's socket ``sock``; take ownership of ``sock``.

        A unix socket does not transmit MSG_EOR, so a message that ends a record is sent with a copy
        of the descriptor ``marker`` (:mod:`vsockets.supervisor.calls.receive` receives that copy).
        """
        self.sock = sock
        self._marker = [(SOL_SOCKET, SCM_RIGHTS, _FD.pack(marker))]
        self.readable = True
        # Room for all of the guest's credit, so that nothing need be kept here; a sequenced packet
        # is accepted whole or not at all.
        sock.setsockopt(SOL_SOCKET, SO_SNDBUF, self.receive.size)

    def enlarge_buffer(self, size: int) -> None:
        """Enlarge the buffer for payload of the guest to ``size`` bytes; never reduce it."""
        if size > self.receive.size:
            self.receive.size = size
            if self.sock is not None:
                self.sock.setsockopt(SOL_SOCKET, SO_SNDBUF, size)
            self.queue_credit_update()

    def close(self) -> None:
        """Close the socket and discard all data that waits in either direction."""
        if self.sock is not None:
            self.sock.close()
            self.sock = None
        self.readable = False
        self._backlog.clear()
        self._message.clear()
        self._message_lengths.clear()
        self.unsent = memoryview(b"")

    @property
    def has_output(self) -> bool:
        """Flag: true while a packet for the guest is ready and the guest has credit for it."""
        if self.pending_tx:
            return True
        if not self.readable:
            return bool(self.unsent)
        if self.unsent:
            return True
        return self.send.available() >= self.credit_needed if self.can_send else self.peer_closed

    # To the host

    def forward(self, parts: Sequence[memoryview], length: int) -> None:
        """Forward ``parts``, ``length`` bytes of a stream, to the socket.

        :meth:`on_payload` has accepted them.
        """
        sock, sent = self.sock, 0
        if sock is None:  # reset because of an earlier packet of this turn
            return
        if not self._backlog:
            try:
                sent = push(sock, parts)
            except ConnectionError:
                self._on_socket_closed(length)
                return
        if sent < length:
            self._save(parts, sent)
        if sent:
            self.on_forwarded(sent)

    def forward_fragment(self, parts: Sequence[memoryview], length: int, flags: int) -> None:
        """Collect a fragment of a message; forward the message once it is complete.

        :meth:`on_payload` has accepted the fragment.
        """
        for part in parts:
            self._message += part
        if flags & _END_OF_MESSAGE:
            if len(self._message_lengths) >= VIRTIO_WAITING_MESSAGES_MAX:
                self.reset()
                return
            self._message_lengths.append((len(self._message), flags & _END_OF_RECORD))
            self._backlog += self._message
            self._message.clear()
            self.flush()
        self._grant_message_credit()

    def _grant_message_credit(self) -> None:
        """Announce all free credit while a message is incomplete.

        The fragments hold credit until the end of the message arrives.  To send that end, the guest
        may need all other credit, even if :meth:`~.ReceiveCredit.update_is_due` would still wait.
        """
        if self._message and self.receive.unannounced:
            self.queue_credit_update()

    @property
    def has_backlog(self) -> bool:
        """Flag: true while payload of the guest waits for room in the socket."""
        return bool(self._backlog or self._message_lengths)

    def flush(self) -> None:
        """Forward waiting payload as far as the socket has room."""
        sock, backlog = self.sock, self._backlog
        if sock is None:
            return
        try:
            while backlog or self._message_lengths:
                length, ends = (
                    self._message_lengths[0] if self.type == _SEQPACKET else (len(backlog), 0)
                )
                with memoryview(backlog) as whole, whole[:length] as part:
                    try:
                        sent = sock.sendmsg([part], self._marker if ends else (), _SEND_FLAGS)
                    except PermissionError:
                        # The host's program is one of the library, which refuses descriptors, and
                        # MSG_EOR is not shown to it.
                        sent = sock.send(part, _SEND_FLAGS)
                if self.type == _SEQPACKET:
                    self._message_lengths.popleft()
                    sent = length
                del backlog[:sent]
                self.on_forwarded(sent)
                self._grant_message_credit()
        except BlockingIOError:
            return
        except ConnectionError:
            self._on_socket_closed(len(backlog))
        except OSError:  # EMSGSIZE: the kernel's limit is below the announced credit
            self.reset()
            return
        self.finish_if_drained()

    def finish_if_drained(self) -> None:
        """Shut down writing to the socket if the guest's last payload was forwarded."""
        if self.guest_shutdown & _SEND and not self._backlog and not self._message_lengths:
            self._shut_down_writing()
            self.on_all_forwarded()

    def shut_down_reading(self) -> None:
        """Shut down reading from the socket, so that writes of the peer fail."""
        if self.sock is not None:
            self.unsent = memoryview(b"")
            _shutdown(self.sock, SHUT_RD)

    def _shut_down_writing(self) -> None:
        if self.sock is not None and not self._write_shut:
            self._write_shut = True
            _shutdown(self.sock, SHUT_WR)

    def _save(self, parts: Sequence[memoryview], sent: int) -> None:
        for part in parts:
            if sent >= len(part):
                sent -= len(part)
            else:
                self._backlog += part[sent:] if sent else part
                sent = 0

    def _on_socket_closed(self, length: int) -> None:
        # The peer has closed the socket.
        self._backlog.clear()
        self._message_lengths.clear()
        self.shut_down(_RECEIVE)
        self.on_forwarded(length)


def _shutdown(sock: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):  # the peer has closed, which has the same effect
        sock.shutdown(how)
