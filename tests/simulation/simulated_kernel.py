"""A simulated kernel: processes, and the unix sockets between them and vsockd.

As far as vsockd's decisions need it: queues of messages with descriptors, hang-ups that are noticed
later, and processes that can be killed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from by_the_guide import Machine, Program
from vsockets.fabric import (
    CAP_NET_ADMIN,
    Credentials,
    Endpoint,
    EndpointKind,
    Grant,
)


@dataclass(eq=False)
class SimulatedProcess:
    """A process with its rights, and the sockets that it holds."""

    pid: int
    uid: int
    machine: Machine
    capabilities: set[int]
    alive: bool = True
    channels: list[SimulatedChannel] = field(default_factory=list)
    accepted: list[SimulatedStream] = field(default_factory=list)

    @property
    def credentials(self) -> Credentials:
        return Credentials(self.pid, self.uid, self.uid)

    @property
    def program(self) -> Program:
        """The process as the guide sees it."""
        return Program(self.uid, CAP_NET_ADMIN in self.capabilities)

    def has_capability(self, capability: int) -> bool:
        return capability in self.capabilities

    def matches(self, grant: Grant) -> bool:
        return False


@dataclass(eq=False)
class SimulatedChannel:
    """A unix socket between a program and vsockd: both ends and both queues."""

    process: SimulatedProcess
    kind: EndpointKind
    cookie: int
    requests: deque[bytes] = field(default_factory=deque)
    #: messages for the program, each with a stream's descriptor or None
    replies: deque[tuple[bytes, SimulatedStream | None]] = field(default_factory=deque)
    is_open: bool = True  #: the program's end
    is_known: bool = True  #: vsockd has its end
    endpoint: Endpoint | None = None  #: vsockd's
    address: tuple[int, int] | None = None  #: as the program was told
    is_listening: bool = False
    awaits: str = ""  #: the request whose reply the program has not read
    stream: SimulatedStream | None = None
    backlog: int = 0
    program: Program | None = None  #: its process, at the time of the bind
    #: routes of a datagram socket: its name and destination, by destination address
    routes: dict[tuple[int, int], tuple[bytes, SimulatedChannel]] = field(default_factory=dict)
    #: unread datagrams: the name of the route, the true source, and its machine
    datagrams: deque[tuple[bytes, tuple[int, int], Machine]] = field(default_factory=deque)

    @property
    def machine(self) -> Machine:
        return self.process.machine

    def reply(self, data: bytes, stream: SimulatedStream | None = None) -> bool:
        """Queue a message for the program; return whether its end is open."""
        if self.is_open:
            self.replies.append((data, stream))
        elif stream is not None:
            stream.server_open = False
        return self.is_open

    def close(self) -> None:
        """Close the program's end; descriptors in its queue are closed with it."""
        self.is_open = False
        for _, stream in self.replies:
            if stream is not None:
                stream.server_open = False
        self.replies.clear()
        if self.stream is not None:
            self.stream.client_open = False


@dataclass(eq=False)
class SimulatedStream:
    """A unix socket pair, as its two programs see it."""

    number: int
    local: tuple[int, int]
    peer: tuple[int, int]
    client: SimulatedChannel
    client_machine: Machine
    server_machine: Machine
    client_open: bool = True
    server_open: bool = True
    is_broken: bool = False  #: disconnected by a change of a machine's state
    is_orphan: bool = False  #: its vsockd was killed
    #: the addresses as each side was told: local, peer
    client_told: tuple[tuple[int, int], tuple[int, int]] | None = None
    server_told: tuple[tuple[int, int], tuple[int, int]] | None = None

    @property
    def is_alive(self) -> bool:
        return self.client_open and self.server_open and not self.is_broken


class SimulatedLink:
    """A device's link to vsockd: DeviceStreams and DeviceDatagrams for the fabric."""

    def __init__(self, machine: Machine, process: SimulatedProcess) -> None:
        self.machine = machine
        self.process = process
        self.is_open = True
        #: handed-off connects for the device
        self.offers: deque[tuple[bytes, SimulatedStream]] = deque()
        #: reports for vsockd, each with a descriptor that comes back or None
        self.reports: deque[tuple[bytes, SimulatedStream | None]] = deque()
        self.held: list[SimulatedStream] = []  #: established, at the device
        #: vsockd's: connects without an outcome, by guest port and client address
        self.pending: dict[tuple[int, int, int], SimulatedStream] = {}
        self.on_close: Callable[[SimulatedLink], object] = lambda link: None

    def close(self) -> None:
        if self.is_open:
            self.is_open = False
            self.on_close(self)

    def hang_up(self) -> None:
        """Close every descriptor that the device, or a queue to or from it, holds."""
        for _, stream in [*self.offers, *self.reports]:
            if stream is not None:
                stream.server_open = False
        for stream in self.held:
            stream.server_open = False
        self.offers.clear()
        self.reports.clear()

    def refresh(self) -> None:
        """Ports of the host are not simulated."""

    def set_datagrams(self, datagrams: Any) -> None:
        """A guest's datagrams are not simulated."""

    def send_capture(self, fd: int, limit: int, port: int) -> None:
        """Captures are not simulated."""

    def send_buffer_size(self, own: tuple[int, int], peer: tuple[int, int], size: int) -> None:
        """Buffer sizes are not simulated."""
