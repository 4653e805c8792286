"""Who holds which port of a context."""

from __future__ import annotations

import errno
import random
from typing import TypeVar

from ..model.address import LARGEST
from ..model.constants import LAST_RESERVED_PORT
from .errors import Refused
from .limits import EPHEMERAL_PORT_TRIES_MAX

_FIRST_EPHEMERAL = LAST_RESERVED_PORT + 1
_LAST_EPHEMERAL = LARGEST - 1  # the last one is VMADDR_PORT_ANY

Holder = TypeVar("Holder")


class Ports(dict[int, Holder]):
    """A context's ports of one namespace, by their numbers, and who holds them.

    Streams and sequenced packets share a namespace, datagrams have their own, as in Linux.
    """

    def __init__(self) -> None:
        super().__init__()
        # Upwards from a random start through four billion ports: a port that was just given
        # back is the last to be given out again, so a late packet or a slow peer of the old
        # holder does not meet the new one.
        self._next = random.randint(_FIRST_EPHEMERAL, _LAST_EPHEMERAL)

    def claim(self, port: int, holder: Holder) -> None:
        """Take a port by its number.  Refused with EADDRINUSE when it is held."""
        if port in self:
            raise Refused(errno.EADDRINUSE, f"port {port} is held")
        self[port] = holder

    def ephemeral(self) -> int:
        """A free port from the range that needs no privilege.  It is not yet taken.

        Refused with EADDRNOTAVAIL, as by Linux, when several in a row are held; then the next
        attempt looks behind those.
        """
        port = self.seek()
        self._next = _after(port)
        return port

    def seek(self) -> int:
        """As :meth:`ephemeral`, which then gives the same port."""
        for _ in range(EPHEMERAL_PORT_TRIES_MAX):
            if self._next not in self:
                return self._next
            self._next = _after(self._next)
        raise Refused(errno.EADDRNOTAVAIL, f"{EPHEMERAL_PORT_TRIES_MAX} ports in a row are held")

    def release(self, port: int, holder: Holder) -> bool:
        """Give a port back; returns whether ``holder`` still held it."""
        if self.get(port) is not holder:
            return False
        del self[port]
        return True


def _after(port: int) -> int:
    return port + 1 if port < _LAST_EPHEMERAL else _FIRST_EPHEMERAL
