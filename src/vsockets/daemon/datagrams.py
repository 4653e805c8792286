"""Datagram sockets: their addresses, and the routes between them.

A program's datagram socket is bound to a name in a folder that only vsockd can enter, and the name
is unlinked.  From then on only vsockd can connect to that socket.  To send, a program gets a
*route*: a socket that vsockd created, bound to a name that contains the sender's address, and
connected to the destination.  The receiver gets that name from the kernel with each datagram, so
the source address cannot be forged, and no datagram passes through vsockd.

vsockd keeps a duplicate of every route: by shutting it down, vsockd revokes the route, which is
required before the sender's port can be assigned to another socket.

The kernel does not report when a datagram socket is closed, so vsockd probes.  Each new socket
causes probes of three others of its party, which keeps the closed ones to half the number of open
ones.  A party at its limit, a timer, and a shortage of descriptors cause probes of all of them, as
deferred work (:mod:`.scheduling`).
"""

from __future__ import annotations

import _socket
import errno
import os
import secrets
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from socket import AF_UNIX, SHUT_RD, SHUT_RDWR, SOCK_DGRAM
from typing import Any, NamedTuple

from .._linux.inspection import unread_bytes
from .._linux.sockets import cookie_of, refuse_descriptors
from ..eventloop.loop import EventLoop
from ..fabric import Context, Denied, Endpoint, Fabric, Party, Refused, Rule
from ..limits import DATAGRAM_ROUTES_MAX
from ..protocol import encode_source
from .datagram_epochs import end_sockets, is_other_epoch, socket_name
from .handover import Reader, Saved, Writer
from .journal import Journal
from .limits import (
    DAEMON_PROBES_PER_BIND,
    DAEMON_PROBES_PER_STEP,
    DAEMON_SWEEP_FIRST_SECONDS,
    DAEMON_SWEEP_LONGEST_SECONDS,
    DATAGRAM_END_AT_ONCE_SECONDS,
    DATAGRAM_QUOTA_CHECK_SECONDS,
)
from .named_sockets import NamedSocket, bind_to_name
from .scheduling import DeferredWork, run_for

#: Routes to measure in one step (some 50 microseconds); and for each new route, of the youngest and
#: of the oldest ones.
_ROUTES_PER_STEP = 64
_YOUNGEST = 4
_OLDEST = 8


def _route_bytes_max() -> int:
    """Return the limit of a socket's unread bytes, as the kernel accounts them: twice wmem_max."""
    try:
        return 2 * int(Path("/proc/sys/net/core/wmem_max").read_text())
    except (OSError, ValueError):
        return 2 * 212_992


_ROUTE_BYTES_MAX = _route_bytes_max()


@dataclass(slots=True, eq=False)
class DatagramSocket(NamedSocket):
    """A program's datagram socket, which vsockd reaches by name and does not have open."""

    quota: DatagramQuota  #: of the party that the socket belongs to
    #: the routes from this socket, by destination
    routes: dict[tuple[int, int], Route] = field(default_factory=dict)

    def close(self) -> None:
        """Revoke every route from this socket, and close the path to it."""
        for route in list(self.routes.values()):
            route.revoke()
        self.quota.before_close(self)
        NamedSocket.close(self)


class Route:
    """A connected socket, over which a program sends from its datagram socket to one address."""

    __slots__ = ("destination", "inbound", "queued", "sender", "sock")

    def __init__(
        self,
        sock: _socket.socket,
        sender: DatagramSocket,
        destination: tuple[int, int],
        inbound: dict[Route, None],
    ) -> None:
        """Add the route to ``inbound``, the routes to the destination's context."""
        self.sock = sock
        self.sender = sender
        self.destination = destination
        self.inbound = inbound
        self.queued = 0  #: unread bytes at the last measurement
        inbound[self] = None
        sender.routes[destination] = self
        sender.quota.add(self)

    def revoke(self) -> None:
        """Prevent every process from sending over the route, once; then do nothing."""
        if self.inbound.pop(self, self) is None:
            del self.sender.routes[self.destination]
            self.sender.quota.revoke(self)


