"""What the supervisor knows of the sockets of its programs.

A socket is known by its inode's number, which ``/proc`` shows for every descriptor, so copies
made by dup, fork, exec or SCM_RIGHTS are one socket here as they are to the kernel.  The
supervisor holds no descriptor of a socket: its peer would never see the end of it.
"""

from __future__ import annotations

import _socket
import os
import re
import struct
from collections import OrderedDict, deque
from socket import AF_UNIX, SOCK_DGRAM, SOCK_SEQPACKET
from typing import NamedTuple

from ..limits import CONNECT_TIMEOUT_SECONDS
from ..model.buffers import BufferSizes
from ..model.constants import AF_VSOCK
from ..protocol import Record
from ..socket import UNBOUND, Phase
from .filter import Served
from .limits import SUPERVISOR_ROUTES_MAX, SUPERVISOR_SOCKETS_MAX
from .port_holders import PortHolder
from .vsockd_client import cookie_of

_SOCKET = re.compile(r"socket:\[(\d+)\]")
#: struct sockaddr_vm: family, reserved, port, CID, flags, padding (linux/vm_sockets.h).
_SOCKADDR_VM = struct.Struct("=HHIIB3s")
SOCKADDR_SIZE = _SOCKADDR_VM.size
#: The only flag of svm_flags; it routes between nested machines and changes nothing here.
_FLAG_TO_HOST = 1


def pack_address(address: tuple[int, int]) -> bytes:
    """``(cid, port)`` as struct sockaddr_vm."""
    return _SOCKADDR_VM.pack(AF_VSOCK, 0, address[1], address[0], 0, b"\0\0\0")


def unpack_address(data: bytes) -> tuple[int, int] | None:
    """Return the ``(cid, port)`` of a struct sockaddr_vm, or None where Linux takes it for invalid.

    As in ``vsock_addr_validate``: it is long enough, of the family, and has no flag but
    VMADDR_FLAG_TO_HOST.  What follows it is ignored, and so are the reserved fields.
    """
    if len(data) < SOCKADDR_SIZE:
        return None
    family, _, port, cid, flags, _ = _SOCKADDR_VM.unpack_from(data)
    if family != AF_VSOCK or flags & ~_FLAG_TO_HOST:
        return None
    return cid, port


#: Whose data calls are served.
SERVED = {int(SOCK_DGRAM): Served.DATAGRAM, int(SOCK_SEQPACKET): Served.PACKET}

#: No connect has succeeded, and none has failed for good.
UNCONNECTED = (Phase.NEW, Phase.BOUND, Phase.LISTENING, Phase.CONNECTING)


class Received(NamedTuple):
    """A message taken off a socket, whole."""

    data: bytes
    flags: int  #: of struct msghdr
    source: tuple[int, int] | None


class Endpoint:
    """One socket of a program."""

    __slots__ = (
        "accepted",
        "arriving",
        "buffers",
        "connect_timeout",
        "cookie",
        "entered",
        "error",
        "holder",
        "ignored",
        "inode",
        "is_shut",
        "local",
        "named",
        "peer",
        "phase",
        "received",
        "record",
        "send_buffer",
        "type",
    )

    def __init__(self, type_: int, inode: int, cookie: int) -> None:
        self.type = type_
        self.inode = inode
        self.cookie = cookie
        self.phase = Phase.NEW
        self.local = UNBOUND
        self.peer: tuple[int, int] | None = None
        self.buffers = BufferSizes()
        self.connect_timeout = CONNECT_TIMEOUT_SECONDS  #: seconds
        self.entered = False  #: connected to vsockd, or through it
        self.named = False  #: bound to a name by vsockd, and not connected to it
        self.holder: PortHolder | None = None  #: of its port, if it is this supervisor's
        self.error = 0  #: SO_ERROR: why a connect failed that nobody waited for
        self.record: Record | None = None  #: what vsockd said of the stream
        self.send_buffer = 0  #: SO_SNDBUF before a polling connect, in bytes
        #: Options of other families: accepted, and shown again.
        self.ignored: dict[tuple[int, int], bytes] = {}
        #: Connections taken for a program that was interrupted before it got them.
        self.accepted: deque[tuple[int, Record]] = deque()
        #: Connections accepted of which vsockd has not said yet whose they are.
        self.arriving: deque[_socket.socket] = deque()
        #: Messages received for a program that was interrupted likewise.
        self.received: deque[Received] = deque()
        self.is_shut = False  #: by shutdown(), in any direction

    @property
    def served(self) -> Served | None:
        """As what its data calls are served, if they are."""
        return SERVED.get(self.type)

    @property
    def is_datagram(self) -> bool:
        """Whether it has no connections."""
        return self.type == SOCK_DGRAM

    def settle(self, record: Record) -> None:
        """Be the established stream that ``record`` describes, which has the port."""
        if self.holder is not None:
            self.holder.close()
            self.holder = None
        self.record = record
        self.local = record.local
        self.peer = record.peer
        self.buffers = BufferSizes(record.size, record.minimum, record.maximum)
        self.phase = Phase.CONNECTED
        self.entered = True

    def fail(self, code: int, polled: bool) -> None:
        """Note that a connect has failed with ``code``.

        As in Linux, the socket can be connected again if the program waited for the failure;
        ``polled`` says that it did not.
        """
        self.error = code
        if polled:
            self.phase = Phase.FAILED
        else:
            self.phase = Phase.NEW if self.local == UNBOUND else Phase.BOUND


