"""Parts of :mod:`.broker_world`: played processes, clients and devices; vsockd's surroundings."""

from __future__ import annotations

import logging
import os
import socket
from dataclasses import dataclass, field
from typing import Any, ClassVar

from vsockets.daemon.broker import Broker
from vsockets.daemon.channel import PEEK, READ, Channel
from vsockets.fabric import Context, Denied, EndpointKind, Grant
from vsockets.protocol import REQUEST_SIZE, client

FILLED_MAX = 1024  #: some programs begin with a descriptor of a far higher number


@dataclass(eq=False)
class Process:
    """A process with its rights and sockets."""

    pid: int
    uid: int
    cid: int
    capabilities: set[int]
    sockets: list[Client] = field(default_factory=list)


class ProgramChannel(Channel):
    """A channel whose client's rights are simulated."""

    processes: ClassVar[dict[int, Process]] = {}

    def read(self) -> bytes:
        """Return the next request, without its writer's credentials, which are this process's."""
        is_stream = self.kind is EndpointKind.STREAM
        try:
            if is_stream and self.in_flight is not None:
                return self.in_flight.read(self.sock)[0]
            return self.sock.recv(REQUEST_SIZE, READ if is_stream else PEEK)
        except ConnectionError:
            return b""

    def has_capability(self, capability: int) -> bool:
        process = self.processes.get(self.credentials.pid)
        return process is not None and capability in process.capabilities

    def matches(self, grant: Grant) -> bool:
        return False

    def receive_credentials(self, expected: bool) -> None:
        """Do nothing: the kernel would report this process."""


@dataclass(eq=False)
class Client:
    """A program's socket, as the library's are."""

    process: Process
    kind: EndpointKind
    sock: socket.socket
    cookie: int
    state: str = "new"  #: or bound, listening, connected, accepted, closed
    awaits: str = ""  #: the request that vsockd or a device has not replied to
    address: tuple[int, int] | None = None
    peer: tuple[int, int] | None = None
    wanted: tuple[int, int] = (0, 0)  #: the address of its connect
    polling: bool = False
    data: bytes = b""  #: a part of a reply
    may_end: bool = False  #: its vsockd was killed, or a device has had its socket


@dataclass(eq=False)
class Device:
    """A device: its end of the link, and the connects that it has to decide about."""

    cid: int
    link: socket.socket
    pending: list[tuple[client.PendingConnect, socket.socket]] = field(default_factory=list)
    streams: list[socket.socket] = field(default_factory=list)


class Errors(logging.Handler):
    """The errors that vsockd has logged."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if record.exc_info and record.exc_info[1] is not None:
            text += f": {record.exc_info[1]!r}"
        self.found.append(text)


class SimulatedAudit:
    """An audit log that nobody reads."""

    def record(self, context: Context, channel: Channel, denied: Denied, *_: object) -> None:
        context.counts.denials[denied.rule] += 1


def fill_descriptors() -> list[int]:
    """Open descriptors until the open ones are the lowest numbers, so that the next are known."""
    fillers: list[int] = []
    highest = max(fd for fd in map(int, os.listdir("/proc/self/fd")) if fd < FILLED_MAX)
    while not fillers or fillers[-1] < highest:
        fillers.append(os.dup(0))
    return fillers


def close_broker(broker: Broker) -> None:
    """Close the descriptors of a broker whose process has ended."""
    datagrams = broker.datagrams
    for share in datagrams._shares.values():
        for route in [*share.quota.routes, *share.quota.draining]:
            route.sock.close()
    for endpoint in datagrams._by_cookie.values():
        os.close(endpoint.handle.node)
        del endpoint.context.datagrams[endpoint.port]
    datagrams._shares.clear()
    datagrams._inbound.clear()
    datagrams._by_cookie.clear()
    for context in broker.fabric.contexts:
        broker.close_context(context)
    liveness = broker.streams._liveness
    for group in liveness.groups():
        liveness._close(group)
    liveness._events.close()
    os.close(liveness._pending_fd)
    broker._turns._epoll.close()


def dispose(fd: int, closed: Any) -> None:
    """Close a descriptor at once, instead of in a thread."""
    os.close(fd)
    closed()