class DatagramQuota:
    """The routes of one party and their unread bytes.

    The kernel reports how many bytes sent over a route are unread.  Unread bytes are memory of the
    host's kernel, which a guest may fill.  The last reported value is kept with each route, and
    their sum with the party, so the cost of a new route does not depend on the number of routes.
    """

    def __init__(
        self,
        party: Party,
        limited: bool,
        before_close: Callable[[DatagramSocket | Route], None],
    ) -> None:
        """Start without routes; limit unread bytes if ``limited`` is True (for a guest).

        ``before_close`` is called with each route, and each socket, before its descriptor is
        closed.
        """
        self.before_close = before_close
        self._party = party
        self._limited = limited
        self._routes: dict[Route, None] = {}  # the oldest first
        #: revoked routes with unread bytes
        self._draining: set[Route] = set()
        #: routes with unread bytes at the last measurement, the one measured longest ago first
        self._unread: dict[Route, None] = {}
        self._queued = 0  # sum of the last measured values

    def __bool__(self) -> bool:
        return bool(self._routes or self._draining)

    @property
    def routes(self) -> list[Route]:
        """The routes that are not revoked, the oldest first."""
        return list(self._routes)

    @property
    def draining(self) -> list[Route]:
        """Revoked routes with unread bytes."""
        return list(self._draining)

    def drain(self, sock: _socket.socket) -> None:
        """Count the unread datagrams of ``sock``, a route that an earlier vsockd has revoked."""
        Route(sock, DatagramSocket("", -1, self), (0, 0), {}).revoke()

    @property
    def needs_watching(self) -> bool:
        """True if the routes together can hold more unread bytes than the party's limit."""
        return self._limited and self._party.routes * _ROUTE_BYTES_MAX > self._limit

    @property
    def _limit(self) -> int:
        assert self._party.limits is not None
        return self._party.limits.datagram_bytes

    def require_space(self) -> None:
        """Raise Denied when the party has reached its limit of unread bytes."""
        if not self.needs_watching:
            return
        # A program that fills one route after the other has just filled the youngest ones; for
        # the others see :meth:`measure`.
        for route in list(islice(reversed(self._routes), _YOUNGEST)):
            self._measure(route)
        if self._queued > self._limit:
            self.reclaim()
        if self._queued > self._limit:
            reason = f"{self._party.name} has {self._queued} bytes of unread datagrams"
            raise Denied(errno.ENOBUFS, Rule.DATAGRAM_BYTES, reason)

    def add(self, route: Route) -> None:
        """Count ``route`` as one of the party's from now on."""
        self._routes[route] = None
        self._party.routes += 1

    def revoke(self, route: Route) -> None:
        """Shut ``route`` down; it is counted until its datagrams are read."""
        route.sock.shutdown(SHUT_RDWR)
        del self._routes[route]
        self._draining.add(route)
        if self._limited:
            self._measure(route)
        else:
            self._close(route)

    def revoke_all(self) -> None:
        """Revoke every route."""
        for route in list(self._routes):
            route.revoke()

    def evict_oldest(self) -> None:
        """Close one of the oldest routes, to make space for another one.

        The program requests the route again when it needs the route.  A route with unread bytes is
        not closed: only vsockd's duplicate shows when they have been read.
        """
        self.reclaim()
        for route in list(islice(self._routes, _OLDEST)):
            if not self._party.has_all_routes:
                return
            if self._limited and unread_bytes(route.sock.fileno()):
                self._routes[route] = self._routes.pop(route)  # the route is now among the youngest
            else:
                route.revoke()

    def queued(self) -> int:
        """Return the unread bytes, as the kernel accounts them: more than the payload."""
        for _ in self.measure():
            pass
        return self._queued

    def measure(self) -> Iterator[None]:
        """Measure every route, in steps."""
        for number, route in enumerate([*self._routes, *self._draining]):
            self._measure(route)
            if number % _ROUTES_PER_STEP == _ROUTES_PER_STEP - 1:
                yield

    def revoke_unread(self) -> Iterator[None]:
        """Revoke every route with unread bytes, in steps."""
        for number, route in enumerate(list(self._unread)):
            route.revoke()
            if number % _ROUTES_PER_STEP == _ROUTES_PER_STEP - 1:
                yield

    @property
    def exceeds(self) -> bool:
        """True if the last measured values exceed the party's limit."""
        return self._limited and self._queued > self._limit

    def reclaim(self) -> None:
        """Measure some of the routes with unread bytes: programs may have read these meanwhile."""
        for route in list(islice(self._unread, _ROUTES_PER_STEP)):
            self._measure(route)

    def close(self) -> None:
        """Revoke and close all routes of a party that is removed."""
        self.revoke_all()
        for route in list(self._draining):
            self._close(route)

    def _measure(self, route: Route) -> None:
        if route.sock.fileno() < 0:
            return  # the route was closed since the previous step
        queued = unread_bytes(route.sock.fileno())
        self._queued += queued - route.queued
        route.queued = queued
        self._unread.pop(route, None)
        if queued:
            self._unread[route] = None
        elif route in self._draining:
            self._close(route)

    def _close(self, route: Route) -> None:
        self._queued -= route.queued
        self._routes.pop(route, None)
        self._draining.discard(route)
        self._unread.pop(route, None)
        self._party.routes -= 1
        self.before_close(route)
        route.sock.close()


