"""A connection with the host's socket it ends in: payload of the guest, passed on to it.

Payload goes straight from the guest's memory to the socket.  Only what the socket does not take
is kept, in a buffer that the guest's credit bounds.
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

#: Socket types of the host for the guest's, and back.
SOCKET_TYPES = {Type.STREAM: SOCK_STREAM, Type.SEQPACKET: SOCK_SEQPACKET}
VSOCK_TYPES = {int(kind): type_ for type_, kind in SOCKET_TYPES.items()}

_FD = struct.Struct("i")
_SEND_FLAGS = int(MSG_DONTWAIT | MSG_NOSIGNAL)
_SHUT_RECEIVE, _SHUT_SEND = int(Shutdown.RECEIVE), int(Shutdown.SEND)
_END_OF_MESSAGE, _END_OF_RECORD = int(Sequenced.END_OF_MESSAGE), int(Sequenced.END_OF_RECORD)
_SEQPACKET = int(Type.SEQPACKET)


class VirtioConnection(Connection):
    """A connection and its socket, once there is one."""

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
        self.readable = False  #: the socket may have something for the guest
        self.read_closed = False  #: and nothing will come after it
        self.peer_closed = False  #: nor will anything sent there be read
        self.queued = False  #: it waits for its turn
        self.watched = False  #: whether the loop watches the socket
        self.watches_writable = False  #: and for room, too
        self.burst = 2  #: buffers of the guest it is given in one turn
        self.unsent = memoryview(b"")  #: what is left of a message for the guest
        self.ends_record = False  #: with the end of that message
        self.credit_retry = False  #: a while later, for the guest's credit
        self.credit_needed = 1  #: credit without which nothing can be sent, in bytes
        self._backlog = bytearray()  # what the socket had no room for
        self._message = bytearray()  # of type SEQPACKET: a message that has not ended
        # Of the messages that wait: how long each is, and whether it ends a record.
        self._message_lengths: deque[tuple[int, int]] = deque()
        self._marker: list[tuple[int, int, bytes]] = []
        self._write_shut = False

    def attach(self, sock: socket.socket, marker: int) -> None:
        """``sock`` is the host's end; it becomes the link's.

        A unix socket carries no MSG_EOR: a message that ends a record goes with a descriptor,
        ``marker`` (``supervisor/calls/seqpacket_eor.py`` has the other side).
        """
        self.sock = sock
        self._marker = [(SOL_SOCKET, SCM_RIGHTS, _FD.pack(marker))]
        self.readable = True
        # Room for all the credit, so that what the guest sends need not be kept here; and a
        # sequenced packet goes in one piece or not at all.
        sock.setsockopt(SOL_SOCKET, SO_SNDBUF, self.receive.size)

    def enlarge_buffer(self, size: int) -> None:
        """The host's end has room for ``size`` bytes; what the guest was promised it keeps."""
        if size > self.receive.size:
            self.receive.size = size
            if self.sock is not None:
                self.sock.setsockopt(SOL_SOCKET, SO_SNDBUF, size)
            self.queue_credit_update()

    def close(self) -> None:
        """Close the socket, and drop what was to go there."""
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
        """Whether there is, or may be, something for the guest, and it may be sent now."""
        if self.pending_tx:
            return True
        if not self.readable:
            return bool(self.unsent)
        if self.unsent:
            return True
        return self.send.available() >= self.credit_needed if self.can_send else self.peer_closed

    # To the host

    def forward(self, parts: Sequence[memoryview], length: int) -> None:
        """A stream's next ``length`` bytes, which :meth:`take` has granted."""
        sock, sent = self.sock, 0
        if sock is None:  # reset, by something the guest sent along
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
        """A part of a message, which :meth:`take` has granted."""
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
        """A message that has not ended holds its credit.  For the rest of it the guest needs all
        other credit there is, however little of it was passed on."""
        if self._message and self.receive.unannounced:
            self.queue_credit_update()

    @property
    def has_backlog(self) -> bool:
        """Whether the socket must be writable for something to go on."""
        return bool(self._backlog or self._message_lengths)

    def flush(self) -> None:
        """Pass on what waits, as far as there is room now."""
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
        except OSError:  # EMSGSIZE: the kernel's limit is lower than what we have promised
            self.reset()
            return
        self.finish_if_drained()

    def finish_if_drained(self) -> None:
        """After a change: end what has nothing more to pass on."""
        if self.guest_shutdown & _SHUT_SEND and not self._backlog and not self._message_lengths:
            self._shut_down_writing()
            self.on_all_forwarded()

    def shut_down_reading(self) -> None:
        """The guest receives no more: who writes to it is told."""
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
        # Nobody reads there any more.
        self._backlog.clear()
        self._message_lengths.clear()
        self.shut_down(_SHUT_RECEIVE)
        self.on_forwarded(length)


def _shutdown(sock: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):  # it has hung up, which is as good
        sock.shutdown(how)
