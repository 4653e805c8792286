"""Which process has a socket: for people to see, never to decide by.

vsockd knows who dealt with it, as the kernel says.  Of a program under ``vsock run`` that is its
supervisor, and of a server that hands connections to workers it is the server.  Who has the
socket open now, ``/proc`` says by the socket's inode.  It is looked for in the process that vsockd
knows and then in its descendants only, so nobody can make a socket look like a stranger's.  Name
and user are read at once, and only of the process in which the socket was found: its start time
tells it from a later one with its number.
"""

from __future__ import annotations

import contextlib
import os
from typing import NamedTuple

from .._linux.inspection import sockets_of
from .limits import SOCKET_OWNERS_PROCESSES_MAX


class Holder(NamedTuple):
    """A process that has a socket."""

    pid: int
    uid: int  #: its effective user
    command: str | None  #: its name; None when it has ended


class Holders:
    """Looks processes up, each only once."""

    def __init__(self) -> None:
        self._by_inode: dict[int, dict[int, _Process]] = {}  # by the process that vsockd knows

    def find(self, pid: int, uid: int, inode: int | None) -> Holder:
        """Return which of ``pid`` and its descendants has the socket; else ``pid``, of user
        ``uid``.
        """
        if inode:
            if pid not in self._by_inode:
                self._by_inode[pid] = _holders_in_family(pid)
            process = self._by_inode[pid].get(inode)
            if process is not None and process.pid != pid:
                with contextlib.suppress(OSError):
                    holder = _describe(process.pid)
                    if _started(process.pid) == process.started:
                        return holder
        command = None
        with contextlib.suppress(OSError):
            command = _describe(pid).command
        return Holder(pid, uid, command)


class _Process(NamedTuple):
    """A process, whichever has its number later."""

    pid: int
    started: str  #: clock ticks since the machine's start


def _holders_in_family(pid: int) -> dict[int, _Process]:
    """Return which of a process and its descendants has each of their sockets, by inode; the
    eldest that has it counts.
    """
    found: dict[int, _Process] = {}
    family = [pid]
    for member in family:
        with contextlib.suppress(OSError):  # it has ended, or belongs to another user
            process = _Process(member, _started(member))
            for _, inode in sockets_of(member):
                found.setdefault(inode, process)
        if len(family) < SOCKET_OWNERS_PROCESSES_MAX:
            family += _children(member)
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


def _describe(pid: int) -> Holder:
    """Return the process's effective user and its name, both of one moment.  OSError."""
    with open(f"/proc/{pid}/status", errors="replace") as status:
        rows = dict(row.partition(":\t")[::2] for row in status.read().split("\n"))
    return Holder(pid, int(rows["Uid"].split()[1]), rows["Name"])
