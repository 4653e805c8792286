"""Server of vfio-user clients on a unix socket."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator

from ...eventloop.loop import EventLoop
from .. import unix_server
from ..limits import VFIO_USER_DESCRIPTORS_MAX, VFIO_USER_REPLY_TIMEOUT_SECONDS
from .messages import LARGEST_MESSAGE, Decoder
from .session import Device, Session


class VfioUserServer(unix_server.UnixServer):
    """Server of ``device``; takes ownership of ``listener``."""

    def __init__(
        self,
        loop: EventLoop,
        listener: socket.socket,
        device: Device,
        after_message: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(
            loop,
            listener,
            lambda: _Connection(device),
            descriptors=VFIO_USER_DESCRIPTORS_MAX,
            reply_timeout=VFIO_USER_REPLY_TIMEOUT_SECONDS,
            after_message=after_message,
        )


class _Connection:
    wanted = LARGEST_MESSAGE

    def __init__(self, device: Device) -> None:
        self._session = Session(device)
        self._decoder = Decoder()

    def receive(self, data: bytes, fds: list[int]) -> Iterator[bytes]:
        for message in self._decoder.receive(data, fds):
            reply = self._session.handle(message)
            if reply is not None:
                yield reply

    def close(self) -> None:
        for fd in self._decoder.pending_fds():
            os.close(fd)
        self._session.close()
