"""An accept loop that pauses while descriptors or memory are exhausted, or on request."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Callable

from .. import logs
from .loop import EventLoop

log = logging.getLogger(__name__)

#: Seconds to stop accepting while resources are exhausted.
_PAUSE = 0.05

#: Errors of a process or machine without free descriptors or memory.
OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)


class Acceptor:
    """An accept loop that owns ``listener`` and passes each accepted descriptor to ``admit``.

    It pauses while resources are exhausted, and for the seconds that ``admit`` returns, if any.
    """

    def __init__(
        self,
        loop: EventLoop,
        listener: socket.socket,
        who: str,
        admit: Callable[[int], float | None],
    ) -> None:
        self._loop = loop
        self._listener = listener
        self._who = who
        # The C method, which typeshed leaves out: avoids an object that lives for microseconds.
        self._accept = listener._accept  # type: ignore[attr-defined]
        self._admit = admit
        self._watch()

    def close(self) -> None:
        """Stop accepting and close the listener."""
        self._loop.unwatch(self._listener.fileno())
        self._listener.close()

    def _watch(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.watch(self._listener.fileno(), self._ready)

    def _ready(self, events: int) -> None:
        try:
            fd, _ = self._accept()
        except BlockingIOError:
            return  # the client has closed the connection already
        except OSError as error:
            if error.errno not in OUT_OF_RESOURCES:
                raise
            log.warning("%s waits: %s", self._who, error, extra=logs.rare(self))
            self._pause(_PAUSE)
        else:
            if seconds := self._admit(fd):
                self._pause(seconds)

    def _pause(self, seconds: float) -> None:
        self._loop.unwatch(self._listener.fileno())
        self._loop.call_later(seconds, self._watch)
