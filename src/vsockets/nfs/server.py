"""The NFS server's sockets: receive calls, answer those of each guest in turns, send replies."""

from __future__ import annotations

import asyncio
import contextlib
import socket as stdlib
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Any, NamedTuple

from ..attachment import ContextHandle
from ..eventloop.asyncio_server import DatagramReceiver, Listener, open_listener
from ..eventloop.service import run_service
from ..limits import MAX_DATAGRAM
from ..model.locator import Locator
from .calls import Pending
from .limits import NFS_DATAGRAMS_PER_TURN_MAX, NFS_GUEST_WAITING_CALLS_MAX, NFS_TURN_MAX_SECONDS
from .service import NfsService, log

_BUFFER = max(MAX_DATAGRAM, 65_536)


class _ReceivedCall(NamedTuple):
    """A datagram, with its source and the socket that received it."""

    sock: stdlib.socket
    data: bytes
    source: tuple[Any, ...]


class _Guest:
    """The queued and the pending calls of one guest."""

    def __init__(self) -> None:
        self.calls: deque[_ReceivedCall] = deque()
        self.pending: deque[tuple[_ReceivedCall, Pending]] = deque()


class NfsServer:
    """A server that answers calls at locators in the running asyncio loop, one at a time.

    Guests take turns.  A guest with more queued calls than clients usually send loses the newer
    ones; its clients retransmit them.
    """

    def __init__(
        self, service: NfsService, locators: Sequence[Locator], context: ContextHandle | None = None
    ) -> None:
        """Open a listener for each locator.

        Raises OSError if that fails.
        """
        self._receivers: list[DatagramReceiver] = []
        self._service = service
        self._loop = asyncio.get_running_loop()
        self._guests: OrderedDict[Hashable, _Guest] = OrderedDict()  # in the order of their turns
        self._turn: asyncio.Handle | None = None
        try:
            for locator in locators:
                self._listen(locator, context)
        except OSError:
            self.close()
            raise

    @property
    def listeners(self) -> list[Listener]:
        """The listeners, one for each locator."""
        return [receiver.listener for receiver in self._receivers]

    def close(self) -> None:
        """Close the listeners and drop all calls."""
        for receiver in self._receivers:
            receiver.close()
        self._receivers.clear()
        if self._turn is not None:
            self._turn.cancel()
        for guest in self._guests.values():
            guest.pending.clear()

    def _listen(self, locator: Locator, context: ContextHandle | None) -> None:
        listener = open_listener(locator, context)
        try:
            receiver = DatagramReceiver(
                locator,
                listener,
                self._receive,
                reopen=lambda: open_listener(locator, context),
                context=context,
                log=log,
            )
        except OSError:
            listener.close()
            raise
        self._receivers.append(receiver)

    def _receive(self, sock: stdlib.socket) -> None:
        for _ in range(NFS_DATAGRAMS_PER_TURN_MAX):
            try:
                data, source = sock.recvfrom(_BUFFER)
            except OSError:  # queue empty, or an error of an earlier reply
                break
            if not isinstance(source, tuple):
                continue  # a client without an address cannot be answered
            guest = self._guests.get(source[0])
            if guest is None:
                guest = self._guests[source[0]] = _Guest()
            if len(guest.calls) < NFS_GUEST_WAITING_CALLS_MAX:
                guest.calls.append(_ReceivedCall(sock, data, source))
        if self._turn is None:
            self._take_turn()

    def _take_turn(self) -> None:
        """Answer calls for a bounded time, and advance one pending call; guests take turns."""
        self._turn = None
        end = self._loop.time() + NFS_TURN_MAX_SECONDS
        stepped = False
        idle = 0  # consecutive guests without work
        while idle < len(self._guests) and self._loop.time() < end:
            name, guest = self._guests.popitem(last=False)
            self._guests[name] = guest
            idle += 1
            if guest.calls:
                call = guest.calls.popleft()
                self._send(guest, call, self._service.answer(call.data, call.source))
                idle = 0
            if guest.pending and not stepped:
                self._step(guest)
                stepped = True
                idle = 0
            if not (guest.calls or guest.pending):
                del self._guests[name]
        if self._guests:
            self._turn = self._loop.call_soon(self._take_turn)

    def _step(self, guest: _Guest) -> None:
        call, pending = guest.pending.popleft()
        error: OSError | None = None
        try:
            next(pending.steps)
        except StopIteration:
            pass
        except OSError as failure:
            error = failure
        else:
            guest.pending.append((call, pending))
            return
        self._send(guest, call, pending.finish(error))

    def _send(self, guest: _Guest, call: _ReceivedCall, reply: bytes | Pending | None) -> None:
        if isinstance(reply, Pending):
            guest.pending.append((call, reply))
        elif reply is not None:
            with contextlib.suppress(OSError):  # the client retransmits
                call.sock.sendto(reply, call.source)


async def serve(
    service: NfsService,
    locators: Sequence[Locator],
    context: ContextHandle | None,
    on_ready: Callable[[NfsServer], None],
    release: Callable[[], None] | None = None,
) -> None:
    """Serve until SIGTERM or SIGINT; call ``on_ready`` once clients can connect.

    ``release`` closes the service and its files, for a process that replaces this one.

    Raises OSError if a listener cannot be opened.
    """
    server = NfsServer(service, locators, context)

    def retire() -> Awaitable[object]:
        assert release is not None
        server.close()
        release()
        return asyncio.sleep(0)

    try:
        await run_service(lambda: on_ready(server), retire=retire if release else None)
    finally:
        server.close()
