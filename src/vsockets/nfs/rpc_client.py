"""An RPC client over datagrams that retransmits calls until they are answered."""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import socket as stdlib
from collections import deque
from typing import Any, NamedTuple

from .._linux.descriptor_passing import guard
from ..attachment import ContextHandle, current
from ..eventloop.rebind import Rebinder
from ..limits import ACCEPTS_PER_TURN_MAX, MAX_DATAGRAM
from ..model.constants import VMADDR_CID_LOCAL
from ..model.locator import Inet, Locator, Vsock
from ..socket import socket
from . import rpc
from .retransmission import RoundTripEstimator, Transmission, Window
from .rpc import Auth, CallHeader
from .xdr import XdrError

_BUFFER = max(MAX_DATAGRAM, 65_536)

#: Errors of a send that found a queue full.
_QUEUE_FULL_ERRORS = (errno.ENOBUFS, errno.EAGAIN)


class _PendingCall(NamedTuple):
    """A call in flight."""

    datagram: bytes
    transmission: Transmission
    reply: asyncio.Future[bytes]


class RpcClient:
    """Calls to one server, in the running asyncio loop."""

    def __init__(
        self, sock: stdlib.socket, server: tuple[Any, ...], context: ContextHandle | None = None
    ) -> None:
        """Take ownership of the datagram socket ``sock``.

        ``context`` is the socket's context, if it is a vSockets socket.

        Raises OSError if vsockd cannot be reached.
        """
        self._sock = sock
        self._server = server
        self._sources = {server}
        self._context = context
        if context is not None and server[0] == VMADDR_CID_LOCAL:
            self._sources.add((context.cid, server[1]))
        self._loop = asyncio.get_running_loop()
        self._xid = secrets.randbits(32)
        self._pending: dict[int, _PendingCall] = {}
        self._round_trips = RoundTripEstimator()
        self._window = Window()
        self._queue: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self.retransmissions = 0  #: number of retransmitted datagrams
        self.send_error = ""  #: the error of the last failed send; empty after a success
        self._rebinder: Rebinder | None = None
        if context is not None:
            self._rebinder = Rebinder(context, self._close_socket, self._reopen)
        self._start_receiving()

    @classmethod
    def connect(cls, locator: Locator, context: ContextHandle | None = None) -> RpcClient:
        """Return a client of the server at ``locator``, which is vsock-dgram: or udp:.

        Raises OSError if the socket cannot be made or the server's name is unknown.
        """
        match locator:
            case Vsock(cid, port, True):
                context = context or current()
                try:
                    sock = guard(socket(type=stdlib.SOCK_DGRAM, context=context))
                except OSError as error:
                    if error.errno != errno.ENODEV:
                        raise
                    problem = (
                        "no vSockets datagrams here: guests have them only with the vmci device"
                    )
                    raise OSError(error.errno, f"{locator}: {problem}") from None
                try:
                    return cls(sock, (cid, port), context)
                except OSError:
                    sock.close()
                    raise
            case Inet(host, port, True):
                (family, _, _, _, address), *_ = stdlib.getaddrinfo(
                    host, port, type=stdlib.SOCK_DGRAM
                )
                return cls(stdlib.socket(family, stdlib.SOCK_DGRAM), address)
        raise OSError(errno.EOPNOTSUPP, f"{locator}: expected vsock-dgram: or udp:")

    @property
    def address(self) -> tuple[Any, ...]:
        """The source address of the calls."""
        return self._sock.getsockname()  # type: ignore[no-any-return]

    def close(self) -> None:
        """Close the socket; calls in flight fail with ESHUTDOWN."""
        if self._rebinder is not None:
            self._rebinder.close()
        self._close_socket()
        if self._timer is not None:
            self._timer.cancel()
        for pending in self._pending.values():
            if not pending.reply.done():
                pending.reply.set_exception(OSError(errno.ESHUTDOWN, "client closed"))

    def _start_receiving(self) -> None:
        self._sock.setblocking(False)
        self._loop.add_reader(self._sock.fileno(), self._receive)

    def _close_socket(self) -> None:
        """Close the socket; after vsockd's end, calls in flight wait for :meth:`_reopen`."""
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()

    def _reopen(self) -> None:
        """Open the socket again after a restart of vsockd.

        The new socket is bound to the same port, by which the server recognises retransmitted
        calls.

        Raises OSError if vsockd does not serve.
        """
        own = self._sock.getsockname()
        sock = guard(socket(type=stdlib.SOCK_DGRAM, context=self._context))
        try:
            try:
                sock.bind(own)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
        except OSError:
            sock.close()
            raise
        self._sock = sock
        self._start_receiving()

    async def call(
        self, program: int, version: int, procedure: int, arguments: bytes, credentials: Auth
    ) -> memoryview:
        """Return the results of a call.

        Raises OSError: ETIMEDOUT without a reply, EPROTO for a malformed reply, EACCES if the
        server rejects the call.
        """
        while len(self._pending) >= self._window.size:
            turn = self._loop.create_future()
            self._queue.append(turn)
            await turn
        self._xid = self._xid + 1 & 0xFFFFFFFF
        xid = self._xid
        call = CallHeader(xid, rpc.VERSION, program, version, procedure, credentials, rpc.NO_AUTH)
        datagram = rpc.encode_call(call, arguments)
        transmission = Transmission(self._loop.time(), self._round_trips.timeout)
        pending = _PendingCall(datagram, transmission, self._loop.create_future())
        self._pending[xid] = pending
        try:
            self._send(pending)
            self._set_timer(transmission.due)
            return rpc.decode_reply(await pending.reply)
        except rpc.RpcRejected as refused:
            raise OSError(errno.EACCES, f"call rejected by the server: {refused}") from None
        except XdrError as error:
            raise OSError(errno.EPROTO, f"malformed reply from the server: {error}") from None
        finally:
            del self._pending[xid]
            self._wake_next()

    def _wake_next(self) -> None:
        """Wake the first caller that waits for room in the window."""
        while self._queue:
            turn = self._queue.popleft()
            if not turn.done():
                turn.set_result(None)
                return

    def _send(self, pending: _PendingCall) -> None:
        if self._sock.fileno() < 0:
            return  # vsockd has ended: retransmitted after its restart
        try:
            self._sock.sendto(pending.datagram, self._server)
            self.send_error = ""
        except OSError as error:  # no server now, or queues are full: retransmitted later
            if error.errno == errno.EMSGSIZE:
                raise
            self.send_error = error.strerror or str(error)
            if error.errno in _QUEUE_FULL_ERRORS:
                pending.transmission.revert_attempt(self._loop.time())

    def _receive(self) -> None:
        for _ in range(ACCEPTS_PER_TURN_MAX):
            try:
                data, source = self._sock.recvfrom(_BUFFER)
                xid = rpc.reply_xid(data)
            except OSError:  # queue empty, or an error of an earlier datagram
                return
            except XdrError:
                continue
            pending = self._pending.get(xid)
            if pending is None or source not in self._sources or pending.reply.done():
                continue  # duplicate reply, or from another source
            seconds = pending.transmission.round_trip(self._loop.time())
            if seconds is not None:
                self._round_trips.add_sample(seconds)
                self._window.on_reply()
            pending.reply.set_result(data)

    def _set_timer(self, due: float) -> None:
        """Check timeouts at ``due``; if an earlier timer exists, it sets the next one instead."""
        if self._timer is not None:
            if self._timer.when() <= due:
                return
            self._timer.cancel()
        self._timer = self._loop.call_at(due, self._retransmit)

    def _retransmit(self) -> None:
        self._timer = None
        now = self._loop.time()
        overdue = [
            pending
            for pending in self._pending.values()
            if not pending.reply.done() and pending.transmission.due <= now
        ]
        if overdue:
            self._window.on_loss()
        for pending in overdue:
            if pending.transmission.retry(now):
                self.retransmissions += 1
                self._send(pending)
            else:
                problem = os.strerror(errno.ETIMEDOUT)
                pending.reply.set_exception(TimeoutError(errno.ETIMEDOUT, problem))
        due = [w.transmission.due for w in self._pending.values() if not w.reply.done()]
        if due:
            self._set_timer(min(due))
