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
    """The socket types.  The value is how people see them."""

    STREAM = "stream"
    SEQPACKET = "seqpacket"
    DATAGRAM = "dgram"


class Credentials(NamedTuple):
    """Who a process is, as the kernel says it."""

    pid: int
    uid: int
    gid: int


@dataclass(slots=True, eq=False)
class Endpoint:
    """A socket that holds a port: bound, perhaps listening."""

    kind: EndpointKind
    context: Context
    cid: int  #: the context's CID, or VMADDR_CID_LOCAL for one that serves its own context only
    port: int
    owner: Credentials
    trust: Trust | None = None  #: of an endpoint of the host
    cookie: int = 0
    inode: int = 0  #: the socket's, as its program says, or 0: for people to find who has it now
    handle: object = None  #: what vsockd reaches the socket by; the fabric never looks inside
    listening: bool = False
    #: not known here: the guest's kernel decides, when it is asked
    undecided: bool = False
    sizes: BufferSizes = field(default_factory=BufferSizes)
    party: Party | None = None  #: whose port it is; None when it holds none

    @property
    def address(self) -> tuple[int, int]:
        """``(cid, port)`` as getsockname() shows it."""
        return self.cid, self.port


@dataclass(frozen=True, slots=True)
class DevicePorts:
    """A guest's kernel, reached through a device: the authority over the guest's ports."""

    owner: Credentials  #: the device's process
    streams: object  #: the handles of its endpoints
    datagrams: object
    seqpacket: bool = False  #: whether its streams' handle takes sequenced packets, too

    def endpoint(self, context: Context, kind: EndpointKind, port: int) -> Endpoint | None:
        """Whatever is at ``port``; None when the kernel has no such sockets."""
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
            undecided=True,
        )


@dataclass(slots=True, eq=False)
class Connection:
    """An established stream.  vsockd knows of it, and is not in it."""

    number: int
    context: Context  #: the connecting side's
    listener: Endpoint  #: the accepting side's; it may have been closed since
    local: tuple[int, int]  #: the connecting side's address
    peer: tuple[int, int]  #: the accepting side's address
    size: int  #: the buffer size both sides agreed on, in bytes
    sizes: BufferSizes  #: what the connecting side had asked for
    owner: Credentials  #: the connecting process
    party: Party  #: the connecting side's
    cookie: int = 0
    watch: object = None  #: what vsockd notices its end by; the fabric never looks inside

    @property
    def kind(self) -> EndpointKind:
        """Stream or seqpacket."""
        return self.listener.kind

    @property
    def peer_context(self) -> Context:
        """The accepting side's context."""
        return self.listener.context
