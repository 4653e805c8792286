"""Disconnect streams without the help of the processes that have them open.

vsockd has no descriptor of a stream it brokered.  To disconnect one it finds a process that has one
(``/proc/PID/fd`` names sockets by inode), duplicates the descriptor (``pidfd_getfd(2)``) and shuts
the socket down in both directions.  The kernel then reports the end to both sides, in any
process, even one that is stopped or stuck.

Shutting down one end is enough.  The accepting end is searched for first, because vsockd knows its
inode (:mod:`.stream_liveness`).  While it waits to be accepted it is in no process, and the
connecting end is found by its cookie in the process that connected.

The kernel allows this to root, and to a user for the user's own processes unless Yama restricts
ptrace.

Processes may have any number of descriptors, and there may be any number of processes.  So the
search stops after some time and continues as deferred work (:mod:`.scheduling`).
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterable, Iterator
from socket import AF_UNIX, SHUT_RDWR, SO_DOMAIN, SOL_SOCKET

from .._linux.inspection import duplicate, open_pidfd, process_ids, sockets_of
from .._linux.sockets import cookie_of
from ..eventloop.loop import EventLoop
from ..fabric import Connection
from .limits import (
    DISCONNECT_AT_ONCE_SECONDS,
    DISCONNECT_LONGEST_RETRY_SECONDS,
    DISCONNECT_RETRY_SECONDS,
)
from .scheduling import DeferredWork, run_for
from .stream_liveness import Group

log = logging.getLogger(__name__)

#: Descriptors to look at in one step: some 200 microseconds.  Opening a process takes as long as
#: looking at _PROCESS_COST descriptors.
_DESCRIPTORS_PER_STEP = 64
_PROCESS_COST = 8


class Disconnector:
    """The streams that must end and have not ended yet."""

    def __init__(self, loop: EventLoop, deferred: DeferredWork) -> None:
        self._loop = loop
        self._deferred = deferred
        self._remaining: dict[int, Connection] = {}
        self._delay: float | None = None  # until the next try; None: no try is scheduled
        self._looked = 0  # descriptors looked at since the last step

    def disconnect(self, connections: Iterable[Connection]) -> list[Connection]:
        """Disconnect ``connections`` now; return those that could not be disconnected yet.

        vsockd retries those until they have ended: one may be in transit between two processes.
        """
        for connection in connections:
            self._remaining[connection.number] = connection
        search = self._try()
        if not run_for(search, DISCONNECT_AT_ONCE_SECONDS):
            self._deferred.start(self, search)
        if self._remaining and self._delay is None:
            self._delay = DISCONNECT_RETRY_SECONDS
            self._loop.call_later(self._delay, self._try_again)
        return list(self._remaining.values())

    def _try_again(self) -> None:
        assert self._delay is not None
        self._deferred.start(self, self._try())
        self._delay = (
            min(2 * self._delay, DISCONNECT_LONGEST_RETRY_SECONDS) if self._remaining else None
        )
        if self._delay is not None:
            self._loop.call_later(self._delay, self._try_again)

    def _try(self) -> Iterator[None]:
        """Search all processes, in steps."""
        groups = {one.watch for one in self._remaining.values() if isinstance(one.watch, Group)}
        alive: dict[int, int] = {}
        for group in groups:
            alive.update(group.alive())
        for number in [number for number in self._remaining if number not in alive]:
            del self._remaining[number]
        if not self._remaining:
            return
        by_inode = {alive[number]: number for number in self._remaining}
        refused: set[int] = set()
        for pid in self._likely_first():
            try:
                yield from self._search(pid, by_inode)
            except PermissionError:
                refused.add(pid)
            except OSError:
                pass  # the process has exited, or vsockd may not look into it
            if not by_inode:
                return
        for pid, cookies in self._unaccepted().items():
            with contextlib.suppress(OSError):
                yield from self._search_connecting(pid, cookies)
        if self._remaining:
            one = next(iter(self._remaining.values()))
            log.debug(
                "%d streams, such as %s to %s, are in no process, or in one of %s, which vsockd "
                "may not look into",
                len(self._remaining),
                one.local,
                one.peer,
                sorted(refused),
            )

    def _likely_first(self) -> Iterator[int]:
        likely = {connection.listener.owner.pid for connection in self._remaining.values()}
        likely |= {connection.owner.pid for connection in self._remaining.values()}
        yield from sorted(likely)
        yield from (pid for pid in process_ids() if pid not in likely)

    def _search(self, pid: int, by_inode: dict[int, int]) -> Iterator[None]:
        """Shut down the accepting ends in ``by_inode`` that process ``pid`` has open."""
        with open_pidfd(pid) as pidfd:
            looked = _PROCESS_COST
            for fd, inode in sockets_of(pid):
                if inode in by_inode:
                    with duplicate(pidfd, fd) as sock:
                        if os.fstat(sock.fileno()).st_ino == inode:  # fd may name another by now
                            sock.shutdown(SHUT_RDWR)
                            self._remaining.pop(by_inode.pop(inode), None)
                looked += 1
                if looked >= _DESCRIPTORS_PER_STEP:
                    looked = 0
                    yield
            self._looked += looked
        if self._looked >= _DESCRIPTORS_PER_STEP:
            self._looked = 0
            yield

    def _unaccepted(self) -> dict[int, dict[int, int]]:
        """Return the remaining streams' numbers by cookie, for each connecting process."""
        found: dict[int, dict[int, int]] = {}
        for connection in self._remaining.values():
            if connection.cookie and connection.owner.pid > 0:
                found.setdefault(connection.owner.pid, {})[connection.cookie] = connection.number
        return found

    def _search_connecting(self, pid: int, cookies: dict[int, int]) -> Iterator[None]:
        """Shut down the connecting ends in ``cookies`` that process ``pid`` has open."""
        with open_pidfd(pid) as pidfd:
            for number, (fd, inode) in enumerate(sockets_of(pid), 1):
                if inode:
                    with duplicate(pidfd, fd) as sock:
                        found = cookies.pop(cookie_of(sock), None)
                        if found is not None and sock.getsockopt(SOL_SOCKET, SO_DOMAIN) == AF_UNIX:
                            sock.shutdown(SHUT_RDWR)
                            self._remaining.pop(found, None)
                if not cookies:
                    return
                if number % _DESCRIPTORS_PER_STEP == 0:
                    yield