@dataclass(slots=True, eq=False)
class _Share:
    """The datagram sockets and routes of one party."""

    context: Context
    party: Party
    quota: DatagramQuota
    #: the party's sockets, the one probed longest ago first
    sockets: dict[Endpoint, None] = field(default_factory=dict)


class Traffic(NamedTuple):
    """Bytes of unread datagrams by address, as the kernel accounts them.

    The kernel's numbers are slightly larger than the payload.
    """

    by_sender: Counter[tuple[int, int]]  #: sent from the address
    by_receiver: Counter[tuple[int, int]]  #: sent to the address


class Datagrams:
    """All datagram sockets of the fabric, and the routes between them.

    The current directory must be the folder that only vsockd can enter.
    """

    def __init__(self, loop: EventLoop, fabric: Fabric, deferred: DeferredWork) -> None:
        #: part of the name of each socket bound by this vsockd
        self.epoch = f"{secrets.randbits(64):016x}"
        self._loop = loop
        self._fabric = fabric
        self._deferred = deferred
        self._shares: dict[Party, _Share] = {}
        self._inbound: dict[Context, dict[Route, None]] = {}
        #: parties whose routes can hold more unread bytes than their limit
        self._watched: set[Party] = set()
        self._by_cookie: dict[int, Endpoint] = {}
        self._sweep_delay: float | None = None  # None: no timer is set
        self._names = count(1)
        self._journal: Journal | None = None

    def __len__(self) -> int:
        return len(self._by_cookie)

    def save(self, writer: Writer) -> Saved:
        """Return the state of all sockets and routes; call it after the links are saved."""
        contexts = {id(routes): context.cid for context, routes in self._inbound.items()}
        sockets: dict[int | None, int] = {}
        routes: dict[int, Any] = {}
        draining: dict[int, Any] = {}
        shares = {share.quota: share for share in self._shares.values()}
        for share in shares.values():
            for endpoint in share.sockets:
                sockets[writer.endpoint(endpoint)] = writer.receiver(_socket_of(endpoint))
            for route in share.quota.routes:
                number = writer.descriptor(route.sock.fileno())
                routes[number] = self._save_route(writer, route, contexts[id(route.inbound)])
            for route in share.quota.draining:
                number = writer.descriptor(route.sock.fileno())
                draining[number] = _save_share(writer, share)
        receivers = {
            number: _save_receiver(writer, receiver, shares[receiver.quota])
            for receiver, number in writer.receivers.items()
        }
        return {
            "epoch": self.epoch,
            "names": next(self._names),
            "receivers": receivers,
            "sockets": sockets,
            "routes": routes,
            "draining": draining,
        }

    @staticmethod
    def _save_route(writer: Writer, route: Route, cid: int) -> tuple[int, tuple[int, int], int]:
        return writer.receiver(route.sender), route.destination, cid

    def restore(self, reader: Reader, saved: Saved) -> None:
        """Add the sockets and routes that the previous vsockd has saved."""
        self.epoch, self._names = saved["epoch"], count(saved["names"])
        for number, (name, node, cid, party) in saved["receivers"].items():
            share = self._share(reader.party(party), reader.context(cid))
            receiver = DatagramSocket(name, reader.descriptors[node], share.quota)
            reader.receivers[number] = receiver
        for number, at in saved["sockets"].items():
            endpoint = reader.endpoints[number]
            assert endpoint.party is not None
            endpoint.handle = reader.receivers[at]
            self._by_cookie[endpoint.cookie] = endpoint
            self._share(endpoint.party, endpoint.context).sockets[endpoint] = None
        for number, (cid, party) in saved["draining"].items():
            share = self._share(reader.party(party), reader.context(cid))
            share.quota.drain(reader.socket(number, SOCK_DGRAM))
        for number, (sender, destination, cid) in saved["routes"].items():
            inbound = self._inbound.setdefault(reader.context(cid), {})
            sock = reader.socket(number, SOCK_DGRAM)
            Route(sock, reader.receivers[sender], destination, inbound)
        for party in list(self._shares):
            self._watch_quota(party)
        if self._shares:
            self._sweep_later()

    def keep_journal(self, journal: Journal) -> None:
        """Record in ``journal`` all changes from now on."""
        self._journal = journal

    def _before_close(self, closed: DatagramSocket | Route) -> None:
        """Record that the descriptor of a socket or route is closed, and may be reused."""
        journal = self._journal
        if journal is None:
            return
        if isinstance(closed, Route):
            for table in ("routes", "draining"):
                journal.row(table, closed.sock.fileno(), None)
        else:
            number = journal.writer.receivers.pop(closed, None)
            if number is not None:
                journal.row("receivers", number, None)
        journal.commit()

    def _record_receiver(self, receiver: DatagramSocket, share: _Share) -> None:
        if self._journal is not None:
            writer = self._journal.writer
            row = _save_receiver(writer, receiver, share)
            self._journal.row("receivers", writer.receiver(receiver), row)

    def adopt(self, endpoint: Endpoint, sock: _socket.socket) -> None:
        """Make ``sock`` the socket of ``endpoint``.

        Raises Refused with EINVAL if the socket is bound to a name already.
        """
        assert endpoint.party is not None
        share = self._share(endpoint.party, endpoint.context)
        self._probe(share, DAEMON_PROBES_PER_BIND)
        address = f"{endpoint.cid}.{endpoint.port}"
        endpoint.handle = self._name(sock, address, share.quota)
        endpoint.cookie = cookie_of(sock)
        endpoint.inode = os.fstat(sock.fileno()).st_ino
        self._by_cookie[endpoint.cookie] = endpoint
        share.sockets[endpoint] = None
        self._sweep_later()
        if self._journal is not None:
            writer = self._journal.writer
            self._record_receiver(endpoint.handle, share)
            self._journal.endpoint(endpoint)
            at = writer.receiver(endpoint.handle)
            self._journal.row("sockets", writer.number_of(endpoint), at)

    def catch_all(self, context: Context, sock: _socket.socket) -> DatagramSocket:
        """Return ``sock`` as the receiver of datagrams to all unbound ports of ``context``."""
        share = self._share(context.party_of(context.owner), context)
        receiver = self._name(sock, f"{context.cid}.all", share.quota)
        self._record_receiver(receiver, share)
        return receiver

    def find(self, context: Context, cookie: int) -> Endpoint | None:
        """Return the endpoint whose socket has this SO_COOKIE, if ``context`` has one."""
        endpoint = self._by_cookie.get(cookie)
        return endpoint if endpoint is not None and endpoint.context is context else None

    def find_socket(self, context: Context, sock: _socket.socket) -> Endpoint | None:
        """Return the endpoint of ``sock``, if it has one.

        Raises Refused with ENETDOWN for a socket of a vsockd that has ended.
        """
        endpoint = self.find(context, cookie_of(sock))
        if endpoint is None and is_other_epoch(sock.getsockname(), self.epoch):
            reason = "the datagram socket belongs to a vsockd that has ended: open another one"
            raise Refused(errno.ENETDOWN, reason)
        return endpoint

    def route(self, source: Endpoint, destination: Endpoint) -> Route:
        """Create a socket that sends from ``source`` to ``destination``.

        Raises Refused with ECONNREFUSED (the destination has just been closed) or ENOBUFS (a limit
        of the party, or a shortage).
        """
        sender = _socket_of(source)
        assert source.party is not None
        sender.quota.require_space()
        replaced = sender.routes.get(destination.address)
        if replaced is not None:
            replaced.revoke()
        if source.party.has_all_routes:
            sender.quota.evict_oldest()
            source.party.check_route_limit()
        sock = _socket.socket(AF_UNIX, SOCK_DGRAM)
        try:
            # With random bits, because all processes of a network namespace share abstract names:
            # other fabrics must not collide with these, and no process may take them first.
            port = destination.port if destination.pending else None
            sock.bind(encode_source(source.address, self.epoch, secrets.randbits(64), port))
            sock.shutdown(SHUT_RD)  # a process that learns the name cannot send to it
            _socket_of(destination).connect(sock)
        except OSError as error:
            sock.close()
            if error.errno != errno.ECONNREFUSED:
                raise
            if not destination.pending:
                self.release(destination)
            raise Refused(errno.ECONNREFUSED, "the datagram socket was just closed") from None
        if len(sender.routes) >= DATAGRAM_ROUTES_MAX:
            next(iter(sender.routes.values())).revoke()
        inbound = self._inbound.setdefault(destination.context, {})
        route = Route(sock, sender, destination.address, inbound)
        self._watch_quota(source.party)
        if self._journal is not None:
            row = self._save_route(self._journal.writer, route, destination.context.cid)
            self._journal.row("routes", sock.fileno(), row)
        return route

    def revoke_routes(self, context: Context) -> None:
        """Revoke every route to and from ``context``; programs must request each one again."""
        for route in list(self._inbound.get(context, ())):
            route.revoke()
        for share in self._shares_of(context):
            share.quota.revoke_all()

    def queued(self, context: Context) -> int:
        """Return the unread bytes sent by ``context``: see :meth:`.DatagramQuota.queued`."""
        return sum(share.quota.queued() for share in self._shares_of(context))

    # Limits

    def sweep_some(self, party: Party) -> None:
        """Release some sockets and routes that ``party`` has closed; defer the rest."""
        share = self._shares.get(party)
        if share is not None:
            share.quota.reclaim()
            self._probe(share, DAEMON_PROBES_PER_STEP)
            self._deferred.start(("datagram sockets", party), self._sweep(share))

    def start_sweep(self) -> None:
        """Release all sockets and routes that have been closed, as deferred work."""
        self._deferred.start("datagram sockets", self.sweep())

    def traffic(self) -> Traffic:
        """Return the unread bytes by sender and by receiver."""
        traffic = Traffic(Counter(), Counter())
        for endpoint in self._by_cookie.values():
            for destination, route in _socket_of(endpoint).routes.items():
                queued = unread_bytes(route.sock.fileno())
                traffic.by_sender[endpoint.address] += queued
                traffic.by_receiver[destination] += queued
        return traffic

    def close_context(self, context: Context) -> None:
        """Release every socket of ``context`` and all of its routes."""
        for endpoint in list(context.datagrams.values()):
            self.release(endpoint)
        self.revoke_routes(context)
        self._inbound.pop(context, None)
        for party in context.parties():
            share = self._shares.pop(party, None)
            if share is not None:
                share.quota.close()
            self._watched.discard(party)

    def close(self) -> bool:
        """End every datagram socket, and revoke every route, because vsockd stops.

        Return False if programs' sockets were not all found in time; no route leads to them then.
        """
        names: dict[int, str] = {}
        nodes: dict[int, int] = {}
        owners: set[int] = set()
        for endpoint in self._by_cookie.values():
            found = _socket_of(endpoint)
            names[endpoint.inode] = found.name
            nodes[endpoint.inode] = found.node
            owners.add(endpoint.owner.pid)
            for route in list(found.routes.values()):
                route.revoke()
        return run_for(end_sockets(names, nodes, owners), DATAGRAM_END_AT_ONCE_SECONDS)

    def sweep(self) -> Iterator[None]:
        """Release every socket that has been closed, in steps."""
        for share in list(self._shares.values()):
            yield from self._sweep(share)

    def is_open(self, endpoint: Endpoint) -> bool:
        """Return whether a program has the socket of ``endpoint`` open; if not, release it."""
        if _socket_of(endpoint).is_open():
            return True
        self.release(endpoint)
        return False

    def release(self, endpoint: Endpoint) -> None:
        """Release the port of a closed socket, and revoke its routes."""
        assert endpoint.party is not None
        del self._by_cookie[endpoint.cookie]
        share = self._shares.get(endpoint.party)
        if share is not None:
            del share.sockets[endpoint]
        self._fabric.unbind(endpoint)
        if self._journal is not None:
            self._journal.endpoint(endpoint)
            self._journal.row("sockets", self._journal.writer.number_of(endpoint), None)
        _socket_of(endpoint).close()

    def _sweep(self, share: _Share) -> Iterator[None]:
        """Release the closed sockets and routes of one party, in steps."""
        left = len(share.sockets)
        while left > 0:
            self._probe(share, min(left, DAEMON_PROBES_PER_STEP))
            left -= DAEMON_PROBES_PER_STEP
            yield
        yield from share.quota.measure()
        if not share.sockets and not share.quota:
            for party in share.context.parties():
                if self._shares.get(party) is share:
                    del self._shares[party]

    def _probe(self, share: _Share, number: int) -> None:
        """Probe ``number`` sockets of a party, those probed longest ago."""
        for endpoint in list(islice(share.sockets, number)):
            if self.is_open(endpoint):
                share.sockets[endpoint] = share.sockets.pop(endpoint)

    def _share(self, party: Party, context: Context) -> _Share:
        found = self._shares.get(party)
        if found is None:
            found = self._shares[party] = _Share(
                context, party, DatagramQuota(party, context.is_guest, self._before_close)
            )
        return found

    def _shares_of(self, context: Context) -> Iterator[_Share]:
        for party in context.parties():
            share = self._shares.get(party)
            if share is not None:
                yield share

    def _name(self, sock: _socket.socket, address: str, quota: DatagramQuota) -> DatagramSocket:
        refuse_descriptors(sock)
        name = socket_name(self.epoch, address, next(self._names))
        return DatagramSocket(*bind_to_name(sock, name), quota)

    # Timers

    def _sweep_later(self) -> None:
        """Probe all sockets some time after the last bind, even without further requests."""
        if self._sweep_delay is None:
            self._loop.call_later(DAEMON_SWEEP_FIRST_SECONDS, self._sweep_all)
        self._sweep_delay = DAEMON_SWEEP_FIRST_SECONDS

    def _sweep_all(self) -> None:
        assert self._sweep_delay is not None
        self.start_sweep()
        if self._shares:
            self._loop.call_later(self._sweep_delay, self._sweep_all)
            self._sweep_delay = min(2 * self._sweep_delay, DAEMON_SWEEP_LONGEST_SECONDS)
        else:
            self._sweep_delay = None

    def _watch_quota(self, party: Party) -> None:
        # Programs may fill a route at any time after its creation.
        if party not in self._watched and self._shares[party].quota.needs_watching:
            if not self._watched:
                self._loop.call_later(DATAGRAM_QUOTA_CHECK_SECONDS, self._enforce_all)
            self._watched.add(party)

    def _enforce_all(self) -> None:
        for party in list(self._watched):
            share = self._shares.get(party)
            if share is None or not share.quota.needs_watching:
                self._watched.discard(party)
            else:
                self._deferred.start(("datagram bytes", party), self._enforce(share))
        if self._watched:
            self._loop.call_later(DATAGRAM_QUOTA_CHECK_SECONDS, self._enforce_all)

    @staticmethod
    def _enforce(share: _Share) -> Iterator[None]:
        """Revoke the routes of a party with too many unread bytes, in steps."""
        yield from share.quota.measure()
        if share.quota.exceeds:
            share.context.counts.denials[Rule.DATAGRAM_BYTES] += 1
            yield from share.quota.revoke_unread()


def _save_share(writer: Writer, share: _Share) -> tuple[int, tuple[int, int] | None]:
    return share.context.cid, writer.party(share.party)


def _save_receiver(writer: Writer, receiver: DatagramSocket, share: _Share) -> tuple[Any, ...]:
    node = writer.descriptor(receiver.node)
    return (receiver.name, node, *_save_share(writer, share))


def _socket_of(endpoint: Endpoint) -> DatagramSocket:
    assert isinstance(endpoint.handle, DatagramSocket)
    return endpoint.handle
