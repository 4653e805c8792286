"""A connection with its host socket: forwarding of the guest's payload.

Payload goes from guest memory to the socket without a copy.  Only what the socket does not accept
is copied to a buffer, whose size the guest's credit bounds.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections import deque
from collections.abc import Sequence
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

from ..vectored_io import push
from .connection import Connection, ConnectionState
from .limits import VIRTIO_WAITING_MESSAGES_MAX
from .packet import Sequenced, Shutdown, Type

#: The host's socket types for virtio's types, and the reverse.
SOCKET_TYPES = {Type.STREAM: SOCK_STREAM, Type.SEQPACKET: SOCK_SEQPACKET}
VSOCK_TYPES = {int(kind): type_ for type_, kind in SOCKET_TYPES.items()}

_FD = struct.Struct("i")
_SEND_FLAGS = int(MSG_DONTWAIT | MSG_NOSIGNAL)
_SHUT_RECEIVE, _SHUT_SEND = int(Shutdown.RECEIVE), int(Shutdown.SEND)
_END_OF_MESSAGE, _END_OF_RECORD = int(Sequenced.END_OF_MESSAGE), int(Sequenced.END_OF_RECORD)
_SEQPACKET = int(Type.SEQPACKET)


class VirtioConnection(Connection):
    """A connection and its socket, once it has one."""

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
        "peer_closed",
        "queued",
        "read_closed",
        "readable",
        "sock",
        "unsent",
        "watched",
        "watches_writable",
    )

    def __init__(
        self, state: ConnectionState, type_: Type, peer: tuple[int, int], guest_port: int, size: int
    ) -> None:
        super().__init__(state, type_, peer, guest_port, size)
        self.sock: socket.socket | None = None
        self.readable = False  #: the socket may have data for the guest
        self.read_closed = False  #: the peer has shut down its sending direction
        self.peer_closed = False  #: the peer has closed the socket
        self.queued = False  #: waits in the device's queue of ready connections
        self.watched = False  #: the loop watches the socket
        self.watches_writable = False  #: the loop watches the socket for room, too
        self.burst = 2  #: guest buffers that it may fill in one turn
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

    def attach(self, sock: socket.socket, marker: int) -> None:
        """Attach the host's socket and take ownership of it.

        A unix socket carries no MSG_EOR: a message that ends a record is sent with the descriptor
        ``marker`` (``supervisor/calls/seqpacket_eor.py`` receives it).
        """
        self.sock = sock
        self._marker = [(SOL_SOCKET, SCM_RIGHTS, _FD.pack(marker))]
        self.readable = True
        # Room for all of the guest's credit, so that nothing need be kept here; a sequenced packet
        # is accepted whole or not at all.
        sock.setsockopt(SOL_SOCKET, SO_SNDBUF, self.receive.size)

    def enlarge_buffer(self, size: int) -> None:
        """Raise the buffer to ``size`` bytes; credit never shrinks."""
        if size > self.receive.size:
            self.receive.size = size
            if self.sock is not None:
                self.sock.setsockopt(SOL_SOCKET, SO_SNDBUF, size)
            self.queue_credit_update()

    def close(self) -> None:
        """Close the socket and discard data for it."""
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
        """True if the guest can be sent something now."""
        if self.pending_tx:
            return True
        if not self.readable:
            return bool(self.unsent)
        if self.unsent:
            return True
        return self.send.available() >= self.credit_needed if self.can_send else self.peer_closed

    # To the host

    def forward(self, parts: Sequence[memoryview], length: int) -> None:
        """Forward ``length`` bytes of a stream, which :meth:`on_payload` has accepted."""
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
        """Forward a fragment of a message, which :meth:`on_payload` has accepted."""
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

        Its fragments hold credit until its end arrives, for which the guest needs all other
        credit, however little of it was forwarded since the last announcement.
        """
        if self._message and self.receive.unannounced:
            self.queue_credit_update()

    @property
    def has_backlog(self) -> bool:
        """True if payload waits for room in the socket."""
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
                    sent = sock.sendmsg([part], self._marker if ends else (), _SEND_FLAGS)
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
        """Shut down the socket once the guest's last payload was forwarded."""
        if self.guest_shutdown & _SHUT_SEND and not self._backlog and not self._message_lengths:
            self._shut_down_writing()
            self.on_all_forwarded()

    def shut_down_reading(self) -> None:
        """Shut down reading from the socket; writes of the peer fail."""
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
        self.shut_down(_SHUT_RECEIVE)
        self.on_forwarded(length)


def _shutdown(sock: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):  # the peer has closed, which has the same effect
        sock.shutdown(how)
