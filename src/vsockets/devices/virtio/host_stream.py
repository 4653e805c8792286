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
KINDS = {Type.STREAM: SOCK_STREAM, Type.SEQPACKET: SOCK_SEQPACKET}
TYPES = {int(kind): type_ for type_, kind in KINDS.items()}

_FD = struct.Struct("i")
_SEND = int(MSG_DONTWAIT | MSG_NOSIGNAL)
_RECEIVE_ENDED, _SEND_ENDED = int(Shutdown.RECEIVE), int(Shutdown.SEND)
_END_OF_MESSAGE, _END_OF_RECORD = int(Sequenced.END_OF_MESSAGE), int(Sequenced.END_OF_RECORD)
_SEQPACKET = int(Type.SEQPACKET)


class HostStream(Connection):
    """A connection and its socket, once there is one."""

    __slots__ = (
        "_lengths",
        "_marker",
        "_message",
        "_shut",
        "_waiting",
        "asks_again",
        "burst",
        "ends_record",
        "gone",
        "hung_up",
        "incoming",
        "needed",
        "queued",
        "readable",
        "sock",
        "watched",
        "watches_room",
    )

    def __init__(
        self, state: ConnectionState, type_: Type, peer: tuple[int, int], guest_port: int, size: int
    ) -> None:
        super().__init__(state, type_, peer, guest_port, size)
        self.sock: socket.socket | None = None
        self.readable = False  #: the socket may have something for the guest
        self.hung_up = False  #: and nothing will come after it
        self.gone = False  #: nor will anything sent there be read
        self.queued = False  #: it waits for its turn
        self.watched = False  #: whether the loop watches the socket
        self.watches_room = False  #: and for room, too
        self.burst = 2  #: buffers of the guest it is given in one turn
        self.incoming = memoryview(b"")  #: what is left of a message for the guest
        self.ends_record = False  #: with the end of that message
        self.asks_again = False  #: a while later, for the guest's credit
        self.needed = 1  #: credit without which nothing can be sent, in bytes
        self._waiting = bytearray()  # what the socket had no room for
        self._message = bytearray()  # of type SEQPACKET: a message that has not ended
        # Of the messages that wait: how long each is, and whether it ends a record.
        self._lengths: deque[tuple[int, int]] = deque()
        self._marker: list[tuple[int, int, bytes]] = []
        self._shut = False

    def join(self, sock: socket.socket, marker: int) -> None:
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

    def enlarge(self, size: int) -> None:
        """The host's end has room for ``size`` bytes; what the guest was promised it keeps."""
        if size > self.receive.size:
            self.receive.size = size
            if self.sock is not None:
                self.sock.setsockopt(SOL_SOCKET, SO_SNDBUF, size)
            self.tell_credit()

    def close(self) -> None:
        """Close the socket, and drop what was to go there."""
        if self.sock is not None:
            self.sock.close()
            self.sock = None
        self.readable = False
        self._waiting.clear()
        self._message.clear()
        self._lengths.clear()
        self.incoming = memoryview(b"")

    @property
    def has_something(self) -> bool:
        """Whether there is, or may be, something for the guest, and it may be sent now."""
        if self.say:
            return True
        if not self.readable:
            return bool(self.incoming)
        if self.incoming:
            return True
        return self.send.available() >= self.needed if self.may_send else self.gone

    # To the host

    def pass_on(self, parts: Sequence[memoryview], length: int) -> None:
        """A stream's next ``length`` bytes, which :meth:`take` has granted."""
        sock, sent = self.sock, 0
        if sock is None:  # reset, by something the guest sent along
            return
        if not self._waiting:
            try:
                sent = push(sock, parts)
            except ConnectionError:
                self._drop(length)
                return
        if sent < length:
            self._keep(parts, sent)
        if sent:
            self.passed_on(sent)

    def pass_on_fragment(self, parts: Sequence[memoryview], length: int, flags: int) -> None:
        """A part of a message, which :meth:`take` has granted."""
        for part in parts:
            self._message += part
        if flags & _END_OF_MESSAGE:
            if len(self._lengths) >= VIRTIO_WAITING_MESSAGES_MAX:
                self.reset()
                return
            self._lengths.append((len(self._message), flags & _END_OF_RECORD))
            self._waiting += self._message
            self._message.clear()
            self.flush()
        self._help_message()

    def _help_message(self) -> None:
        """A message that has not ended holds its credit.  For the rest of it the guest needs all
        other credit there is, however little of it was passed on."""
        if self._message and self.receive.untold:
            self.tell_credit()

    @property
    def has_waiting(self) -> bool:
        """Whether the socket must be writable for something to go on."""
        return bool(self._waiting or self._lengths)

    def flush(self) -> None:
        """Pass on what waits, as far as there is room now."""
        sock, waiting = self.sock, self._waiting
        if sock is None:
            return
        try:
            while waiting or self._lengths:
                length, ends = self._lengths[0] if self.type == _SEQPACKET else (len(waiting), 0)
                with memoryview(waiting) as whole, whole[:length] as part:
                    sent = sock.sendmsg([part], self._marker if ends else (), _SEND)
                if self.type == _SEQPACKET:
                    self._lengths.popleft()
                    sent = length
                del waiting[:sent]
                self.passed_on(sent)
                self._help_message()
        except BlockingIOError:
            return
        except ConnectionError:
            self._drop(len(waiting))
        except OSError:  # EMSGSIZE: the kernel's limit is lower than what we have promised
            self.reset()
            return
        self.settle()

    def settle(self) -> None:
        """After a change: end what has nothing more to pass on."""
        if self.guest_ended & _SEND_ENDED and not self._waiting and not self._lengths:
            self._shut_down()
            self.all_passed_on()

    def end_reading(self) -> None:
        """The guest receives no more: who writes to it is told."""
        if self.sock is not None:
            self.incoming = memoryview(b"")
            _shutdown(self.sock, SHUT_RD)

    def _shut_down(self) -> None:
        if self.sock is not None and not self._shut:
            self._shut = True
            _shutdown(self.sock, SHUT_WR)

    def _keep(self, parts: Sequence[memoryview], sent: int) -> None:
        for part in parts:
            if sent >= len(part):
                sent -= len(part)
            else:
                self._waiting += part[sent:] if sent else part
                sent = 0

    def _drop(self, length: int) -> None:
        # Nobody reads there any more.
        self._waiting.clear()
        self._lengths.clear()
        self.host_ends(_RECEIVE_ENDED)
        self.passed_on(length)


def _shutdown(sock: socket.socket, how: int) -> None:
    with contextlib.suppress(OSError):  # it has hung up, which is as good
        sock.shutdown(how)
