"""Datagrams over the fabric.

The program's descriptor is a unix datagram socket that receives all datagrams; only vsockd can
connect a socket to it.  For each destination vsockd gives the program a *route*, a socket that
sends there with the program's own address.  Routes are cached, so that only the first datagram to
a destination needs a request to vsockd.
"""

from __future__ import annotations

import _socket
import contextlib
import errno
import socket as stdlib
from socket import SOCK_DGRAM
from typing import Any, Self

from ..._linux.sockets import cookie_of
from ...limits import DATAGRAM_ROUTES_MAX, MAX_DATAGRAM
from ...model.address import check
from ...protocol import client, decode_source
from ...socket import MSG_ERRQUEUE, SOCKET_CLASSES, UNBOUND, error, socket
from .stream import FabricSocket

_raw = _socket.socket

#: The errors of a closed route: the receiver has closed, or vsockd has revoked the route.
_ROUTE_CLOSED = (ConnectionRefusedError, BrokenPipeError, ConnectionResetError)


class DatagramSocket(FabricSocket):
    """A datagram socket (guide chapter 4).

    A blocking send waits while the receiver's queue is full.  A non-blocking one raises OSError
    ENOBUFS: the descriptor cannot poll for room at one receiver.
    """

    _unknown_option = errno.EOPNOTSUPP
    # Shared and empty until the socket stores an entry in a dictionary of its own.
    _routes: dict[tuple[int, int], stdlib.socket] = {}  # noqa: RUF012
    _sources: dict[object, tuple[int, int]] = {}  # noqa: RUF012

    def bind(self, address: Any) -> None:
        """Bind to a local address; vsockd fills in wildcards (guide page 20).

        Raises OSError: EADDRINUSE, EADDRNOTAVAIL (another context's CID), EACCES (a port below 1024
        without CAP_NET_BIND_SERVICE), EINVAL (already bound).
        """
        address = check(address)
        if self._local != UNBOUND:
            raise error(errno.EINVAL, "the socket is bound")
        record, _ = self._fabric.request(client.bind_datagram(address), self.fileno())
        self._local = record.local

    def connect(self, address: Any) -> None:
        """Set the destination of send() to ``(cid, port)`` (guide page 22)."""
        self._peer = check(address)
        self._is_shut = False
        self._record = None
        if self._local == UNBOUND:
            self.bind(UNBOUND)

    def listen(self, backlog: int | None = None, /) -> None:
        """Raise OSError(EOPNOTSUPP): datagram sockets have no connections."""
        raise error(errno.EOPNOTSUPP)

    def accept(self) -> tuple[socket, tuple[int, int]]:
        """Raise OSError(EOPNOTSUPP): datagram sockets have no connections."""
        raise error(errno.EOPNOTSUPP)

    def shutdown(self, how: int, /) -> None:
        """Stop receiving (SHUT_RD, SHUT_RDWR), and forget the peer's address.

        As with Linux's AF_VSOCK, sendto() still works.  Raises OSError(ENOTCONN) without a peer.
        """
        if not stdlib.SHUT_RD <= how <= stdlib.SHUT_RDWR:
            raise error(errno.EINVAL)
        if self._peer is None and not self._is_shut:
            raise error(errno.ENOTCONN)
        _raw.shutdown(self, how)
        self._is_shut = True
        self._peer = None

    # Sending

    def sendto(self, data: Any, *arguments: Any) -> int:
        """Send a datagram: ``sendto(data, address)`` or ``sendto(data, flags, address)``.

        Raises OSError: EMSGSIZE (more than 69608 bytes), ECONNREFUSED (the port is not bound),
        EHOSTUNREACH (the context does not exist, or policy denies it), ENOBUFS (see the class).
        """
        address = arguments[-1]
        try:
            route = self._routes[address]
        except (KeyError, TypeError):
            address = check(address)
            route = self._routes.get(address) or self._new_route(address)
        if (len(data) if type(data) is bytes else memoryview(data).nbytes) > MAX_DATAGRAM:
            raise error(errno.EMSGSIZE, f"a datagram has at most {MAX_DATAGRAM} bytes")
        try:
            return route.send(data, *arguments[:-1])
        except BlockingIOError:
            raise error(errno.ENOBUFS, "the receiver's queue is full") from None
        except _ROUTE_CLOSED:
            route = self._new_route(address)
        # Another socket may have been bound to the address since.
        try:
            return route.send(data, *arguments[:-1])
        except BlockingIOError:
            raise error(errno.ENOBUFS, "the receiver's queue is full") from None

    def send(self, data: Any, flags: int = 0, /) -> int:
        """Send a datagram to the address set by connect().  Raises OSError(EINVAL) without one."""
        return self.sendto(data, flags, self._default_address(flags))

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        """Send a datagram as :meth:`send` does: a datagram is never sent in part."""
        self.send(data, flags)

    def sendmsg(
        self, buffers: Any, ancdata: Any = (), flags: int = 0, address: Any = None, /
    ) -> int:
        """Send one datagram from several buffers.  Ancillary data is ignored."""
        if address is None:
            address = self._default_address(flags)
        return self.sendto(b"".join(buffers), flags, address)

    def sendfile(self, file: Any, offset: int = 0, count: int | None = None) -> int:
        """Raise ValueError, as every datagram socket does."""
        raise ValueError("only SOCK_STREAM type sockets are supported")

    # Receiving

    def recvfrom(self, bufsize: int, flags: int = 0, /) -> tuple[bytes, Any]:
        """Return one datagram and its source, ``(cid, port)``, which a sender cannot forge."""
        if flags:
            _refuse_error_queue(flags)
        data, name = _raw.recvfrom(self, bufsize, flags)
        source = self._sources.get(name)
        return data, source or self._read_source(name)

    def recvfrom_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> tuple[int, Any]:
        """Receive one datagram into a buffer; return its size and its source."""
        _refuse_error_queue(flags)
        size, name = _raw.recvfrom_into(self, buffer, nbytes, flags)
        return size, self._read_source(name)

    def recvmsg(self, bufsize: int, ancbufsize: int = 0, flags: int = 0, /) -> Any:
        """Receive one datagram, as ``socket.recvmsg`` does, with the source's ``(cid, port)``."""
        _refuse_error_queue(flags)
        *received, name = _raw.recvmsg(self, bufsize, ancbufsize, flags)
        return (*received, self._read_source(name))

    def recvmsg_into(self, buffers: Any, ancbufsize: int = 0, flags: int = 0, /) -> Any:
        """Receive a datagram, as ``socket.recvmsg_into`` does, with its source ``(cid, port)``."""
        _refuse_error_queue(flags)
        *received, name = _raw.recvmsg_into(self, buffers, ancbufsize, flags)
        return (*received, self._read_source(name))

    # Options and life cycle

    def settimeout(self, value: float | None, /) -> None:
        """Set the timeout of this socket and its routes, in seconds."""
        super().settimeout(value)
        for route in self._routes.values():
            route.settimeout(value)

    def setblocking(self, flag: bool, /) -> None:
        """Make this socket and its routes blocking or not."""
        self.settimeout(None if flag else 0.0)

    def dup(self) -> Self:
        """Return another socket object for the same endpoint, with a duplicated descriptor."""
        twin = super().dup()
        twin._routes = {}
        twin._sources = {}
        return twin

    def detach(self) -> int:
        """Detach the descriptor, as ``socket.detach`` does, and close the routes."""
        self._close_routes()
        return super().detach()

    def _real_close(self, *arguments: Any) -> None:
        self._close_routes()
        super()._real_close(*arguments)  # type: ignore[misc]  # the hook of socket.close()

    def _set_vsock_option(self, optname: int, value: Any) -> None:
        # "Currently vSockets offers no options for datagram connections" (guide page 20).
        raise error(errno.EOPNOTSUPP, "datagram sockets have no vSockets options")

    # Implementation

    def _recover(self) -> None:
        with contextlib.suppress(OSError):
            self._local = self._fabric.request(client.query(cookie=cookie_of(self)))[0].local

    def _default_address(self, flags: int) -> tuple[int, int]:
        if self._peer is None:
            if flags & stdlib.MSG_OOB:
                raise error(errno.EOPNOTSUPP, "MSG_OOB is not supported")
            raise error(
                errno.EINVAL,
                "the destination is missing (connect() the socket, or give an address)",
            )
        return self._peer

    def _new_route(self, address: tuple[int, int]) -> stdlib.socket:
        """Return a new route to ``address``; close its previous route."""
        old = self._routes.pop(address, None)
        if old is not None:
            old.close()
        record, fd = self._fabric.request(client.route(address), self.fileno())
        if fd is None:
            raise client.missing_descriptor()
        route = stdlib.socket(stdlib.AF_UNIX, SOCK_DGRAM, 0, fd)
        route.settimeout(self.gettimeout())
        self._local = record.local
        if address == self._peer:
            self._record = record
        if len(self._routes) >= DATAGRAM_ROUTES_MAX:
            self._routes.pop(next(iter(self._routes))).close()
        if not self._routes:
            self._routes = {}
        self._routes[address] = route
        return route

    def _close_routes(self) -> None:
        for route in self._routes.values():
            route.close()
        self._routes = {}

    def _read_source(self, name: object) -> tuple[int, int] | None:
        source = self._sources.get(name)
        if source is None:
            source = decode_source(name)
            if not self._sources or len(self._sources) >= DATAGRAM_ROUTES_MAX:
                self._sources = {}
            if source is not None:
                self._sources[name] = source
        return source


def _refuse_error_queue(flags: int) -> None:
    if flags & MSG_ERRQUEUE:
        raise error(errno.EOPNOTSUPP, "datagram sockets have no error queue")


SOCKET_CLASSES["fabric"][SOCK_DGRAM] = DatagramSocket
