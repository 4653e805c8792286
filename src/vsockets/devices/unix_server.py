"""The socket a virtual machine's monitor connects to: one at a time, any number in turn."""

from __future__ import annotations

import array
import logging
import select
import socket
from collections.abc import Callable
from socket import CMSG_SPACE, MSG_CMSG_CLOEXEC, MSG_DONTWAIT, MSG_NOSIGNAL, SCM_RIGHTS, SOL_SOCKET

from ..eventloop.loop import EventLoop
from .message_protocol import DeviceProtocolError, MessageConnection

log = logging.getLogger(__name__)

_TAKE = int(MSG_CMSG_CLOEXEC | MSG_DONTWAIT)
_GIVE = int(MSG_DONTWAIT | MSG_NOSIGNAL)


class UnixServer:
    """Holds a conversation of ``begin`` with whoever connects to ``listener``, which becomes the
    server's.

    A message has ``descriptors`` at most; an answer is to be read within ``patience`` seconds, as
    a monitor waits for it.  ``after_each`` is called after each thing that came.
    """

    def __init__(
        self,
        loop: EventLoop,
        listener: socket.socket,
        begin: Callable[[], MessageConnection],
        *,
        descriptors: int,
        patience: float,
        after_each: Callable[[], None] = lambda: None,
    ) -> None:
        self._loop = loop
        self._listener = listener
        self._begin = begin
        self._room = CMSG_SPACE(descriptors * array.array("i").itemsize)
        self._patience = patience
        self._after_each = after_each
        self._client: socket.socket | None = None
        self._watch()

    def close(self) -> None:
        """Serve nobody any more."""
        if self._client is not None:
            self._end(self._client)
        self._loop.unwatch(self._listener.fileno())
        self._listener.close()

    def _watch(self) -> None:
        self._loop.watch(self._listener.fileno(), self._accept)

    def _accept(self, events: int) -> None:
        try:
            client, _ = self._listener.accept()
        except BlockingIOError:
            return
        # The next one waits in the backlog: a machine that is started again while its old
        # process still ends.
        self._loop.unwatch(self._listener.fileno())
        client.setblocking(True)
        self._client = client
        self._conversation = self._begin()
        self._loop.watch(client.fileno(), lambda events: self._ready(client))
        log.info("a virtual machine has connected")

    def _ready(self, client: socket.socket) -> None:
        talk = self._conversation
        fds: list[int] = []
        try:
            try:
                data, ancillary, _, _ = client.recvmsg(talk.wanted, self._room, _TAKE)
            except BlockingIOError:
                return
            for level, kind, carried in ancillary:
                if level == SOL_SOCKET and kind == SCM_RIGHTS:
                    fds += array.array("i", carried[: len(carried) // 4 * 4])
            if not data:
                raise EOFError
            for answer in talk.receive(data, fds):
                self._send(client, answer)
        except (EOFError, ConnectionError):
            log.info("the virtual machine has gone")
            self._end(client)
        except (DeviceProtocolError, OSError) as error:
            log.warning("the virtual machine is given up: %s", error)
            self._end(client)
        self._after_each()

    def _send(self, client: socket.socket, answer: bytes) -> None:
        """All of ``answer``.  TimeoutError."""
        while answer:
            try:
                answer = answer[client.send(answer, _GIVE) :]
            except BlockingIOError:
                if not select.select((), (client,), (), self._patience)[1]:
                    raise TimeoutError("it reads no answer") from None

    def _end(self, client: socket.socket) -> None:
        self._loop.unwatch(client.fileno())
        client.close()
        self._client = None
        self._conversation.close()
        self._watch()
