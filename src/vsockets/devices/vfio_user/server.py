"""The socket a vfio-user client connects to."""

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
    """Serves ``device`` to whoever connects to ``listener``, which becomes the server's."""

    def __init__(
        self,
        loop: EventLoop,
        listener: socket.socket,
        device: Device,
        after_each: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(
            loop,
            listener,
            lambda: _Conversation(device),
            descriptors=VFIO_USER_DESCRIPTORS_MAX,
            patience=VFIO_USER_REPLY_TIMEOUT_SECONDS,
            after_each=after_each,
        )


class _Conversation:
    wanted = LARGEST_MESSAGE

    def __init__(self, device: Device) -> None:
        self._session = Session(device)
        self._decoder = Decoder()

    def receive(self, data: bytes, fds: list[int]) -> Iterator[bytes]:
        for message in self._decoder.receive(data, fds):
            answer = self._session.handle(message)
            if answer is not None:
                yield answer

    def close(self) -> None:
        for fd in self._decoder.pending_fds():
            os.close(fd)
        self._session.close()
