"""Datagram sockets: whose they are, and the routes between them.

A program's datagram socket is bound here to a name in a folder only vsockd enters, and the
name is unlinked.  From then on nobody but vsockd can connect anything to that socket.  To
send, a program gets a *route*: a socket vsockd made, bound to a name that spells the sender's
address, and connected to the destination.  The receiver reads that name from the kernel with
each datagram, so the source it sees is the true one, and no datagram passes through vsockd.

vsockd keeps a duplicate of every route: shutting it down takes the route away from the
program, which a port needs before it can be given to somebody else.
"""

from __future__ import annotations

import _socket
import errno
import os
import secrets
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from socket import AF_UNIX, SHUT_RD, SOCK_DGRAM
from typing import NamedTuple

from ..fabric import Context, Endpoint, Fabric, Refused, Rule
from ..limits import DATAGRAM_ROUTES, OUTFLOW_WATCH
from ..wire import encode_source
from .lives import end_sockets, is_other_life, socket_name
from .loop import Loop
from .named import NamedSocket, bind_to_name, cookie_of
from .outflow import Outflow, queued_on


@dataclass(slots=True, eq=False)
class DatagramSocket(NamedSocket):
    """What vsockd holds of a program's datagram socket: not the socket, only ways to it."""

    outflow: Outflow  #: of its context
    routes: dict[tuple[int, int], _socket.socket] = field(default_factory=dict)

    def revoke(self, destination: tuple[int, int]) -> None:
        """Take back the route to ``destination``, if there is one."""
        route = self.routes.pop(destination, None)
        if route is not None:
            self.outflow.revoke(route)

    def close(self) -> None:
        """Take back every route from this socket."""
        for destination in list(self.routes):
            self.revoke(destination)
        NamedSocket.close(self)


class Traffic(NamedTuple):
    """Bytes of datagrams that were sent and not yet received, as the kernel counts: some more
    than the datagrams have.  By address.
    """

    of: Counter[tuple[int, int]]  #: the sender
    to: Counter[tuple[int, int]]  #: the receiver