class Sockets:
    """The sockets, ours and others, that programs have asked about lately.

    The kernel does not say when a socket is gone, so what has not been asked about for longest
    is forgotten when there are too many.  vsockd knows a forgotten one still, unless nothing
    was ever done with it.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[int, Endpoint | None] = OrderedDict()

    def add(self, inode: int, endpoint: Endpoint | None) -> None:
        """Remember a socket; None says that it is none of ours."""
        self._known[inode] = endpoint
        if len(self._known) > SUPERVISOR_SOCKETS_MAX:
            self._forget_one()

    def adopt(self, sock: _socket.socket, type_: int) -> Endpoint:
        """Remember a new socket that a program is about to get."""
        inode = os.fstat(sock.fileno()).st_ino
        endpoint = Endpoint(type_, inode, cookie_of(sock))
        self.add(inode, endpoint)
        return endpoint

    def known(self, inode: int | None) -> Endpoint | None:
        """Return the vSockets socket with this inode, or None if it is not known to be one."""
        try:
            return None if inode is None else self.find(inode)
        except KeyError:
            return None

    def find(self, inode: int) -> Endpoint | None:
        """Return the vSockets socket with this inode, or None for any other file.

        Raises KeyError if it has not been seen yet.
        """
        self._known.move_to_end(inode)
        return self._known[inode]

    def forget(self, inode: int) -> None:
        """The number is another socket's by now."""
        self._known.pop(inode, None)

    def _forget_one(self) -> None:
        # Those whose state only we know get a second turn, and a third: they are few.
        for _ in range(64):
            inode, endpoint = self._known.popitem(last=False)
            if endpoint is None or endpoint.phase is Phase.CONNECTED:
                return
            self._known[inode] = endpoint
        self._known.popitem(last=False)


class Routes:
    """Sockets that send datagrams from a program's socket to a destination: the last ones used."""

    def __init__(self) -> None:
        self._routes: OrderedDict[tuple[int, tuple[int, int]], _socket.socket] = OrderedDict()

    def find(self, source: Endpoint, destination: tuple[int, int]) -> _socket.socket | None:
        """Return the route, or None if it is not kept."""
        key = source.cookie, destination
        route = self._routes.get(key)
        if route is not None:
            self._routes.move_to_end(key)
        return route

    def add(self, source: Endpoint, destination: tuple[int, int], fd: int) -> _socket.socket:
        """Keep a route, which replaces an earlier one."""
        key = source.cookie, destination
        old = self._routes.pop(key, None)
        if old is not None:
            old.close()
        elif len(self._routes) >= SUPERVISOR_ROUTES_MAX:
            self._routes.popitem(last=False)[1].close()
        self._routes[key] = route = _socket.socket(AF_UNIX, SOCK_DGRAM, 0, fd)
        return route


def inode_in(link: str) -> int | None:
    """The inode of the socket that /proc shows as ``socket:[inode]``; None for anything else."""
    match = _SOCKET.fullmatch(link)
    return int(match[1]) if match else None
