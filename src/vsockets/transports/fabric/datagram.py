"""Datagrams over the fabric.

The program's descriptor is a unix datagram socket on which everything arrives; nobody but
vsockd can connect anything to it.  For each destination vsockd gives the program a *route*, a
socket that sends there under the program's own address.  Routes are kept, so only the first
datagram to somebody asks vsockd anything.
"""

from __future__ import annotations

import _socket
import contextlib
import errno
import socket as stdlib
from socket import SOCK_DGRAM
from typing import Any, Self

from ...limits import DATAGRAM_ROUTES_MAX, MAX_DATAGRAM
from ...model.address import check
from ...protocol import client, decode_source
from ...socket import MSG_ERRQUEUE, SOCKET_CLASSES, UNBOUND, error, socket
from .context import FabricSocket

_raw = _socket.socket

#: What a route says when it is no longer one: the receiver has gone, or vsockd took it back.
_GONE = (ConnectionRefusedError, BrokenPipeError, ConnectionResetError)


class DatagramSocket(FabricSocket):
    """A datagram socket (guide chapter 4).

    A blocking send waits while the receiver's queue is full; a non-blocking one raises OSError
    ENOBUFS then, because the descriptor cannot tell when there is room at any one receiver.
    """

    _unknown_option = errno.EOPNOTSUPP
    # Empty until there is something to remember; then the socket has its own.
    _routes: dict[tuple[int, int], stdlib.socket] = {}  # noqa: RUF012
    _sources: dict[object, tuple[int, int]] = {}  # noqa: RUF012

    def bind(self, address: Any) -> None:
        """Take a local address; wildcards are filled in (guide page 20).

        OSError: EADDRINUSE, EADDRNOTAVAIL (another context's CID), EACCES (a port below 1024
        without CAP_NET_BIND_SERVICE), EINVAL (bound already).
        """
        address = check(address)
        if self._local != UNBOUND:
            raise error(errno.EINVAL, "the socket is bound")
        record, _ = self._fabric.ask(client.bind_datagram(address), self.fileno())
        self._local = record.local

    def connect(self, address: Any) -> None:
        """Let send() go to ``(cid, port)`` from now on (guide page 22)."""
        self._peer = check(address)
        self._is_shut = False
        self._record = None
        if self._local == UNBOUND:
            self.bind(UNBOUND)

    def connect_ex(self, address: Any) -> int:
        """As :meth:`connect`, but returns the errno instead of raising it."""
        try:
            self.connect(address)
        except OSError as failure:
            if failure.errno is None:
                raise
            return failure.errno
        return 0

    def listen(self, backlog: int | None = None, /) -> None:
        """OSError EOPNOTSUPP: datagram sockets have no connections."""
        raise error(errno.EOPNOTSUPP)

    def accept(self) -> tuple[socket, tuple[int, int]]:
        """OSError EOPNOTSUPP: datagram sockets have no connections."""
        raise error(errno.EOPNOTSUPP)

    def shutdown(self, how: int, /) -> None:
        """Stop receiving (SHUT_RD, SHUT_RDWR), and forget the peer.

        As with Linux's AF_VSOCK, sendto() still works.  OSError ENOTCONN without a peer.
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
        """``sendto(data, address)`` or ``sendto(data, flags, address)``.

        OSError: EMSGSIZE (more than 69608 bytes), ECONNREFUSED (nobody there), EHOSTUNREACH
        (no such context, or not for this one), ENOBUFS (see the class).
        """
        address = arguments[-1]
        try:
            route = self._routes[address]
        except (KeyError, TypeError):
            address = check(address)
            route = self._routes.get(address) or self._new_route(address)
        if (len(data) if type(data) is bytes else memoryview(data).nbytes) > MAX_DATAGRAM:
            raise error(errno.EMSGSIZE, f"a datagram holds {MAX_DATAGRAM} bytes")
        try:
            return route.send(data, *arguments[:-1])
        except BlockingIOError:
            raise error(errno.ENOBUFS, "the receiver's queue is full") from None
        except _GONE:
            route = self._new_route(address)
        # Somebody else has the address by now.
        try:
            return route.send(data, *arguments[:-1])
        except BlockingIOError:
            raise error(errno.ENOBUFS, "the receiver's queue is full") from None

    def send(self, data: Any, flags: int = 0, /) -> int:
        """Send to the address connect() was given; OSError EINVAL without one."""
        return self.sendto(data, flags, self._default_address(flags))

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        """As :meth:`send`: a datagram goes whole or not at all."""
        self.send(data, flags)

    def sendmsg(
        self, buffers: Any, ancdata: Any = (), flags: int = 0, address: Any = None, /
    ) -> int:
        """One datagram from several buffers.  Ancillary data does not cross contexts."""
        if address is None:
            address = self._default_address(flags)
        return self.sendto(b"".join(buffers), flags, address)

    def sendfile(self, file: Any, offset: int = 0, count: int | None = None) -> int:
        """ValueError, as for every datagram socket."""
        raise ValueError("only SOCK_STREAM type sockets are supported")

    # Receiving

    def recvfrom(self, bufsize: int, flags: int = 0, /) -> tuple[bytes, Any]:
        """One datagram and its source, ``(cid, port)``, which nobody can forge."""
        if flags:
            _refuse_error_queue(flags)
        data, name = _raw.recvfrom(self, bufsize, flags)
        source = self._sources.get(name)
        return data, source or self._read_source(name)

    def recvfrom_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> tuple[int, Any]:
        """As :meth:`recvfrom`, into a buffer."""
        _refuse_error_queue(flags)
        size, name = _raw.recvfrom_into(self, buffer, nbytes, flags)
        return size, self._read_source(name)

    def recvmsg(self, bufsize: int, ancbufsize: int = 0, flags: int = 0, /) -> Any:
        """As ``socket.recvmsg``, with the source's ``(cid, port)``."""
        _refuse_error_queue(flags)
        *received, name = _raw.recvmsg(self, bufsize, ancbufsize, flags)
        return (*received, self._read_source(name))

    def recvmsg_into(self, buffers: Any, ancbufsize: int = 0, flags: int = 0, /) -> Any:
        """As ``socket.recvmsg_into``, with the source's ``(cid, port)``."""
        _refuse_error_queue(flags)
        *received, name = _raw.recvmsg_into(self, buffers, ancbufsize, flags)
        return (*received, self._read_source(name))

    # Options and life

    def settimeout(self, value: float | None, /) -> None:
        """As ``socket.settimeout``."""
        super().settimeout(value)
        for route in self._routes.values():
            route.settimeout(value)

    def setblocking(self, flag: bool, /) -> None:
        """As ``socket.setblocking``."""
        self.settimeout(None if flag else 0.0)

    def dup(self) -> Self:
        """A second socket object, on a duplicate of the descriptor, for the same endpoint."""
        twin = super().dup()
        twin._routes = {}
        twin._sources = {}
        return twin

    def detach(self) -> int:
        """As ``socket.detach``; the routes are closed."""
        self._forget_routes()
        return super().detach()

    def _real_close(self, *arguments: Any) -> None:
        self._forget_routes()
        super()._real_close(*arguments)  # type: ignore[misc]  # the hook of socket.close()

    def _set_vsock_option(self, optname: int, value: Any) -> None:
        # "Currently vSockets offers no options for datagram connections" (guide page 20).
        raise error(errno.EOPNOTSUPP, "datagram sockets have no vSockets options")

    # How it is done

    def _recover(self) -> None:
        with contextlib.suppress(OSError):
            self._local = self._fabric.ask(client.query(cookie=self._cookie()))[0].local

    def _default_address(self, flags: int) -> tuple[int, int]:
        if self._peer is None:
            if flags & stdlib.MSG_OOB:
                raise error(errno.EOPNOTSUPP, "vSockets have no MSG_OOB")
            raise error(errno.EINVAL, "connect() the socket, or give an address")
        return self._peer

    def _new_route(self, address: tuple[int, int]) -> stdlib.socket:
        """Return a route to ``address``, in place of an old one if there is one."""
        old = self._routes.pop(address, None)
        if old is not None:
            old.close()
        record, fd = self._fabric.ask(client.route(address), self.fileno())
        route = stdlib.socket(stdlib.AF_UNIX, SOCK_DGRAM, 0, client.require_descriptor(fd))
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

    def _forget_routes(self) -> None:
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