class Datagrams:
    """All datagram sockets.  The current directory must be the folder only vsockd enters."""

    def __init__(self, loop: Loop, fabric: Fabric) -> None:
        #: part of the name of each socket bound here
        self.life = f"{secrets.randbits(64):016x}"
        self._loop = loop
        self._fabric = fabric
        self._outflows: dict[Context, Outflow] = {}
        self._watching = False
        self._by_cookie: dict[int, Endpoint] = {}
        self._unswept = 0
        self._names = count(1)

    def __len__(self) -> int:
        return len(self._by_cookie)

    def adopt(self, endpoint: Endpoint, sock: _socket.socket) -> None:
        """Make ``sock`` the socket of ``endpoint``; Refused with EINVAL if it has a name."""
        self._sweep_sometimes()
        endpoint.handle = self._name(sock, f"{endpoint.cid}.{endpoint.port}", endpoint.context)
        endpoint.cookie = cookie_of(sock)
        endpoint.inode = os.fstat(sock.fileno()).st_ino
        self._by_cookie[endpoint.cookie] = endpoint

    def catch_all(self, context: Context, sock: _socket.socket) -> DatagramSocket:
        """Ways to a socket that serves every port of ``context`` that has none of its own."""
        return self._name(sock, f"{context.cid}.all", context)

    def find(self, context: Context, cookie: int) -> Endpoint | None:
        """The endpoint of a socket of ``context``, by the kernel's cookie for it."""
        endpoint = self._by_cookie.get(cookie)
        return endpoint if endpoint is not None and endpoint.context is context else None

    def find_socket(self, context: Context, sock: _socket.socket) -> Endpoint | None:
        """Return the endpoint of ``sock``, if it has one.

        Refused with ENETDOWN for a socket of a vsockd that has ended.
        """
        endpoint = self.find(context, cookie_of(sock))
        if endpoint is None and is_other_life(sock.getsockname(), self.life):
            reason = "the datagram socket is of a vsockd that has ended: open another one"
            raise Refused(errno.ENETDOWN, reason)
        return endpoint

    def route(self, source: Endpoint, destination: Endpoint) -> _socket.socket:
        """A socket that sends from ``source`` to ``destination``; ours to keep.

        Refused with ECONNREFUSED (it has just gone) or ENOBUFS (the guest's limit).
        """
        sender = _socket_of(source)
        sender.outflow.require_space()
        sender.revoke(destination.address)
        route = _socket.socket(AF_UNIX, SOCK_DGRAM)
        try:
            # At random, because abstract names are everybody's in a network namespace: other
            # fabrics must not meet ours, and nobody may take our names before us.
            port = destination.port if destination.undecided else None
            route.bind(encode_source(source.address, self.life, secrets.randbits(64), port))
            route.shutdown(SHUT_RD)  # whoever learns the name sends nothing to it
            _socket_of(destination).connect(route)
        except OSError as error:
            route.close()
            if error.errno != errno.ECONNREFUSED:
                raise
            if not destination.undecided:
                self.release(destination)
            raise Refused(errno.ECONNREFUSED, "the datagram socket has just gone") from None
        if len(sender.routes) >= DATAGRAM_ROUTES:
            sender.revoke(next(iter(sender.routes)))
        sender.routes[destination.address] = route
        sender.outflow.add(route)
        self._watch_outflow(sender.outflow)
        return route

    def silence(self, context: Context) -> None:
        """Take back every route to and from ``context``: each must be asked for again."""
        for endpoint in self._by_cookie.values():
            sender = _socket_of(endpoint)
            for destination in list(sender.routes):
                if endpoint.context is context or destination[0] == context.cid:
                    sender.revoke(destination)

    def queued(self, context: Context) -> int:
        """The bytes that ``context`` has on their way: see :meth:`.Outflow.queued`."""
        outflow = self._outflows.get(context)
        return 0 if outflow is None else outflow.queued()

    def traffic(self) -> Traffic:
        """What is on its way, by who sent it and to whom."""
        traffic = Traffic(Counter(), Counter())
        for endpoint in self._by_cookie.values():
            for destination, route in _socket_of(endpoint).routes.items():
                queued = queued_on(route)
                traffic.of[endpoint.address] += queued
                traffic.to[destination] += queued
        return traffic

    def _outflow(self, context: Context) -> Outflow:
        """The routes from ``context``."""
        found = self._outflows.get(context)
        if found is None:
            found = self._outflows[context] = Outflow(context)
        return found

    def close_context(self, context: Context) -> None:
        """Release every socket of ``context``, and all that it has on its way."""
        for endpoint in list(context.datagrams.values()):
            self.release(endpoint)
        self.silence(context)
        outflow = self._outflows.pop(context, None)
        if outflow is not None:
            outflow.close()

    def close(self) -> None:
        """End every socket: vsockd ends, and its routes are not to outlive it."""
        names: dict[int, str] = {}
        nodes: dict[int, int] = {}
        owners: set[int] = set()
        for endpoint in self._by_cookie.values():
            found = _socket_of(endpoint)
            names[endpoint.inode] = found.name
            nodes[endpoint.inode] = found.node
            owners.add(endpoint.owner.pid)
            for destination in list(found.routes):
                found.revoke(destination)
        end_sockets(names, nodes, owners)

    def is_open(self, endpoint: Endpoint) -> bool:
        """Whether the program's socket is still there; if not, it is released."""
        if _socket_of(endpoint).is_open():
            return True
        self.release(endpoint)
        return False

    def release(self, endpoint: Endpoint) -> None:
        """The socket is gone: its port is free, and nothing can be sent from it."""
        del self._by_cookie[endpoint.cookie]
        _socket_of(endpoint).close()
        self._fabric.unbind(endpoint)

    def sweep(self) -> None:
        """Release every socket that is gone."""
        self._unswept = 0
        for endpoint in list(self._by_cookie.values()):
            self.is_open(endpoint)
        for outflow in self._outflows.values():
            outflow.settle()

    def _name(self, sock: _socket.socket, address: str, context: Context) -> DatagramSocket:
        name = socket_name(self.life, address, next(self._names))
        return DatagramSocket(name, bind_to_name(sock, name), self._outflow(context))

    def _watch_outflow(self, outflow: Outflow) -> None:
        # Routes may be filled after they were given out.
        if outflow.needs_watching and not self._watching:
            self._watching = True
            self._loop.call_later(OUTFLOW_WATCH, self._enforce)

    def _enforce(self) -> None:
        self._watching = False
        for context, outflow in self._outflows.items():
            if outflow.needs_watching:
                if outflow.enforce():
                    context.counts.denials[Rule.DATAGRAM_BYTES] += 1
                self._watch_outflow(outflow)

    def _sweep_sometimes(self) -> None:
        # The kernel does not say when a datagram socket is closed, so vsockd looks: as often
        # as the number of sockets has doubled, which makes it a constant cost for each.
        self._unswept += 1
        if self._unswept > len(self._by_cookie) // 2 + 16:
            self.sweep()


def _socket_of(endpoint: Endpoint) -> DatagramSocket:
    assert isinstance(endpoint.handle, DatagramSocket)
    return endpoint.handle
