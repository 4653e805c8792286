"""Accepting connections, also when there is no descriptor left for another."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Callable

from .. import logs
from .loop import EventLoop

log = logging.getLogger(__name__)

#: How long to look away when there is nothing to accept with, in seconds.
_PAUSE = 0.05

_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)


class Acceptor:
    """Calls ``admit`` with the descriptor of each connection to ``listener``, which it owns."""

    def __init__(
        self, loop: EventLoop, listener: socket.socket, who: str, admit: Callable[[int], None]
    ) -> None:
        self._loop = loop
        self._listener = listener
        self._who = who
        # The C method, which typeshed leaves out: no object for what lasts microseconds here.
        self._accept = listener._accept  # type: ignore[attr-defined]
        self._admit = admit
        self._watch()

    def close(self) -> None:
        """Accept nobody any more."""
        self._loop.unwatch(self._listener.fileno())
        self._listener.close()

    def _watch(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.watch(self._listener.fileno(), self._ready)

    def _ready(self, events: int) -> None:
        try:
            fd, _ = self._accept()
        except BlockingIOError:
            return  # it has gone again
        except OSError as error:
            if error.errno not in _OUT_OF_RESOURCES:
                raise
            log.warning("%s waits: %s", self._who, error, extra=logs.rare(self))
            self._loop.unwatch(self._listener.fileno())
            self._loop.call_later(_PAUSE, self._watch)
        else:
            self._admit(fd)
