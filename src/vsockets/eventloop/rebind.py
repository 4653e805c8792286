"""Noticing that vsockd has ended, and binding again when there is another one.

A listening stream notices by itself (ENETDOWN).  A datagram socket does not: the next vsockd knows
nothing of it, so nothing reaches it any more.  Its holder therefore keeps a *lifeline* as well, a
bound stream socket that does nothing, because its connection to vsockd ends with vsockd.
"""

from __future__ import annotations

import asyncio
import socket as stdlib
from collections.abc import Callable

from ..attachment import Attachment, ContextHandle, current
from ..limits import RETRY_LONGEST_PAUSE_SECONDS
from ..model.constants import VMADDR_CID_ANY, VMADDR_PORT_ANY
from ..socket import socket

#: How long to wait for the next vsockd at first, in seconds.
FIRST_LOOK = 0.1


def lifeline(context: ContextHandle | None) -> stdlib.socket | None:
    """Return a socket that becomes readable when vsockd has ended.

    None where there is no vsockd, as in a virtual machine.  Raises OSError.
    """
    place = current() if context is None else context
    if not isinstance(place, Attachment):
        return None
    sock = socket(context=place)
    try:
        sock.bind((VMADDR_CID_ANY, VMADDR_PORT_ANY))
    except BaseException:
        sock.close()
        raise
    return sock


class Revival:
    """Calls ``lost`` when vsockd has ended and ``again`` when there is one, in an asyncio loop.

    ``again`` is called until it raises no OSError.  Made while there is a vsockd.
    """

    def __init__(
        self, context: ContextHandle | None, lost: Callable[[], None], again: Callable[[], None]
    ) -> None:
        """Raises OSError."""
        self._context = context
        self._lost = lost
        self._again = again
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._line = lifeline(context)
        self._watch()

    def close(self) -> None:
        """Notice no more."""
        self._drop()
        if self._timer is not None:
            self._timer.cancel()

    def _watch(self) -> None:
        if self._line is not None:
            self._loop.add_reader(self._line.fileno(), self._ended)

    def _drop(self) -> None:
        if self._line is not None:
            self._loop.remove_reader(self._line.fileno())
            self._line.close()
            self._line = None

    def _ended(self) -> None:
        self._drop()
        self._lost()
        self._timer = self._loop.call_later(FIRST_LOOK, self._look)

    def _look(self) -> None:
        try:
            # First, or what is bound next could be lost unnoticed.
            self._line = lifeline(self._context)
            self._again()
        except OSError:
            self._drop()
            self._timer = self._loop.call_later(RETRY_LONGEST_PAUSE_SECONDS, self._look)
        else:
            self._timer = None
            self._watch()
