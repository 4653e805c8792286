"""The socket a vhost-user front end connects to: one at a time, any number in turn."""

from __future__ import annotations

import array
import logging
import os
import socket
from socket import CMSG_SPACE, MSG_CMSG_CLOEXEC, MSG_DONTWAIT, MSG_NOSIGNAL, SCM_RIGHTS, SOL_SOCKET

from ...daemon.loop import Loop
from ...limits import VHOST_DESCRIPTORS, VHOST_REPLY
from .messages import Decoder, ProtocolError
from .session import Device, Session

log = logging.getLogger(__name__)

_ROOM = CMSG_SPACE(VHOST_DESCRIPTORS * array.array("i").itemsize)
_TAKE = int(MSG_CMSG_CLOEXEC | MSG_DONTWAIT)


class Server:
    """Serves ``device`` to whoever connects to ``listener``, which becomes the server's."""

    def __init__(self, loop: Loop, listener: socket.socket, device: Device) -> None:
        self._loop = loop
        self._listener = listener
        self._device = device
        self._client: socket.socket | None = None
        self._watch()

    def close(self) -> None:
        """Serve nobody any more."""
        if self._client is not None:
            self._end()
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
        client.settimeout(VHOST_REPLY)
        self._client = client
        self._session = Session(self._device)
        self._decoder = Decoder()
        self._loop.watch(client.fileno(), self._ready)
        log.info("a virtual machine has connected")

    def _ready(self, events: int) -> None:
        client, decoder = self._client, self._decoder
        assert client is not None
        fds: list[int] = []
        try:
            try:
                data, ancillary, _, _ = client.recvmsg(decoder.wanted, _ROOM, _TAKE)
            except BlockingIOError:
                return
            for level, kind, carried in ancillary:
                if level == SOL_SOCKET and kind == SCM_RIGHTS:
                    fds += array.array("i", carried[: len(carried) // 4 * 4])
            if not data:
                raise EOFError
            message = decoder.receive(data, fds)
            if message is not None:
                answer = self._session.handle(message)
                if answer is not None:
                    client.sendall(answer, MSG_NOSIGNAL)
        except (EOFError, ConnectionError):
            log.info("the virtual machine has gone")
            self._end()
        except (ProtocolError, OSError) as error:
            log.warning("the virtual machine is given up: %s", error)
            self._end()

    def _end(self) -> None:
        assert self._client is not None
        self._loop.unwatch(self._client.fileno())
        self._client.close()
        self._client = None
        for fd in self._decoder.pending_fds():
            os.close(fd)
        self._session.close()
        self._watch()
