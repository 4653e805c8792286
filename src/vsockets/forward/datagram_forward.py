"""One forward of datagrams.

Each client address has a *flow*: a socket of its own towards the target, so that the target sees
its clients apart and answers find the way back.  What does not fit is dropped and counted, as
datagrams are.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket as stdlib
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any

from .._linux.descriptor_passing import guard
from ..attachment import ContextHandle, current
from ..eventloop.asyncio_server import DatagramEntrance
from ..limits import ACCEPTS_PER_TURN_MAX, MAX_DATAGRAM
from ..model.constants import AF_VSOCK, VMADDR_CID_LOCAL
from ..model.locator import Inet, Unix, Vsock
from ..protocol.vsockmon import Operation
from ..socket import socket
from ..state_folder import connect_to
from .dialer import Dialer
from .flows import FlowTable
from .limits import FORWARD_FLOW_PENDING_MAX
from .resolver import Found
from .rules import admits_peer
from .settings import Settings
from .throttled_log import caused_by, describe_source, log, party_of

if TYPE_CHECKING:
    from ..capture.recorder import Recorder
    from ..eventloop.listeners import Listener

#: Bytes that hold any datagram, of vSockets or of UDP.
_BUFFER = max(MAX_DATAGRAM, 65_536)


class Flow:
    """One client's datagrams to the target, and its answers."""

    def __init__(self, forward: DatagramForward, door: stdlib.socket, source: Any) -> None:
        self.source = source
        self.there = self.back = self.dropped = 0  #: datagrams
        self._forward = forward
        self._door = door
        self._loop = asyncio.get_running_loop()
        self._sock: stdlib.socket | None = None
        self._peer: tuple[int, int] | None = None  # of a vSockets target
        self._pending: deque[bytes] = deque()
        self._opening = self._loop.create_task(self._open(forward.settings))

    def send(self, data: bytes) -> None:
        """Towards the target."""
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
            self.there += 1
            self._record(data, there=True)
        except OSError:  # nobody there, its queue is full, or the datagram is too large for it
            self.dropped += 1

    def close(self) -> None:
        """Forget the client."""
        self._opening.cancel()
        if self._sock is not None:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()
            self._sock = None

    async def _open(self, settings: Settings) -> None:
        try:
            async with asyncio.timeout(settings.connect_timeout):
                self._sock = await self._connect(settings)
        except OSError as error:  # TimeoutError among them
            self._forward.lost(self, error)
            return
        self._loop.add_reader(self._sock.fileno(), self._answer, self._sock)
        while self._pending:
            self.send(self._pending.popleft())

    async def _connect(self, settings: Settings) -> stdlib.socket:
        match settings.target:
            case Vsock(cid, port):
                place = self._forward.context
                sock: stdlib.socket = guard(socket(type=stdlib.SOCK_DGRAM, context=place))
                self._peer = cid, port
            case Inet(host, port):
                resolver = self._forward.dialer.resolver
                party = party_of(self.source)
                found = await resolver.resolve(host, port, stdlib.SOCK_DGRAM, party)
                sock = _connected_to_any(found)
            case Unix(path):
                sock = guard(stdlib.socket(stdlib.AF_UNIX, stdlib.SOCK_DGRAM))
                with _closed_on_failure(sock):
                    sock.bind("")  # a name of the kernel's choice, for answers to come to
                    if path.startswith("@"):
                        sock.connect("\0" + path[1:])
                    else:
                        connect_to(sock.connect, path)
            case _:
                raise AssertionError(f"{settings.target} has no datagrams")
        sock.setblocking(False)
        return sock

    def _record(self, data: bytes, there: bool) -> None:
        if self._forward.recorder is None or self._sock is None:
            return
        if self._door.family == AF_VSOCK:
            ends = self.source, self._door.getsockname()
        elif self._peer is not None:
            ends = self._sock.getsockname(), self._peer
        else:
            return
        self._forward.recorder.record(Operation.PAYLOAD, *(ends if there else ends[::-1]), data)

    def _answer(self, sock: stdlib.socket) -> None:
        for _ in range(ACCEPTS_PER_TURN_MAX):
            try:
                data, source = sock.recvfrom(_BUFFER)
            except OSError:  # nothing more, or an earlier datagram did not arrive
                return
            if self._peer is not None and not self._forward.is_target(source, self._peer):
                continue  # a stranger's
            self._forward.used(self.source)
            try:
                self._door.sendto(data, self.source)
                self.back += 1
                self._record(data, there=False)
            except (OSError, TypeError):  # TypeError: a client without an address
                self.dropped += 1


