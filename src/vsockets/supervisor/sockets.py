"""The state of programs' sockets.

A socket is identified by its inode, which ``/proc`` shows for every descriptor: copies made by dup,
fork, exec or SCM_RIGHTS are one socket, as they are to the kernel.  The supervisor keeps no
descriptor of a socket: otherwise the peer would never see the socket's end.
"""

from __future__ import annotations

import _socket
import os
import struct
from collections import OrderedDict
from socket import AF_UNIX, SOCK_DGRAM, SOCK_SEQPACKET
from typing import NamedTuple

from ..limits import CONNECT_TIMEOUT_SECONDS
from ..model.buffers import DEFAULT_SIZES
from ..model.constants import AF_VSOCK
from ..protocol import Record
from ..socket import UNBOUND, Phase
from .filter import Served
from .limits import SUPERVISOR_ROUTES_MAX, SUPERVISOR_SOCKETS_MAX
from .vsockd_client import PortHolder

#: struct sockaddr_vm: family, reserved, port, CID, flags, padding (linux/vm_sockets.h).
_SOCKADDR_VM = struct.Struct("=HHIIB3s")
SOCKADDR_SIZE = _SOCKADDR_VM.size
#: The only flag of svm_flags; it routes between nested machines and has no effect here.
_FLAG_TO_HOST = 1


def pack_address(address: tuple[int, int]) -> bytes:
    """Encode ``(cid, port)`` as struct sockaddr_vm."""
    return _SOCKADDR_VM.pack(AF_VSOCK, 0, address[1], address[0], 0, b"\0\0\0")


def unpack_address(data: bytes) -> tuple[int, int] | None:
    """Return the ``(cid, port)`` of a struct sockaddr_vm, or None if it is invalid.

    An address is valid, as in Linux's ``vsock_addr_validate``, if it is long enough, of family
    AF_VSOCK and without flags other than VMADDR_FLAG_TO_HOST.  Reserved fields and further bytes
    are ignored.
    """
    if len(data) < SOCKADDR_SIZE:
        return None
    family, _, port, cid, flags, _ = _SOCKADDR_VM.unpack_from(data)
    if family != AF_VSOCK or flags & ~_FLAG_TO_HOST:
        return None
    return cid, port


#: The socket types whose data calls are served.
SERVED = {int(SOCK_DGRAM): Served.DATAGRAM, int(SOCK_SEQPACKET): Served.PACKET}
_DATAGRAM = int(SOCK_DGRAM)
_NEW, _CONNECTED = Phase.NEW, Phase.CONNECTED
#: Descriptors of threads whose sockets are remembered.
_EXPECTED = 1024

#: Phases before a connect has succeeded or finally failed.
UNCONNECTED = (Phase.NEW, Phase.BOUND, Phase.LISTENING, Phase.CONNECTING)


#: The descriptor of an accepted stream, and vsockd's record of it.
Stream = tuple[int, Record]


class Received(NamedTuple):
    """A whole message that was received from a socket."""

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
        "error",
        "has_name",
        "holder",
        "ignored",
        "inode",
        "interrupted",
        "is_attached",
        "is_datagram",
        "is_shut",
        "local",
        "peer",
        "phase",
        "received",
        "record",
        "send_buffer",
        "served",
        "type",
    )

    def __init__(self, type_: int, inode: int, cookie: int = 0) -> None:
        self.type = type_
        self.is_datagram = type_ == _DATAGRAM
        #: The kind of the socket if the supervisor serves its data calls, or None.
        self.served = SERVED.get(type_)
        self.inode = inode
        #: 0 until the supervisor has a copy of the socket for the first time, as every call does
        #: that asks vsockd for something.
        self.cookie = cookie
        self.phase = _NEW
        self.local = UNBOUND
        self.peer: tuple[int, int] | None = None
        self.buffers = DEFAULT_SIZES
        self.connect_timeout = CONNECT_TIMEOUT_SECONDS  #: seconds
        self.is_attached = False  #: connected to vsockd, or by vsockd to its peer
        self.has_name = False  #: bound to a name by vsockd, instead of connected to it
        self.holder: PortHolder | None = None  #: of its port, if it is this supervisor's
        #: The peer of a connect that a signal has interrupted and that goes on, until the program
        #: calls connect() again and gets the result.
        self.interrupted: tuple[int, int] | None = None
        self.error = 0  #: SO_ERROR, after a connect that the program did not wait for
        self.record: Record | None = None  #: vsockd's record of the stream
        self.send_buffer = 0  #: SO_SNDBUF before a non-blocking connect, in bytes
        #: Options of other families, by level and name: accepted without effect.
        self.ignored: dict[tuple[int, int], bytes] = {}
        # Nearly always empty, so no deques, each of which takes half a kilobyte.
        #: Connections accepted for a program that was interrupted before it got them.
        self.accepted: list[Stream] = []
        #: vsockd's accepted connections that have not delivered their stream yet.
        self.arriving: list[_socket.socket] = []
        #: Messages received for a program that was interrupted before it got them.
        self.received: list[Received] = []
        self.is_shut = False  #: whether shutdown() was called, for any direction

    def establish(self, record: Record) -> None:
        """Enter the state CONNECTED, with the addresses and sizes of vsockd's ``record``."""
        if self.holder is not None:
            self.holder.close()
            self.holder = None
        self.record = record
        self.local, self.peer, self.buffers = record.ends
        self.phase = _CONNECTED
        self.is_attached = True

    def fail(self, code: int, polled: bool) -> None:
        """Record that a connect has failed with ``code``.

        As in Linux, the socket can be connected again, unless the program ``polled`` for the result
        instead of waiting in connect().
        """
        self.error = code
        if polled:
            self.phase = Phase.FAILED
        else:
            self.phase = Phase.NEW if self.local == UNBOUND else Phase.BOUND


