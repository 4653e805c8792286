"""A forward of datagrams, with a flow for each client.

Each client address has a *flow*: a separate socket towards the target, so that the target can tell
its clients apart and answers reach the right one.  Datagrams without room are dropped and counted.
"""

from __future__ import annotations

import asyncio
import socket as stdlib
from collections import deque
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

from .._linux.descriptor_passing import guard
from .._linux.sockets import closed_on_failure, connect_to_any
from ..attachment import ContextHandle, current
from ..eventloop.asyncio_server import DatagramReceiver
from ..limits import ACCEPTS_PER_TURN_MAX, MAX_DATAGRAM
from ..model.constants import AF_VSOCK, VMADDR_CID_LOCAL
from ..model.locator import Inet, Unix, Vsock
from ..protocol.vsockmon import Operation
from ..socket import socket
from ..state_folder import connect_to
from .client import caused_by, describe_source, log, party_of
from .dialer import Dialer
from .fairness import FlowTable
from .limits import FORWARD_FLOW_PENDING_MAX
from .settings import Settings, admits_peer

if TYPE_CHECKING:
    from ..capture import Recorder
    from ..eventloop.asyncio_server import Listener

#: Size in bytes of the largest datagram of vSockets and UDP.
_BUFFER = max(MAX_DATAGRAM, 65_536)


class Flow:
    """The datagrams between one client and the target."""

    def __init__(self, forward: DatagramForward, listening: stdlib.socket, source: Any) -> None:
        self.source = source
        self.sent = self.received = self.dropped = 0  #: datagrams
        self._forward = forward
        self._listening = listening
        self._loop = asyncio.get_running_loop()
        self._sock: stdlib.socket | None = None
        self._peer: tuple[int, int] | None = None  # a vSockets target
        self._pending: deque[bytes] = deque()
        self._opening = self._loop.create_task(self._open(forward.settings))

    def send(self, data: bytes) -> None:
        """Send a datagram to the target; until the flow's socket is open, queue a few datagrams."""
        if self._sock is None:
            if len(self._pending) < FORWARD_FLOW_PENDING_MAX:
                self._pending.append(data)
            else:
                self.dropped += 1
            return
        try:
            if self._peer is not None:
                self._sock.sendto(data, self._peer)
            else:
                self._sock.send(data)
            self.sent += 1
            self._record(data, to_target=True)
        except OSError:  # no receiver, its queue is full, or the datagram is too large
            self.dropped += 1

    def close(self) -> None:
        """Close the flow's socket."""
        self._opening.cancel()
        if self._sock is not None:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()
            self._sock = None

    async def _open(self, settings: Settings) -> None:
        try:
            async with asyncio.timeout(settings.connect_timeout):
                self._sock = await self._connect(settings)
        except OSError as error:  # including TimeoutError
            self._forward.lost(self, error)
            return
        self._loop.add_reader(self._sock.fileno(), self._answer, self._sock)
        while self._pending:
            self.send(self._pending.popleft())

    async def _connect(self, settings: Settings) -> stdlib.socket:
        match settings.target:
            case Vsock(cid, port):
                context = self._forward.context
                sock: stdlib.socket = guard(socket(type=stdlib.SOCK_DGRAM, context=context))
                self._peer = cid, port
            case Inet(host, port):
                resolver = self._forward.dialer.resolver
                party = party_of(self.source)
                found = await resolver.resolve(host, port, stdlib.SOCK_DGRAM, party)
                sock = connect_to_any(stdlib.SOCK_DGRAM, found)
            case Unix(path):
                sock = guard(stdlib.socket(stdlib.AF_UNIX, stdlib.SOCK_DGRAM))
                with closed_on_failure(sock):
                    sock.bind("")  # a name that the kernel chooses, for the answers
                    if path.startswith("@"):
                        sock.connect("\0" + path[1:])
                    else:
                        connect_to(sock.connect, path)
            case _:
                raise AssertionError(f"{settings.target}: not a datagram address")
        sock.setblocking(False)
        return sock

    def _record(self, data: bytes, to_target: bool) -> None:
        if self._forward.recorder is None or self._sock is None:
            return
        if self._listening.family == AF_VSOCK:
            ends = self.source, self._listening.getsockname()
        elif self._peer is not None:
            ends = self._sock.getsockname(), self._peer
        else:
            return
        self._forward.recorder.record(Operation.PAYLOAD, *(ends if to_target else ends[::-1]), data)

    def _answer(self, sock: stdlib.socket) -> None:
        for _ in range(ACCEPTS_PER_TURN_MAX):
            try:
                data, source = sock.recvfrom(_BUFFER)
            except OSError:  # no further datagram, or an earlier one was refused
                return
            if self._peer is not None and not self._forward.is_target(source, self._peer):
                continue  # not from the target
            self._forward.used(self.source)
            try:
                self._listening.sendto(data, self.source)
                self.received += 1
                self._record(data, to_target=False)
            except (OSError, TypeError):  # TypeError: a client without an address
                self.dropped += 1


