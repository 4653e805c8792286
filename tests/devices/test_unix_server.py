"""Service of one monitor after another."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

from vsockets.devices.loop import DeviceLoop
from vsockets.devices.unix_server import UnixServer
from vsockets.testing import wait_until

ANSWER = bytes(4 << 20)


class LargeReply:
    """A protocol whose replies exceed the socket's buffer."""

    wanted = 100

    def __init__(self, ended: list[bool]) -> None:
        self._ended = ended

    def receive(self, data: bytes, fds: list[int]) -> Iterator[bytes]:
        yield ANSWER

    def close(self) -> None:
        self._ended.append(True)


def test_client_that_reads_no_reply_is_disconnected(tmp_path: Path) -> None:
    """The next monitor is then served."""
    path = os.fspath(tmp_path / "socket")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    listener.setblocking(False)
    loop = DeviceLoop()
    ended: list[bool] = []
    server = UnixServer(loop, listener, lambda: LargeReply(ended), descriptors=1, reply_timeout=0.1)

    def disconnected() -> bool:
        loop.turn()
        return bool(ended)

    try:
        for _ in range(2):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(path)
                client.send(b"a question")
                wait_until(disconnected, "the server to lose its patience")
            ended.clear()
    finally:
        server.close()
        loop.close()
