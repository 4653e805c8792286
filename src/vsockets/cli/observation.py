"""Facts that ls, top and web add to vsockd's reports: queues, owners of sockets, and rates.

*Queues* are the kernel's records of unix sockets, by ``sock_diag(7)`` as in ``ss -x``.  Any user
may read them.  The records cover this network namespace only: sockets of programs in containers are
missing.

*Owners* are for display only: no decision depends on them.  vsockd knows, from the kernel, the
process that registered the socket.  For a program under ``vsock run`` that is the supervisor, and
for a server that hands connections to workers the server.  The process that has the socket open now
is found in ``/proc`` by the socket's inode.  Only the process known to vsockd and its descendants
are searched, so that no program can make its socket appear to be another user's.  Name and uid are
read together, and only of the process that has the socket; its start time distinguishes it from a
later process with the same pid.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from .._linux.inspection import sockets_of
from .limits import SOCKET_OWNERS_PROCESSES_MAX

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_DONE, _ERROR = 3, 2
_DUMP_REQUEST = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_EVERY_STATE = 0xFFFF_FFFF
_SHOW_PEER, _SHOW_QUEUES = 0x04, 0x10
_PEER, _QUEUES = 2, 4

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_REQUEST = struct.Struct("=BBHIIIII")  # family, protocol, pad, states, inode, show, cookie
_SOCKET = struct.Struct("=BBBBIII")  # family, type, state, pad, inode, cookie
_ATTRIBUTE = struct.Struct("=HH")  # length, type

#: Seconds to wait for the kernel, which replies during the request.
_PATIENCE = 5.0


class UnixSocket(NamedTuple):
    """The record of one socket."""

    peer: int  #: inode of the connected socket; 0: not connected
    unread: int  #: bytes in the receive queue


def unix_sockets() -> dict[int, UnixSocket]:
    """Return the unix sockets of this network namespace, by inode.

    Raises OSError if the kernel refuses the request.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(_PATIENCE)
        show = _SHOW_PEER | _SHOW_QUEUES
        request = _REQUEST.pack(socket.AF_UNIX, 0, 0, _EVERY_STATE, 0, show, 0, 0)
        length = _HEADER.size + len(request)
        netlink.send(_HEADER.pack(length, _SOCK_DIAG_BY_FAMILY, _DUMP_REQUEST, 1, 0) + request)
        found: dict[int, UnixSocket] = {}
        while True:
            for kind, body in _messages(netlink.recv(1 << 16)):
                if kind == _DONE:
                    return found
                if kind == _ERROR:
                    raise OSError(-struct.unpack_from("=i", body)[0], "sock_diag")
                inode, sock = _decode(body)
                found[inode] = sock


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, *_ = _HEADER.unpack_from(data, at)
        yield kind, data[at + _HEADER.size : at + length]
        at += _aligned(length)


def _decode(body: bytes) -> tuple[int, UnixSocket]:
    inode = _SOCKET.unpack_from(body)[4]
    peer = unread = 0
    at = _SOCKET.size
    while at + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, at)
        if kind == _PEER:
            (peer,) = struct.unpack_from("=I", body, at + _ATTRIBUTE.size)
        elif kind == _QUEUES:
            (unread,) = struct.unpack_from("=I", body, at + _ATTRIBUTE.size)
        at += _aligned(length)
    return inode, UnixSocket(peer, unread)


def _aligned(length: int) -> int:
    return (length + 3) & ~3


def fill_queues(rows: list[dict[str, Any]]) -> None:
    """Set the queues of streams, in bytes, in rows of :meth:`vsockets.control.Control.sockets`.

    The send queue of one end is the receive queue of the other.  A queue stays None where the
    kernel has no record of the socket.
    """
    try:
        known = unix_sockets()
    except OSError:
        return
    for row in rows:
        if row["peer"] is None:
            continue
        own, other = row["inode"], row["peer_inode"]
        if own is None and other in known:
            own = row["inode"] = known[other].peer
        elif other is None and own in known:
            other = row["peer_inode"] = known[own].peer
        else:
            continue
        row["receive_queue"] = known[own].unread if own in known else None
        row["send_queue"] = known[other].unread if other in known else None


class Owner(NamedTuple):
    """A process that has a socket open."""

    pid: int
    uid: int  #: effective uid
    command: str | None  #: name; None if the process has ended