class DatagramForward:
    """Serves one forward of datagrams in the running asyncio loop; as StreamForward."""

    failure: OSError | None = None

    def __init__(
        self,
        settings: Settings,
        door: Listener,
        dialer: Dialer,
        context: ContextHandle | None,
        reopen: Callable[[Settings], Listener],
        recorder: Recorder | None = None,
    ) -> None:
        """Raises OSError."""
        self.settings = settings
        self.dialer = dialer
        self.context = context
        self.recorder = recorder
        self._loop = asyncio.get_running_loop()
        self._flows: FlowTable[Flow] = FlowTable(settings.max_connections, settings.flow_idle)
        self._timer: asyncio.TimerHandle | None = None
        self._finished = asyncio.Event()
        self._entrance: DatagramEntrance | None = DatagramEntrance(
            settings.source,
            door,
            self._receive,
            reopen=lambda: reopen(self.settings),
            context=context,
            log=log,
            target=settings.target,
            lost=self._end_flows,
        )

    @property
    def door(self) -> Listener | None:
        """Where clients come to; None when nobody can any more."""
        return self._entrance.door if self._entrance is not None else None

    @property
    def connections(self) -> int:
        """How many clients are remembered."""
        return len(self._flows)

    async def finished(self) -> None:
        """Return when the door is closed: datagrams have no end to wait for."""
        await self._finished.wait()

    def close_door(self) -> None:
        """End everything."""
        if self._entrance is not None:
            self._entrance.close()
            self._entrance = None
        self._end_flows()
        if self._timer is not None:
            self._timer.cancel()
        self._finished.set()

    close = close_door

    def used(self, source: Hashable) -> None:
        """An answer came for ``source``."""
        self._flows.use(source, self._loop.time())

    def lost(self, flow: Flow, error: OSError) -> None:
        """The target of ``flow`` could not be reached."""
        self._flows.remove(flow.source)
        why = error.strerror or "no answer in time"
        log.warning("%s: %s", self.settings, why, extra=caused_by(flow.source))

    def is_target(self, source: object, target: tuple[int, int]) -> bool:
        """Whether ``source``, a vSockets address, is ``target``, which may be spelled as local."""
        cid, port = target
        own = (self.context or current()).cid if cid == VMADDR_CID_LOCAL else cid
        return source in (target, (own, port))

    def _receive(self, door: stdlib.socket) -> None:
        for _ in range(ACCEPTS_PER_TURN_MAX):
            try:
                data, source = door.recvfrom(_BUFFER)
            except OSError:  # nothing more, or an earlier answer did not arrive
                return
            if door.family == AF_VSOCK and not admits_peer(self.settings.allow, source):
                who = describe_source(source)
                extra = caused_by(source)
                log.warning("%s: %s is not allowed", self.settings, who, extra=extra)
                continue
            now = self._loop.time()
            flow = self._flows.use(source, now)
            if flow is None:
                flow = Flow(self, door, source)
                self._flows.limit = self.settings.max_connections
                self._flows.idle = self.settings.flow_idle
                for gone in self._flows.add(source, flow, now):
                    self._end(gone)
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

    def _end(self, flow: Flow) -> None:
        flow.close()
        log.info(
            "%s: %s: %d datagrams there, %d back, %d dropped",
            *(self.settings, describe_source(flow.source), flow.there, flow.back, flow.dropped),
            extra=caused_by(flow.source),
        )


def _connected_to_any(found: Sequence[Found]) -> stdlib.socket:
    """Connect to the first address that there is a route to."""
    for number, (family, address) in enumerate(found, 1):
        sock = stdlib.socket(family, stdlib.SOCK_DGRAM)
        try:
            sock.connect(address)
        except OSError:
            sock.close()
            if number == len(found):
                raise
        else:
            return sock
    raise AssertionError("a name without an address")


@contextlib.contextmanager
def _closed_on_failure(sock: stdlib.socket) -> Any:
    try:
        yield
    except BaseException:
        sock.close()
        raise
