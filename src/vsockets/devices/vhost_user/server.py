"""Server of vhost-user front ends on a unix socket."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

from ...eventloop.loop import EventLoop
from .. import unix_server
from ..limits import VHOST_USER_DESCRIPTORS_MAX, VHOST_USER_REPLY_TIMEOUT_SECONDS
from .messages import Decoder
from .session import Device, Session


class VhostUserServer(unix_server.UnixServer):
    """Server of ``device``; takes ownership of ``listener``."""

    def __init__(self, loop: EventLoop, listener: socket.socket, device: Device) -> None:
        super().__init__(
            loop,
            listener,
            lambda: _Connection(device),
            descriptors=VHOST_USER_DESCRIPTORS_MAX,
            reply_timeout=VHOST_USER_REPLY_TIMEOUT_SECONDS,
        )


class _Connection:
    def __init__(self, device: Device) -> None:
        self._session = Session(device)
        self._decoder = Decoder()

    @property
    def wanted(self) -> int:
        return self._decoder.wanted

    def receive(self, data: bytes, fds: list[int]) -> Iterator[bytes]:
        message = self._decoder.receive(data, fds)
        if message is not None:
            reply = self._session.handle(message)
            if reply is not None:
                yield reply

    def close(self) -> None:
        for fd in self._decoder.pending_fds():
            os.close(fd)
        self._session.close()
