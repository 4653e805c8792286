"""Detection of vsockd's end, and binding again once another vsockd serves.

A listening stream reports vsockd's end itself (ENETDOWN).  A datagram socket does not: the next
vsockd does not know it, so it silently receives nothing.  The owner of such a socket therefore also
keeps a *lifeline*: a bound stream socket that serves only as a signal, because its connection to
vsockd ends together with vsockd.
"""

from __future__ import annotations

import asyncio
import socket as stdlib
from collections.abc import Callable

from .._linux.sockets import closed_on_failure
from ..attachment import Attachment, ContextHandle, current
from ..model.constants import VMADDR_CID_ANY, VMADDR_PORT_ANY
from ..socket import socket
from .retry import Backoff

#: Pause in seconds before the first attempt to bind again.
REBIND_FIRST_PAUSE_SECONDS = 0.1


def lifeline(context: ContextHandle | None) -> stdlib.socket | None:
    """Return a socket that becomes readable when vsockd ends.

    Returns None without a vsockd, as in a virtual machine.

    Raises OSError when vsockd cannot be reached.
    """
    handle = current() if context is None else context
    if not isinstance(handle, Attachment):
        return None
    sock = socket(context=handle)
    with closed_on_failure(sock):
        sock.bind((VMADDR_CID_ANY, VMADDR_PORT_ANY))
    return sock


class Rebinder:
    """A watch on vsockd in an asyncio loop.

    Calls ``lost`` when vsockd has ended, then ``bind`` once another one serves, repeatedly until
    ``bind`` raises no OSError.
    """

    def __init__(
        self, context: ContextHandle | None, lost: Callable[[], None], bind: Callable[[], None]
    ) -> None:
        """Start to watch the present vsockd.

        Raises OSError when vsockd cannot be reached.
        """
        self._context = context
        self._lost = lost
        self._bind = bind
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._backoff = Backoff(REBIND_FIRST_PAUSE_SECONDS)
        self._line = lifeline(context)
        self._watch()

    def close(self) -> None:
        """Stop watching."""
        self._drop()
        if self._timer is not None:
            self._timer.cancel()

    def _watch(self) -> None:
        if self._line is not None:
            self._loop.add_reader(self._line.fileno(), self._on_end)

    def _drop(self) -> None:
        if self._line is not None:
            self._loop.remove_reader(self._line.fileno())
            self._line.close()
            self._line = None

    def _on_end(self) -> None:
        self._drop()
        self._lost()
        self._backoff.reset()
        self._retry()

    def _retry(self) -> None:
        self._timer = self._loop.call_later(self._backoff.next_pause(), self._try_bind)

    def _try_bind(self) -> None:
        try:
            # The lifeline comes first: vsockd's end after it is noticed.
            self._line = lifeline(self._context)
            self._bind()
        except OSError:
            self._drop()
            self._retry()
        else:
            self._timer = None
            self._watch()
