"""The ports of a context and their holders."""

from __future__ import annotations

import errno
import random
from typing import TypeVar

from ..model.address import LARGEST
from ..model.constants import LAST_RESERVED_PORT
from .errors import Refused
from .limits import EPHEMERAL_PORT_TRIES_MAX

_FIRST_EPHEMERAL = LAST_RESERVED_PORT + 1
_LAST_EPHEMERAL = LARGEST - 1  # LARGEST is VMADDR_PORT_ANY

Holder = TypeVar("Holder")


class Ports(dict[int, Holder]):
    """Holders of a context's ports in one namespace, by port number.

    Streams and sequenced packets share a namespace, datagrams have their own, as in Linux.
    """

    def __init__(self) -> None:
        super().__init__()
        # Upwards from a random start through four billion ports: a released port is the last to
        # be assigned again, so a late packet or a slow peer of the old holder does not reach the
        # new one.
        self._next = random.randint(_FIRST_EPHEMERAL, _LAST_EPHEMERAL)

    def claim(self, port: int, holder: Holder) -> None:
        """Assign ``port`` to ``holder``.

        Raises Refused with EADDRINUSE when it is held.
        """
        if port in self:
            raise Refused(errno.EADDRINUSE, f"port {port} is in use")
        self[port] = holder

    def next_ephemeral(self) -> int:
        """Return a free port of the range that needs no privilege, without assigning it.

        Raises Refused with EADDRNOTAVAIL, as Linux does, when several consecutive ports are held;
        the next call continues after those.
        """
        port = self.find_ephemeral()
        self._next = _after(port)
        return port

    def find_ephemeral(self) -> int:
        """Return the port that :meth:`next_ephemeral` returns next.

        Raises Refused as :meth:`next_ephemeral`.
        """
        for _ in range(EPHEMERAL_PORT_TRIES_MAX):
            if self._next not in self:
                return self._next
            self._next = _after(self._next)
        raise Refused(
            errno.EADDRNOTAVAIL, f"{EPHEMERAL_PORT_TRIES_MAX} consecutive ports are in use"
        )

    def release(self, port: int, holder: Holder) -> bool:
        """Release a port; return whether ``holder`` still held it."""
        if self.get(port) is not holder:
            return False
        del self[port]
        return True


def _after(port: int) -> int:
    return port + 1 if port < _LAST_EPHEMERAL else _FIRST_EPHEMERAL
