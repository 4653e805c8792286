"""What the forwarder says: connections, and what went wrong, no more often than is bearable."""

from __future__ import annotations

import logging
import socket as stdlib
import time
from typing import Any

from ...constants import AF_VSOCK
from ...fabric.meter import Meter
from ...limits import FORWARD_LOG_RATE

log = logging.getLogger("vsockets.forward")


class Complaints:
    """Warnings that clients can cause: some a second, the rest counted."""

    def __init__(self, log: logging.Logger = log) -> None:
        self._log = log
        self._meter = Meter(FORWARD_LOG_RATE)
        self._left_out = 0

    def say(self, text: str, *arguments: object) -> None:
        """Log a warning, unless there were too many just now."""
        if not self._meter.take(time.monotonic()):
            self._left_out += 1
            return
        if self._left_out:
            self._log.warning("%d complaints were left out", self._left_out)
            self._left_out = 0
        self._log.warning(text, *arguments)


def peer_of(sock: stdlib.socket) -> tuple[int, int] | None:
    """The CID and port at the other end; None when it is no vSockets socket."""
    if sock.family != AF_VSOCK:
        return None
    cid, port = sock.getpeername()
    return cid, port


def describe_peer(sock: stdlib.socket) -> str:
    """Who is at the other end, for people."""
    try:
        name = sock.getpeername()
    except OSError:
        return "somebody who has gone"
    return describe_source(name)


def describe_source(name: Any) -> str:
    """An address the socket module gave, for people."""
    if isinstance(name, tuple):
        return f"[{name[0]}]:{name[1]}" if ":" in str(name[0]) else f"{name[0]}:{name[1]}"
    return f"unix {name!r}" if name else "a local process"