class Sockets:
    """The sockets, vSockets or not, of the programs' latest calls.

    The kernel does not report the end of a socket, so the least recently used ones are dropped
    beyond a limit.  A dropped socket is recovered from vsockd if it was ever bound or connected.
    """

    def __init__(self) -> None:
        self._known: OrderedDict[int, Endpoint | None] = OrderedDict()
        self._expected: dict[tuple[int, int], Endpoint] = {}  # by thread and descriptor

    def add(self, inode: int, endpoint: Endpoint | None) -> None:
        """Add a socket, with None as its ``endpoint`` unless it is a vSockets socket."""
        self._known[inode] = endpoint
        if len(self._known) > SUPERVISOR_SOCKETS_MAX:
            self._drop_one()

    def adopt(self, fd: int, type_: int) -> Endpoint:
        """Add a new vSockets socket, ``fd``, that a program is about to get."""
        inode = os.fstat(fd).st_ino
        endpoint = Endpoint(type_, inode)
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

        Raises KeyError if the supervisor has not seen the file yet.
        """
        self._known.move_to_end(inode)
        return self._known[inode]

    def expect(self, pid: int, descriptor: int, endpoint: Endpoint) -> None:
        """Expect that a thread's descriptor is this socket at its next call, too."""
        if endpoint.served is None:
            if len(self._expected) >= _EXPECTED:
                self._expected.clear()
            self._expected[pid, descriptor] = endpoint

    def expected(self, pid: int, descriptor: int) -> Endpoint | None:
        """Return the socket that a thread's descriptor was at a call before, if it is kept.

        The caller checks by a copy that it still is (:meth:`.call.Call.duplicate`), which costs
        less than a link of /proc.
        """
        endpoint = self._expected.get((pid, descriptor))
        if endpoint is None or self._known.get(endpoint.inode) is not endpoint:
            return None
        self._known.move_to_end(endpoint.inode)
        return endpoint

    def forget(self, pid: int, descriptor: int) -> None:
        """Expect nothing of a thread's descriptor, which is another file now."""
        self._expected.pop((pid, descriptor), None)

    def inode_of(self, cookie: int) -> int:
        """Return the inode of the vSockets socket with this cookie, or 0 if it is not known."""
        found = (inode for inode, one in self._known.items() if one and one.cookie == cookie)
        return next(found, 0)

    def _drop_one(self) -> None:
        # Sockets whose state vsockd does not have are kept longer: they are few.
        for _ in range(64):
            inode, endpoint = self._known.popitem(last=False)
            if endpoint is None or endpoint.phase is Phase.CONNECTED:
                return
            self._known[inode] = endpoint
        self._known.popitem(last=False)


class Routes:
    """The sockets used last to send datagrams from a program's socket to a destination."""

    def __init__(self) -> None:
        self._routes: OrderedDict[tuple[int, tuple[int, int]], _socket.socket] = OrderedDict()

    def find(self, source: Endpoint, destination: tuple[int, int]) -> _socket.socket | None:
        """Return the socket that sends from ``source`` to ``destination``, if it is kept."""
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
    """Return the inode in a link ``socket:[inode]`` of /proc; None for any other link."""
    inode = link[8:-1]
    return int(inode) if link.startswith("socket:[") and inode.isdecimal() else None
