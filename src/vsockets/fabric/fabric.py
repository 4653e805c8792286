"""The fabric's operations: bind, listen, connect, and the routing of datagrams.

Each operation takes constant time in the number of contexts, listeners and connections: all
look-ups are by key.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from ..model.buffers import BufferSizes, negotiate
from ..model.constants import LAST_RESERVED_PORT, VMADDR_CID_ANY, VMADDR_CID_LOCAL, VMADDR_PORT_ANY
from . import life_cycle, policy
from .life_cycle import Change
from .model import (
    Connection,
    Context,
    Contexts,
    Counts,
    Credentials,
    Denied,
    Endpoint,
    EndpointKind,
    Ports,
    Program,
    Refused,
    Rule,
    State,
)
from .policy import trust_of
from .settings import Profile, Settings

#: Connections are numbered from 1 to this and then from 1 again: an epoll entry reports 31 bits.
LAST_CONNECTION = 2**31 - 1

# Module aliases of enum members: hot path.
_OFF, _DEFAULT = State.OFF, Profile.DEFAULT

_NO_STREAM = "no stream between {}:{} and {}:{} (see: vsock ls)"


class Fabric:
    """All contexts, their endpoints, and the connections between them."""

    def __init__(self, owner: int) -> None:
        self.contexts = Contexts(owner)
        self.settings = Settings()
        self.connections: dict[int, Connection] = {}
        #: called with each endpoint of the host that starts or stops listening
        self.watchers: list[Callable[[Endpoint], None]] = []
        #: counts of leased contexts that have been removed
        self.departed = Counts()
        self.last_number = 0
        #: numbers of removed connections are added to it, unless it is None
        self.ended: list[int] | None = None

    # Binding

    def bind(
        self,
        context: Context,
        kind: EndpointKind,
        cid: int,
        port: int,
        program: Program,
        cookie: int = 0,
        privileged: bool = True,
    ) -> Endpoint:
        """Bind a socket; wildcards in the address are filled in.

        Without ``privileged``, capabilities of ``program`` are ignored.

        Raises Refused with EADDRNOTAVAIL (another context's CID), EACCES (a reserved port, or
        CID 0, without privilege), ENOBUFS (the party's limit) or EADDRINUSE.
        """
        if cid not in (VMADDR_CID_ANY, VMADDR_CID_LOCAL, context.cid):
            reason = f"CID {cid} is not context {context.cid}'s"
            raise Denied(errno.EADDRNOTAVAIL, Rule.AUTHENTIC_SOURCE, reason)
        policy.require_service(context, program.credentials)
        party = context.party_of(program.credentials.uid)
        party.check_socket_limit()
        own_cid = VMADDR_CID_LOCAL if cid == VMADDR_CID_LOCAL else context.cid
        ports: Ports[Endpoint] | Ports[Endpoint | Connection]
        ports = context.datagrams if kind is EndpointKind.DATAGRAM else context.connected
        if port == VMADDR_PORT_ANY:
            port = ports.next_ephemeral()
        elif port <= LAST_RESERVED_PORT:
            policy.require_reserved_port(context, program, port, privileged)
        endpoint = Endpoint(
            kind, context, own_cid, port, program.credentials, cookie=cookie, party=party
        )
        ports.claim(port, endpoint)
        party.sockets += 1
        if context is self.contexts.host:
            endpoint.trust = trust_of(program, kind, self.settings)
        if cookie:
            context.cookies.setdefault(cookie, endpoint)
        return endpoint

    def rebind(self, endpoint: Endpoint) -> None:
        """Return the port to a stream socket whose connection has just released it."""
        assert endpoint.party is not None
        endpoint.context.connected.claim(endpoint.port, endpoint)
        endpoint.party.sockets += 1
        if endpoint.cookie:
            endpoint.context.cookies.setdefault(endpoint.cookie, endpoint)

    def replace_socket(self, endpoint: Endpoint, cookie: int, inode: int) -> None:
        """Make another socket, with this cookie and inode, the socket of ``endpoint``."""
        _forget(endpoint.context, endpoint.cookie, endpoint)
        endpoint.cookie, endpoint.inode = cookie, inode
        endpoint.context.cookies.setdefault(cookie, endpoint)

    def listen(self, endpoint: Endpoint, sizes: BufferSizes) -> None:
        """Set ``endpoint`` listening, with its buffer sizes."""
        endpoint.listening = True
        endpoint.sizes = sizes
        self._notify_watchers(endpoint)

    def _notify_watchers(self, endpoint: Endpoint) -> None:
        if endpoint.context is self.contexts.host:
            for notify in self.watchers:
                notify(endpoint)

    def unbind(self, endpoint: Endpoint) -> None:
        """Release the port of a socket that was closed."""
        if endpoint.kind is EndpointKind.DATAGRAM:
            held = endpoint.context.datagrams.release(endpoint.port, endpoint)
        else:
            held = endpoint.context.connected.release(endpoint.port, endpoint)
        if held and endpoint.party is not None:
            endpoint.party.sockets -= 1
        _forget(endpoint.context, endpoint.cookie, endpoint)
        if endpoint.listening:
            self._notify_watchers(endpoint)

    # Connecting

    def find_listener(
        self,
        context: Context,
        kind: EndpointKind,
        cid: int,
        port: int,
        program: Program,
        bound: Endpoint | None = None,
    ) -> Endpoint:
        """Return the endpoint that a socket of ``program``, in ``context``, reaches at an address.

        ``bound`` is the socket's endpoint, if it has one yet.

        Raises Refused with EHOSTUNREACH (the context does not exist, or may not be reached),
        EADDRNOTAVAIL (no free port for the socket), ECONNRESET (no listener, or one of another
        socket type), EACCES (an isolated guest that the program is not trusted for), ENETDOWN
        (forbidden in the source context's state) or ENODEV (VMADDR_CID_ANY).
        """
        destination = self._destination(context, cid, port, True)
        if bound is None and context.connected.following in context.connected:
            context.connected.find_ephemeral()
        holder = destination.connected.get(port)
        endpoint = holder if isinstance(holder, Endpoint) and holder.listening else None
        if endpoint is None and destination.device is not None:
            endpoint = destination.device.endpoint(destination, kind, port)
        if endpoint is None and destination is self.contexts.host and context.fallback is not None:
            endpoint = context.fallback(kind, port)
        if endpoint is None:
            raise Refused(errno.ECONNRESET, f"no listener on {cid}:{port}")
        if endpoint.kind is not kind:
            raise Refused(errno.ECONNRESET, f"{cid}:{port} is a {endpoint.kind.value} socket")
        if context is not destination:
            if endpoint.cid == VMADDR_CID_LOCAL:
                raise Refused(errno.ECONNRESET, f"port {port} is bound to the local CID")
            here, there = context.isolation.profile, destination.isolation.profile
            if here is not _DEFAULT or there is not _DEFAULT:
                self._require_trust(context, endpoint, program, bound)
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
        """Connect a socket of ``context`` with ``listener``; assign a port to an unbound socket.

        Raises Refused with EINVAL (the sides' buffer sizes have no size in common), ENOBUFS (the
        party's limit) or EACCES (CID 0 without privilege).
        """
        size = sizes.size if listener.pending else negotiate(sizes, listener.sizes)
        if size is None:
            raise Refused(errno.EINVAL, f"no common buffer size: {sizes} and {listener.sizes}")
        party = context.party_of(owner.uid)
        if bound is None:
            if party.limits is not None and party.sockets >= party.limits.sockets:
                party.check_socket_limit()
            if not context.is_guest:
                policy.require_service(context, owner)
            local = (context.cid, context.connected.next_ephemeral())
        else:
            _require_scope(listener.context, bound)
            local = bound.address
            self.unbind(bound)
        number = self.last_number % LAST_CONNECTION + 1
        while number in self.connections:
            number = number % LAST_CONNECTION + 1
        self.last_number = number
        peer = (listener.context.cid, listener.port)
        connection = Connection(
            number, context, listener, local, peer, size, sizes, owner, party, cookie
        )
        context.connected[local[1]] = connection
        party.sockets += 1
        self.connections[number] = connection
        if not listener.pending:
            context.counts.connects += 1
            listener.context.counts.accepts += 1
        if cookie:
            context.cookies.setdefault(cookie, connection)
        return connection

    def complete_pending(self, guest: Context, port: int, peer: tuple[int, int], size: int) -> bool:
        """Complete a pending connection from ``peer`` to ``port`` of a guest.

        ``size`` is the negotiated buffer size in bytes; 0 refuses the connection.  Return whether
        the connection was pending.
        """
        # A socket bound to the local CID has peers in its own context only.
        context = guest if peer[0] == VMADDR_CID_LOCAL else self.contexts.get(peer[0])
        connection = context.connected.get(peer[1]) if context is not None else None
        if not isinstance(connection, Connection) or connection.listener.context is not guest:
            return False
        if not connection.listener.pending or connection.peer != (guest.cid, port):
            return False
        connection.listener.pending = False
        connection.size = size
        if size:
            connection.context.counts.connects += 1
            guest.counts.accepts += 1
        else:
            connection.context.counts.refusals += 1
            self.end(connection.number)
        return True

    def end(self, number: int) -> None:
        """Remove a connection and release its port.  Does nothing if it was already removed."""
        connection = self.connections.pop(number, None)
        if connection is not None:
            if self.ended is not None:
                self.ended.append(number)
            context, port, cookie = connection.context, connection.local[1], connection.cookie
            if context.connected.get(port) is connection:
                del context.connected[port]
                connection.party.sockets -= 1
            if context.cookies.get(cookie) is connection:
                del context.cookies[cookie]

    def find_connection(self, one: tuple[int, int], other: tuple[int, int]) -> Connection:
        """Return the connection between two addresses, in either order.

        Raises Refused with ENOENT when it does not exist.
        """
        for local, peer in ((one, other), (other, one)):
            # A socket bound to the local CID has peers in its own context only.
            context = self.contexts.get(peer[0] if local[0] == VMADDR_CID_LOCAL else local[0])
            holder = context.connected.get(local[1]) if context is not None else None
            if isinstance(holder, Connection) and (holder.local, holder.peer) == (local, peer):
                return holder
        raise Refused(errno.ENOENT, _NO_STREAM.format(*one, *other))

    # Datagrams

    def find_datagram(
        self,
        context: Context,
        cid: int,
        port: int,
        program: Program,
        source: Endpoint | None = None,
    ) -> Endpoint:
        """Return the datagram endpoint that ``program``, in ``context``, reaches at an address.

        ``source`` is the sending socket's endpoint, if it has one yet.

        Raises Refused as :meth:`find_listener`, except ECONNREFUSED for a port without a socket;
        a source bound to the local CID reaches its own context only.
        """
        destination = self._destination(context, cid, port, False)
        endpoint = destination.datagrams.get(port)
        if endpoint is None and destination.device is not None:
            endpoint = destination.device.endpoint(destination, EndpointKind.DATAGRAM, port)
        if endpoint is None or not _in_scope(context, endpoint):
            raise Refused(errno.ECONNREFUSED, f"no datagram socket on {cid}:{port}")
        if source is not None:
            _require_scope(destination, source)
        if context is not destination:
            self._require_trust(context, endpoint, program, source)
        return endpoint

    # Both

    def _destination(self, context: Context, cid: int, port: int, connecting: bool) -> Context:
        # As Linux: a stream to VMADDR_CID_ANY has no transport, and a datagram to it stays in its
        # context.  No socket can listen on VMADDR_PORT_ANY, and no datagram can be sent there.
        if connecting and cid == VMADDR_CID_ANY:
            raise Refused(errno.ENODEV, "VMADDR_CID_ANY is not a destination")
        if not connecting and port == VMADDR_PORT_ANY:
            raise Refused(errno.EINVAL, "VMADDR_PORT_ANY is not a destination")
        if cid in (VMADDR_CID_LOCAL, VMADDR_CID_ANY):
            cid = context.cid
        destination = self.contexts.get(cid)
        if destination is None or destination.state is _OFF:
            raise Refused(errno.EHOSTUNREACH, f"no context {cid}")
        policy.require_path(context, destination, connecting)
        return destination

    def _require_trust(
        self, context: Context, endpoint: Endpoint, program: Program, own: Endpoint | None
    ) -> None:
        """Raise Denied when an isolated guest and an endpoint not trusted for it would connect."""
        host = self.contexts.host
        if endpoint.context is host and context.isolation.profile is not _DEFAULT:
            assert endpoint.trust is not None
            policy.require_trust(context, endpoint.trust, endpoint.kind, True)
        elif context is host and endpoint.context.isolation.profile is not _DEFAULT:
            trust = own.trust if own is not None else None
            trust = trust or trust_of(program, endpoint.kind, self.settings)
            policy.require_trust(endpoint.context, trust, endpoint.kind, False)

    # Life cycle of virtual machines

    def change(self, context: Context, change: Change) -> list[Connection]:
        """Apply ``change`` to ``context``; return the connections that it ends.

        After power-off the caller unbinds the context's endpoints.

        Raises Refused with EINVAL when the change is not allowed: see :mod:`.life_cycle`.
        """
        life_cycle.apply(context, change)
        if change not in life_cycle.DROPS_CONNECTIONS:
            return []
        over = self.connections_of(context)
        for connection in over:
            self.end(connection.number)
        return over

    def connections_of(self, context: Context) -> list[Connection]:
        """Return the connections with one or both ends in ``context``."""
        return [
            connection
            for connection in self.connections.values()
            if context in (connection.context, connection.peer_context)
        ]


def _forget(context: Context, cookie: int, what: Endpoint | Connection) -> None:
    if context.cookies.get(cookie) is what:
        del context.cookies[cookie]


def _in_scope(context: Context, endpoint: Endpoint) -> bool:
    """Return whether ``endpoint`` is reachable from ``context``.

    An endpoint bound to VMADDR_CID_LOCAL is reachable from its own context only.
    """
    return endpoint.cid != VMADDR_CID_LOCAL or endpoint.context is context


def _require_scope(destination: Context, source: Endpoint) -> None:
    """Raise Refused when a socket bound to VMADDR_CID_LOCAL would reach another context.

    In the other context the socket's address would be mistaken for a local address.
    """
    if not _in_scope(destination, source):
        raise Refused(
            errno.EHOSTUNREACH, "a socket bound to the local CID reaches its own context only"
        )