class DatagramForward:
    """A forward of datagrams in the running asyncio loop, with StreamForward's interface."""

    failure: OSError | None = None

    def __init__(
        self,
        settings: Settings,
        listener: Listener,
        dialer: Dialer,
        context: ContextHandle | None,
        reopen: Callable[[Settings], Listener],
        recorder: Recorder | None = None,
    ) -> None:
        """Start to receive from ``listener``.

        Raises OSError when vsockd cannot be reached.
        """
        self.settings = settings
        self.dialer = dialer
        self.context = context
        self.recorder = recorder
        self._loop = asyncio.get_running_loop()
        self._flows: FlowTable[Flow] = FlowTable(settings.max_connections, settings.flow_idle)
        self._timer: asyncio.TimerHandle | None = None
        self._retired = False
        self._finished = asyncio.Event()
        self._receiver: DatagramReceiver | None = DatagramReceiver(
            settings.source,
            listener,
            self._receive,
            reopen=lambda: reopen(self.settings),
            context=context,
            log=log,
            target=settings.target,
            lost=self._end_flows,
        )

    @property
    def listener(self) -> Listener | None:
        """The open listener; None once the forward is closed."""
        return self._receiver.listener if self._receiver is not None else None

    @property
    def connections(self) -> int:
        """The number of flows."""
        return len(self._flows)

    async def finished(self) -> None:
        """Wait until the forward is closed; datagrams have no end to wait for."""
        await self._finished.wait()

    def stop_listening(self) -> None:
        """Close the listener and all flows."""
        if self._receiver is not None:
            self._receiver.close()
            self._receiver = None
        self._end_flows()
        if self._timer is not None:
            self._timer.cancel()
        self._finished.set()

    close = stop_listening

    def retire(self) -> None:
        """Leave clients to another process; pass on replies of the flows until they are idle."""
        assert self._receiver is not None
        self._receiver.stop()
        self._retired = True
        self._end_when_idle()

    def _end_when_idle(self) -> None:
        if self._retired and not len(self._flows):
            self.stop_listening()

    def used(self, source: Hashable) -> None:
        """Mark the flow of ``source`` as used, because an answer arrived."""
        self._flows.use(source, self._loop.time())

    def lost(self, flow: Flow, error: OSError) -> None:
        """Remove ``flow``, whose target cannot be reached."""
        self._flows.remove(flow.source)
        why = error.strerror or "timed out"
        log.warning("%s: %s", self.settings, why, extra=caused_by(flow.source))
        self._end_when_idle()

    def is_target(self, source: object, target: tuple[int, int]) -> bool:
        """Return whether ``source`` is ``target``, whose CID may be VMADDR_CID_LOCAL."""
        cid, port = target
        own = (self.context or current()).cid if cid == VMADDR_CID_LOCAL else cid
        return source in (target, (own, port))

    def _receive(self, listening: stdlib.socket) -> None:
        for _ in range(ACCEPTS_PER_TURN_MAX):
            try:
                data, source = listening.recvfrom(_BUFFER)
            except OSError:  # no further datagram, or an earlier answer was refused
                return
            if listening.family == AF_VSOCK and not admits_peer(self.settings.allow, source):
                who = describe_source(source)
                extra = caused_by(source)
                log.warning("%s: %s is not allowed", self.settings, who, extra=extra)
                continue
            now = self._loop.time()
            flow = self._flows.use(source, now)
            if flow is None:
                flow = Flow(self, listening, source)
                self._flows.limit = self.settings.max_connections
                self._flows.idle = self.settings.flow_idle
                for removed in self._flows.add(source, flow, now):
                    self._end(removed)
                self._watch()
            flow.send(data)

    def _end_flows(self) -> None:
        for flow in self._flows.clear():
            self._end(flow)

    def _watch(self) -> None:
        due = self._flows.next_overdue()
        if self._timer is None and due is not None:
            self._timer = self._loop.call_at(due, self._forget_overdue)

    def _forget_overdue(self) -> None:
        self._timer = None
        for flow in self._flows.overdue(self._loop.time()):
            self._end(flow)
        self._watch()
        self._end_when_idle()

    def _end(self, flow: Flow) -> None:
        flow.close()
        log.info(
            "%s: %s: %d datagrams sent, %d received, %d dropped",
            *(self.settings, describe_source(flow.source), flow.sent, flow.received, flow.dropped),
            extra=caused_by(flow.source),
        )
