"""A context's datagrams on their way: memory of the host's kernel, which a guest may fill.

vsockd is not on the way of a datagram, but it has a duplicate of every route (:mod:`.datagrams`)
and the kernel says how much was sent on it and not yet received.
"""

from __future__ import annotations

import _socket
import array
import errno
import fcntl
from pathlib import Path
from socket import SHUT_RDWR
from termios import TIOCOUTQ  # the same ioctl as SIOCOUTQ: bytes sent and not yet received

from ..fabric import Context, Denied, Rule


def _most_on_a_route() -> int:
    """The bytes one socket can have on their way, as the kernel counts: twice wmem_max."""
    try:
        return 2 * int(Path("/proc/sys/net/core/wmem_max").read_text())
    except (OSError, ValueError):
        return 2 * 212_992


_MOST_ON_A_ROUTE = _most_on_a_route()


class Outflow:
    """The routes from one context."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._routes: set[_socket.socket] = set()
        #: revoked, with something on its way yet
        self._draining: set[_socket.socket] = set()

    @property
    def needs_watching(self) -> bool:
        """Whether its routes together can hold more than the context may have on its way."""
        most = (len(self._routes) + len(self._draining)) * _MOST_ON_A_ROUTE
        return self._context.is_guest and most > self._context.limits.datagram_bytes

    def require_space(self) -> None:
        """Raise Denied when as much is on its way as may be."""
        if self.needs_watching and (queued := self.queued()) > self._context.limits.datagram_bytes:
            reason = f"{queued} bytes of datagrams of context {self._context.cid} wait"
            raise Denied(errno.ENOBUFS, Rule.DATAGRAM_BYTES, reason)

    def add(self, route: _socket.socket) -> None:
        """``route`` is one more."""
        self._routes.add(route)

    def revoke(self, route: _socket.socket) -> None:
        """Nothing can be sent on ``route`` any more, whoever has it.  Harmless the second time."""
        if route not in self._routes:
            return
        route.shutdown(SHUT_RDWR)
        self._routes.remove(route)
        if self._context.is_guest and queued_on(route):
            self._draining.add(route)
        else:
            route.close()

    def queued(self) -> int:
        """The bytes on their way, as the kernel counts: some more than the datagrams have."""
        self.settle()
        return sum(map(queued_on, self._routes)) + sum(map(queued_on, self._draining))

    def settle(self) -> None:
        """Let go of the routes that were revoked and have nothing on their way any more."""
        for route in [route for route in self._draining if not queued_on(route)]:
            self._draining.remove(route)
            route.close()

    def enforce(self) -> bool:
        """Revoke every route with something on it if that is too much; returns whether it was."""
        if self.queued() <= self._context.limits.datagram_bytes:
            return False
        for route in [route for route in self._routes if queued_on(route)]:
            self.revoke(route)
        return True

    def close(self) -> None:
        """The context is no more."""
        for route in [*self._routes, *self._draining]:
            route.shutdown(SHUT_RDWR)
            route.close()


def queued_on(route: _socket.socket) -> int:
    """The bytes on their way on one route."""
    answer = array.array("i", [0])
    fcntl.ioctl(route.fileno(), TIOCOUTQ, answer)
    return answer[0]
