"""Brokerage: binding, listening, connecting, and the addresses of datagrams.

Every operation costs the same whatever the number of contexts, listeners and connections:
all look-ups are by key.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from ..address import LARGEST
from ..buffers import BufferSizes, negotiate
from ..constants import (
    LAST_RESERVED_PORT,
    VMADDR_CID_ANY,
    VMADDR_CID_LOCAL,
    VMADDR_PORT_ANY,
)
from .context import Context, Contexts
from .endpoint import Connection, Credentials, Endpoint, Kind
from .errors import Refused
from .policy import require_path
from .ports import Ports

#: Connections are numbered from 1 to this, and over again: an epoll can report 31 bits.
LAST_CONNECTION = 2**31 - 1


class Fabric:
    """All contexts, the endpoints in them and the connections between them."""

    def __init__(self, owner: int) -> None:
        self.contexts = Contexts(owner)
        self.connections: dict[int, Connection] = {}
        self._number = 0

    # Binding

    def bind(
        self,
        context: Context,
        kind: Kind,
        cid: int,
        port: int,
        owner: Credentials,
        may_reserve: Callable[[], bool],
        cookie: int = 0,
    ) -> Endpoint:
        """Give a socket an address; wildcards are filled in.

        Refused with EADDRNOTAVAIL (another context's CID), EACCES (a reserved port without
        privilege: ``may_reserve`` is asked only then) or EADDRINUSE.
        """
        if cid not in (VMADDR_CID_ANY, VMADDR_CID_LOCAL, context.cid):
            raise Refused(errno.EADDRNOTAVAIL, f"CID {cid} is not context {context.cid}'s")
        own_cid = VMADDR_CID_LOCAL if cid == VMADDR_CID_LOCAL else context.cid
        ports: Ports[Endpoint] | Ports[Endpoint | Connection]
        ports = context.datagrams if kind is Kind.DATAGRAM else context.connected
        if port == VMADDR_PORT_ANY:
            port = ports.ephemeral()
        elif port <= LAST_RESERVED_PORT and not may_reserve():
            raise Refused(errno.EACCES, f"port {port} is reserved: CAP_NET_BIND_SERVICE is needed")
        endpoint = Endpoint(kind, context, own_cid, port, owner, cookie)
        ports.claim(port, endpoint)
        if cookie:
            context.cookies.setdefault(cookie, endpoint)
        return endpoint

    def listen(self, endpoint: Endpoint, sizes: BufferSizes) -> None:
        """Let ``endpoint`` be connected to."""
        endpoint.listening = True
        endpoint.sizes = sizes

    def unbind(self, endpoint: Endpoint) -> None:
        """The socket is gone: its port is free."""
        if endpoint.kind is Kind.DATAGRAM:
            endpoint.context.datagrams.release(endpoint.port, endpoint)
        else:
            endpoint.context.connected.release(endpoint.port, endpoint)
        _forget(endpoint.context, endpoint.cookie, endpoint)

    # Connecting

    def find_listener(self, context: Context, kind: Kind, cid: int, port: int) -> Endpoint:
        """The endpoint a socket of ``context`` reaches at ``(cid, port)``.

        Refused with EHOSTUNREACH (no such context, or none that may be reached), ECONNRESET
        (nobody listens there, or for another socket type) or EINVAL (wildcards).
        """
        destination = self._destination(context, cid, port)
        endpoint = destination.connected.get(port)
        if not isinstance(endpoint, Endpoint) or not endpoint.listening:
            raise Refused(errno.ECONNRESET, f"nobody listens on {cid}:{port}")
        if endpoint.kind is not kind:
            raise Refused(errno.ECONNRESET, f"{cid}:{port} is a {endpoint.kind.value} socket")
        if not _in_scope(context, endpoint):
            raise Refused(errno.ECONNRESET, f"port {port} is bound to the local CID")
        return endpoint

    def connect(
        self,
        context: Context,
        listener: Endpoint,
        bound: Endpoint | None,
        sizes: BufferSizes,
        owner: Credentials,
        cookie: int = 0,
    ) -> Connection:
        """Join a socket of ``context`` with ``listener``; an unbound one gets a port.

        Refused with EINVAL when the two sides' buffer sizes leave no size for both.
        """
        size = negotiate(sizes, listener.sizes)
        if size is None:
            raise Refused(errno.EINVAL, f"no common buffer size: {sizes} and {listener.sizes}")
        if bound is None:
            local = (context.cid, context.connected.ephemeral())
        else:
            if not _in_scope(listener.context, bound):
                raise Refused(errno.EHOSTUNREACH, "a socket bound to the local CID stays in it")
            local = bound.address
            self.unbind(bound)
        number = self._number % LAST_CONNECTION + 1
        while number in self.connections:
            number = number % LAST_CONNECTION + 1
        self._number = number
        peer = (listener.context.cid, listener.port)
        connection = Connection(number, context, listener, local, peer, size, sizes, owner, cookie)
        context.connected.claim(local[1], connection)
        self.connections[number] = connection
        if cookie:
            context.cookies.setdefault(cookie, connection)
        return connection

    def end(self, number: int) -> None:
        """A connection is over; its port is free.  Harmless when it was ended before."""
        connection = self.connections.pop(number, None)
        if connection is not None:
            connection.context.connected.release(connection.local[1], connection)
            _forget(connection.context, connection.cookie, connection)

    # Datagrams

    def find_datagram(self, context: Context, cid: int, port: int) -> Endpoint:
        """The datagram endpoint a socket of ``context`` reaches at ``(cid, port)``.

        Refused with EHOSTUNREACH, ECONNREFUSED (nobody there) or EINVAL (wildcards).
        """
        destination = self._destination(context, cid, port)
        endpoint = destination.datagrams.get(port)
        if endpoint is None or not _in_scope(context, endpoint):
            raise Refused(errno.ECONNREFUSED, f"no datagram socket on {cid}:{port}")
        return endpoint

    # Both

    def _destination(self, context: Context, cid: int, port: int) -> Context:
        if cid == LARGEST or port == LARGEST:
            raise Refused(errno.EINVAL, f"{cid}:{port}: a wildcard is no destination")
        if cid in (VMADDR_CID_LOCAL, context.cid):
            return context
        destination = self.contexts.get(cid)
        if destination is None:
            raise Refused(errno.EHOSTUNREACH, f"no context {cid}")
        require_path(context, destination)
        return destination


def _forget(context: Context, cookie: int, what: Endpoint | Connection) -> None:
    if context.cookies.get(cookie) is what:
        del context.cookies[cookie]


def _in_scope(context: Context, endpoint: Endpoint) -> bool:
    """Whether ``endpoint`` has to do with ``context``: one bound to VMADDR_CID_LOCAL has to do
    with its own only.
    """
    return endpoint.cid != VMADDR_CID_LOCAL or endpoint.context is context