class Owners:
    """The owners of sockets, with a cache of what each process has open."""

    def __init__(self) -> None:
        self._by_inode: dict[int, dict[int, _Process]] = {}  # by the pid that vsockd knows

    def find(self, pid: int, uid: int, inode: int | None) -> Owner:
        """Return the process among ``pid`` and its descendants that has the socket ``inode`` open.

        If none has, the result is ``pid`` itself, with ``uid``.
        """
        if inode:
            if pid not in self._by_inode:
                self._by_inode[pid] = _owners_below(pid)
            process = self._by_inode[pid].get(inode)
            if process is not None and process.pid != pid:
                with contextlib.suppress(OSError):
                    owner = _describe(process.pid)
                    if _started(process.pid) == process.started:
                        return owner
        command = None
        with contextlib.suppress(OSError):
            command = _describe(pid).command
        return Owner(pid, uid, command)


class _Process(NamedTuple):
    """A process, distinct from later ones with the same pid."""

    pid: int
    started: str  #: start time in clock ticks since boot


def _owners_below(pid: int) -> dict[int, _Process]:
    """Return the owners of all sockets of a process and its descendants, by the sockets' inodes.

    If several processes have a socket open, the one nearest to ``pid`` counts as its owner.
    """
    found: dict[int, _Process] = {}
    processes = [pid]
    for member in processes:
        with contextlib.suppress(OSError):  # the process has ended, or belongs to another user
            process = _Process(member, _started(member))
            for _, inode in sockets_of(member):
                found.setdefault(inode, process)
        if len(processes) < SOCKET_OWNERS_PROCESSES_MAX:
            processes += _children(member)
    return found


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children") as text:
                found += map(int, text.read().split())
    return found


def _started(pid: int) -> str:
    with open(f"/proc/{pid}/stat", errors="replace") as stat:
        return stat.read().rpartition(")")[2].split()[19]


def _describe(pid: int) -> Owner:
    """Return the process's effective uid and name, read together.

    Raises OSError if the process has ended.
    """
    with open(f"/proc/{pid}/status", errors="replace") as status:
        rows = dict(row.partition(":\t")[::2] for row in status.read().split("\n"))
    return Owner(pid, int(rows["Uid"].split()[1]), rows["Name"])


#: Counters with a rate, in a row of :meth:`vsockets.control.Control.counts`.
RISING = ("connects", "accepts", "refusals", "denials")


_UNITS = ("", "k", "M", "G", "T")


def bytes_per_second(row: Mapping[str, Any]) -> float | None:
    """Return the bytes per second in both directions of a row; None if no process counts them."""
    if row["send_rate"] is None:
        return None
    return float(row["send_rate"] + row["receive_rate"])


def with_unit(number: float | None) -> str:
    """Return ``number`` in at most four characters, such as ``1.2M``; ``-`` for None."""
    if number is None:
        return "-"
    unit = 0
    while number >= 999.5 and unit < len(_UNITS) - 1:
        number /= 1000
        unit += 1
    digits = 1 if unit and number < 9.95 else 0
    return f"{number:.{digits}f}{_UNITS[unit]}"


class Rates:
    """Differences between successive results of :meth:`vsockets.control.Control.counts`."""

    def __init__(self) -> None:
        self._before: dict[int, dict[str, int]] = {}
        self._when: float | None = None

    def update(self, counts: Mapping[str, Any], now: float) -> dict[int, dict[str, float]]:
        """Return each context's rates per second since the last call; empty at the first call.

        ``now`` is a monotonic time in seconds.
        """
        rows = {row["cid"]: totals(row) for row in counts["contexts"]}
        rates: dict[int, dict[str, float]] = {}
        if self._when is not None and now > self._when:
            seconds = now - self._when
            rates = {
                cid: {name: _risen(row, self._before.get(cid), name) / seconds for name in RISING}
                for cid, row in rows.items()
            }
        self._before, self._when = rows, now
        return rates


def totals(row: Mapping[str, Any]) -> dict[str, int]:
    """Return the counters of ``row``, with the denials of all rules added up."""
    return {**{name: row[name] for name in RISING}, "denials": sum(row["denials"].values())}


def _risen(row: dict[str, int], before: dict[str, int] | None, name: str) -> int:
    if before is None or row[name] < before[name]:  # a new context with the same CID
        return row[name]
    return row[name] - before[name]
