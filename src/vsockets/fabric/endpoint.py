"""Endpoints and the connections between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from ..model.buffers import BufferSizes

if TYPE_CHECKING:
    from .context import Context
    from .party import Party
    from .trust import Trust


class EndpointKind(Enum):
    """A socket type.  The value is its name in reports and options."""

    STREAM = "stream"
    SEQPACKET = "seqpacket"
    DATAGRAM = "dgram"


class Credentials(NamedTuple):
    """A process's identity, as the kernel reports it."""

    pid: int
    uid: int
    gid: int


@dataclass(slots=True, eq=False)
class Endpoint:
    """A socket that holds a port: bound, and possibly listening."""

    kind: EndpointKind
    context: Context
    cid: int  #: the context's CID, or VMADDR_CID_LOCAL for one reachable from its own context only
    port: int
    owner: Credentials
    trust: Trust | None = None  #: set for the host's endpoints only
    cookie: int = 0
    inode: int = 0  #: the socket's inode as its program reported it, to show its holders; 0 unknown
    handle: object = None  #: vsockd's object for the socket, opaque to the fabric
    listening: bool = False
    #: True if the device or hybrid relay behind the port decides whether a listener exists
    pending: bool = False
    sizes: BufferSizes = field(default_factory=BufferSizes)
    party: Party | None = None  #: the party that holds the port; None if it holds none

    @property
    def address(self) -> tuple[int, int]:
        """``(cid, port)`` as returned by getsockname()."""
        return self.cid, self.port


@dataclass(frozen=True, slots=True)
class DevicePorts:
    """The ports that a guest's device serves; the guest's kernel decides about each of them."""

    owner: Credentials  #: the device's process
    streams: object  #: handle of its stream endpoints
    datagrams: object  #: handle of its datagram endpoints
    seqpacket: bool = False  #: True if ``streams`` accepts sequenced packet sockets, too

    def endpoint(self, context: Context, kind: EndpointKind, port: int) -> Endpoint | None:
        """Return a pending endpoint for ``port``; None if the guest lacks this socket type."""
        streams = kind is not EndpointKind.DATAGRAM
        handle = self.streams if streams else self.datagrams
        if handle is None or (kind is EndpointKind.SEQPACKET and not self.seqpacket):
            return None
        return Endpoint(
            kind,
            context,
            context.cid,
            port,
            self.owner,
            handle=handle,
            listening=streams,
            pending=True,
        )


@dataclass(slots=True, eq=False)
class Connection:
    """An established stream.  vsockd knows of it, and none of its bytes pass through vsockd."""

    number: int
    context: Context  #: the connecting side's
    listener: Endpoint  #: the accepting side's, which may have been closed since
    local: tuple[int, int]  #: the connecting side's address
    peer: tuple[int, int]  #: the accepting side's address
    size: int  #: the buffer size both sides agreed on, in bytes
    sizes: BufferSizes  #: the connecting side's requested buffer sizes
    owner: Credentials  #: the connecting process
    party: Party  #: the connecting side's
    cookie: int = 0
    watch: object = None  #: vsockd's registration that detects the stream's end; opaque here

    @property
    def kind(self) -> EndpointKind:
        """Socket type: stream or seqpacket."""
        return self.listener.kind

    @property
    def peer_context(self) -> Context:
        """The accepting side's context."""
        return self.listener.context
