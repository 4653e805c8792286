"""The process that owns a socket, for display only: no decision depends on it.

vsockd knows, from the kernel, the process that registered the socket.  For a program under
``vsock run`` that is the supervisor, and for a server that hands connections to workers the
server.  The process that has the socket open now is found in ``/proc`` by the socket's inode.
Only the process known to vsockd and its descendants are searched, so that no program can make its
socket appear to be another user's.  Name and uid are read together, and only of the process that
has the socket; its start time distinguishes it from a later process with the same pid.
"""

from __future__ import annotations

import contextlib
import os
from typing import NamedTuple

from .._linux.inspection import sockets_of
from .limits import SOCKET_OWNERS_PROCESSES_MAX


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
        with contextlib.suppress(OSError):  # it has ended, or belongs to another user
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
