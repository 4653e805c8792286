"""Server of a unix socket to which a virtual machine's monitor connects, one at a time.

:class:`MessageConnection` is the interface of the protocol on such a socket.
"""

from __future__ import annotations

import array
import logging
import select
import socket
from collections.abc import Callable, Iterable
from socket import CMSG_SPACE, MSG_CMSG_CLOEXEC, MSG_DONTWAIT, MSG_NOSIGNAL, SCM_RIGHTS, SOL_SOCKET
from typing import Protocol

from .._linux.sockets import with_descriptor
from ..eventloop.loop import EventLoop


class DeviceProtocolError(Exception):
    """The monitor sent a message after which the connection cannot continue."""


class DescriptorReply(bytes):
    """A reply that carries a copy of a descriptor, which stays the caller's."""

    fd: int

    def __new__(cls, data: bytes, fd: int) -> DescriptorReply:
        """Return a reply of the bytes ``data`` with the descriptor ``fd``."""
        reply = super().__new__(cls, data)
        reply.fd = fd
        return reply


class MessageConnection(Protocol):
    """The device's side of a connection to one monitor."""

    @property
    def wanted(self) -> int:
        """Maximum size of the next read, in bytes."""

    def receive(self, data: bytes, fds: list[int]) -> Iterable[bytes]:
        """Handle received data while the returned replies are iterated; take ownership of ``fds``.

        Raises DeviceProtocolError or OSError when the monitor must be disconnected.
        """

    def close(self) -> None:
        """Release the device after the monitor has disconnected."""


log = logging.getLogger(__name__)

_RECEIVE_FLAGS = int(MSG_CMSG_CLOEXEC | MSG_DONTWAIT)
_SEND_FLAGS = int(MSG_DONTWAIT | MSG_NOSIGNAL)


class UnixServer:
    """Server for one client (a monitor) at a time; takes ownership of ``listener``.

    ``open_connection`` creates the protocol's state for a client.  A message has at most
    ``descriptors`` descriptors.  A client that does not read a reply within ``reply_timeout``
    seconds is disconnected.  ``after_message`` is called after each read and its replies.
    """

    def __init__(
        self,
        loop: EventLoop,
        listener: socket.socket,
        open_connection: Callable[[], MessageConnection],
        *,
        descriptors: int,
        reply_timeout: float,
        after_message: Callable[[], None] = lambda: None,
    ) -> None:
        self._loop = loop
        self._listener = listener
        self._open_connection = open_connection
        self._room = CMSG_SPACE(descriptors * array.array("i").itemsize)
        self._reply_timeout = reply_timeout
        self._after_message = after_message
        self._client: socket.socket | None = None
        self._watch()

    def close(self) -> None:
        """Disconnect the client and close the listener."""
        if self._client is not None:
            self._disconnect(self._client)
        self._loop.unwatch(self._listener.fileno())
        self._listener.close()

    def _watch(self) -> None:
        self._loop.watch(self._listener.fileno(), self._accept)

    def _accept(self, events: int) -> None:
        try:
            client, _ = self._listener.accept()
        except BlockingIOError:
            return
        # The next client waits in the backlog: a virtual machine can be restarted before its old
        # process has ended.
        self._loop.unwatch(self._listener.fileno())
        client.setblocking(True)
        self._client = client
        self._connection = self._open_connection()
        self._loop.watch(client.fileno(), lambda events: self._on_ready(client))
        log.info("virtual machine connected")

    def _on_ready(self, client: socket.socket) -> None:
        connection = self._connection
        fds: list[int] = []
        try:
            try:
                data, ancillary, _, _ = client.recvmsg(
                    connection.wanted, self._room, _RECEIVE_FLAGS
                )
            except BlockingIOError:
                return
            for level, kind, carried in ancillary:
                if level == SOL_SOCKET and kind == SCM_RIGHTS:
                    fds += array.array("i", carried[: len(carried) // 4 * 4])
            if not data:
                raise EOFError
            for reply in connection.receive(data, fds):
                self._send(client, reply)
        except (EOFError, ConnectionError):
            log.info("virtual machine disconnected")
            self._disconnect(client)
        except (DeviceProtocolError, OSError) as error:
            log.warning("virtual machine disconnected: %s", error)
            self._disconnect(client)
        self._after_message()

    def _send(self, client: socket.socket, reply: bytes) -> None:
        """Send all of ``reply``.

        Raises TimeoutError when the client does not read the reply in time.
        """
        rights = (with_descriptor(reply.fd),) if isinstance(reply, DescriptorReply) else ()
        while reply:
            try:
                reply = reply[client.sendmsg((reply,), rights, _SEND_FLAGS) :]
                rights = ()
            except BlockingIOError:
                if not select.select((), (client,), (), self._reply_timeout)[1]:
                    raise TimeoutError(
                        "the virtual machine's monitor does not read the reply"
                    ) from None

    def _disconnect(self, client: socket.socket) -> None:
        self._loop.unwatch(client.fileno())
        client.close()
        self._client = None
        self._connection.close()
        self._watch()
