"""Which process has a socket: for people to see, never to decide by.

vsockd knows who dealt with it, as the kernel says.  Of a program under ``vsock run`` that is its
supervisor, and of a server that hands connections to workers it is the server.  Who has the
socket open now, ``/proc`` says by the socket's inode.  It is looked for in the process that vsockd
knows and then in its descendants only, so nobody can make a socket look like a stranger's.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple

from ..limits import SEARCHED_PROCESSES


class Holder(NamedTuple):
    """A process that has a socket."""

    pid: int
    uid: int  #: its effective user
    command: str | None  #: its name; None when it has ended


class Holders:
    """Looks processes up, each only once."""

    def __init__(self) -> None:
        self._by_inode: dict[int, dict[int, int]] = {}  # by the process that vsockd knows

    def find(self, pid: int, uid: int, inode: int | None) -> Holder:
        """Who has the socket, of ``pid`` and its descendants; else ``pid``, of user ``uid``."""
        if inode:
            if pid not in self._by_inode:
                self._by_inode[pid] = _holders_in_family(pid)
            holder = self._by_inode[pid].get(inode, pid)
            if holder != pid:
                with contextlib.suppress(OSError):
                    return Holder(holder, _user(holder), _command(holder))
        return Holder(pid, uid, _command(pid))


def _holders_in_family(pid: int) -> dict[int, int]:
    """The sockets of a process and its descendants, by inode; the eldest that has it counts."""
    found: dict[int, int] = {}
    family = [pid]
    for member in family:
        for inode in _sockets(member):
            found.setdefault(inode, member)
        if len(family) < SEARCHED_PROCESSES:
            family += _children(member)
    return found


def _sockets(pid: int) -> Iterator[int]:
    with contextlib.suppress(OSError):  # it has ended, or is somebody else's
        for fd in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                name = os.readlink(f"/proc/{pid}/fd/{fd}")
                if name.startswith("socket:["):
                    yield int(name[len("socket:[") : -1])


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children") as text:
                found += map(int, text.read().split())
    return found


def _user(pid: int) -> int:
    with open(f"/proc/{pid}/status") as status:
        return next(int(row.split()[2]) for row in status if row.startswith("Uid:"))


def _command(pid: int) -> str | None:
    try:
        with open(f"/proc/{pid}/comm", errors="replace") as name:
            return name.read().strip()
    except OSError:
        return None
