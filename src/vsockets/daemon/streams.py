"""The streams vsockd has brokered: releasing those that have ended, and disconnecting others.

*Disconnecting* works without the help of the processes that have a stream open.  vsockd has no
descriptor of a stream it brokered.  To disconnect one it finds a process that has one
(``/proc/PID/fd`` names sockets by inode), duplicates the descriptor (``pidfd_getfd(2)``) and shuts
the socket down in both directions.  The kernel then reports the end to both sides, in any process,
even one that is stopped or stuck.

Shutting down one end is enough.  The accepting end is searched for first, because vsockd knows its
inode (:mod:`.stream_liveness`).  While it waits to be accepted it is in no process, and the
connecting end is found by its cookie in the process that connected.

The kernel allows root to do so, and a user for the user's own processes unless Yama restricts
ptrace.  Containers forbid ``pidfd_getfd``.  There ptrace(2) makes the process itself shut the
socket down, or a program's supervisor is asked to (:mod:`vsockets.supervisor.remote_shutdown`).

Processes may have any number of descriptors, and there may be any number of processes.  So the
search stops after some time and continues as deferred work (:mod:`.scheduling`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
from collections.abc import Callable, Iterable, Iterator
from socket import AF_UNIX, SHUT_RDWR, SO_DOMAIN, SOL_SOCKET
from time import monotonic
from typing import TYPE_CHECKING, Any

from .._linux.inspection import duplicate, open_pidfd, process_ids, sockets_of
from .._linux.sockets import cookie_of
from ..eventloop.loop import EventLoop
from ..fabric import Connection, Fabric
from .channel import Channel
from .handover import Reader, Saved, Writer, restore_connections, restore_meter, save_connections
from .journal import Journal
from .limits import (
    DISCONNECT_AT_ONCE_SECONDS,
    DISCONNECT_LONGEST_RETRY_SECONDS,
    DISCONNECT_RETRY_SECONDS,
    DISCONNECT_WAIT_SECONDS,
)
from .scheduling import DeferredWork, run_for
from .stream_liveness import Group, StreamLiveness

if TYPE_CHECKING:
    from ..supervisor.remote_shutdown import Requests, Target

log = logging.getLogger(__name__)

#: Descriptors to look at in one step: some 200 microseconds.  Opening a process takes as long as
#: looking at _PROCESS_COST descriptors.
_DESCRIPTORS_PER_STEP = 64
_PROCESS_COST = 8
#: Seconds to wait for another process in one step, while a search may wait.
_WAIT_SECONDS = 0.001
#: Seconds after which a supervisor is asked again.
_ASK_AGAIN_SECONDS = 0.01


class Disconnector:
    """The streams that must end and have not ended yet."""

    def __init__(self, loop: EventLoop, deferred: DeferredWork, end: Callable[[int], None]) -> None:
        """Start without streams.

        ``end`` is called with the number of each stream found to have ended, whether or not that
        stream was to be disconnected.
        """
        self._loop = loop
        self._deferred = deferred
        self._report_end = end
        self._remaining: dict[int, Connection] = {}
        self._delay: float | None = None  # until the next try; None: no try is scheduled
        self._looked = 0  # descriptors looked at since the last step
        self._problems: dict[int, str] = {}  # of remaining connections, by number
        self._requests: Requests | None = None  # to supervisors, once there was one
        #: the connections that supervisors are to end, and the supervisors
        self._asked: dict[Target, tuple[int, int]] = {}
        self._wait_until = 0.0  # the time until which a search may wait for other processes

    def disconnect(self, connections: Iterable[Connection]) -> list[Connection]:
        """Disconnect ``connections`` now; return those that could not be disconnected yet.

        vsockd retries those until they have ended: one may be in transit between two processes.
        """
        for connection in connections:
            self._remaining[connection.number] = connection
        self._wait_until = monotonic() + DISCONNECT_WAIT_SECONDS
        search = self._try()
        if not run_for(search, DISCONNECT_AT_ONCE_SECONDS):
            self._deferred.start(self, search)
        if self._remaining and self._delay is None:
            self._delay = DISCONNECT_RETRY_SECONDS
            self._loop.call_later(self._delay, self._try_again)
        return list(self._remaining.values())

    @property
    def remaining(self) -> list[Connection]:
        """The connections that could not be disconnected yet."""
        return list(self._remaining.values())

    def problem(self, connection: Connection) -> str:
        """Return the reason why a connection could not be disconnected yet."""
        return self._problems.get(connection.number, "no process that vsockd can see has it open")

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
        alive = self._forget_ended()
        if not self._remaining:
            return
        self._asked.clear()
        refused: set[int] = set()
        yield from self._search_all({alive[number]: number for number in self._remaining}, refused)
        yield from self._await_supervisors()
        self._forget_ended()  # programs have closed some of the streams meanwhile
        for number, one in self._remaining.items():
            owners = refused & _owners(one)
            if owners:
                self._problems.setdefault(number, f"vsockd may not access process {min(owners)}")
        if self._remaining:
            one = next(iter(self._remaining.values()))
            log.debug(
                "%d streams are still open, such as %s to %s: %s (no access to %s)",
                len(self._remaining),
                one.local,
                one.peer,
                self.problem(one),
                sorted(refused),
            )

    def _forget_ended(self) -> dict[int, int]:
        """Forget ended streams; return the accepting ends' inodes of the others, by number."""
        groups = {one.watch for one in self._remaining.values() if isinstance(one.watch, Group)}
        alive: dict[int, int] = {}
        for group in groups:
            for number in group.hung_up():
                self._report_end(number)
                self._end(number)
            alive.update(group.alive())
        for number in [number for number in self._remaining if number not in alive]:
            self._end(number)
        return alive

    def _search_all(self, by_inode: dict[int, int], refused: set[int]) -> Iterator[None]:
        """Search all processes; add those that vsockd may not look into to ``refused``."""
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

    def _end(self, number: int) -> None:
        self._remaining.pop(number, None)
        self._problems.pop(number, None)

    def _likely_first(self) -> Iterator[int]:
        likely = {pid for one in self._remaining.values() for pid in _owners(one)}
        yield from sorted(likely)
        yield from (pid for pid in process_ids() if pid not in likely)

    def _search(self, pid: int, by_inode: dict[int, int]) -> Iterator[None]:
        """Shut down the accepting ends in ``by_inode`` that process ``pid`` has open."""
        forbidden: dict[int, int] = {}
        with open_pidfd(pid) as pidfd:
            looked = _PROCESS_COST
            for fd, inode in sockets_of(pid):
                if inode in by_inode:
                    number = by_inode[inode]
                    try:
                        with duplicate(pidfd, fd) as sock:
                            # The number may be another socket's by now.
                            if os.fstat(sock.fileno()).st_ino == inode:
                                sock.shutdown(SHUT_RDWR)
                                by_inode.pop(inode, None)
                                self._end(number)
                    except PermissionError:
                        forbidden[inode] = number
                looked += 1
                if looked >= _DESCRIPTORS_PER_STEP:
                    looked = 0
                    yield
            self._looked += looked
        if forbidden:
            ends = {(inode, 0): number for inode, number in forbidden.items()}
            yield from self._shut_down_remotely(pid, ends)
            for inode, number in forbidden.items():
                if number not in self._remaining:
                    by_inode.pop(inode, None)
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
                    try:
                        with duplicate(pidfd, fd) as sock:
                            found = cookies.pop(cookie_of(sock), None)
                            family = sock.getsockopt(SOL_SOCKET, SO_DOMAIN)
                            if found is not None and family == AF_UNIX:
                                sock.shutdown(SHUT_RDWR)
                                self._end(found)
                    except PermissionError:
                        break
                if not cookies:
                    return
                if number % _DESCRIPTORS_PER_STEP == 0:
                    yield
            else:
                return
        ends = {(0, cookie): number for cookie, number in cookies.items()}
        yield from self._shut_down_remotely(pid, ends)

    # Where pidfd_getfd(2) is forbidden

    def _shut_down_remotely(self, pid: int, ends: dict[tuple[int, int], int]) -> Iterator[None]:
        """Have process ``pid``, or its supervisor, shut down sockets.

        ``ends`` maps each socket, identified by ``(inode, cookie)`` with 0 for the unknown one, to
        the number of its connection.
        """
        from ..supervisor.ptrace import tracer_of  # rarely needed
        from ..supervisor.remote_shutdown import Attempt, Target

        targets = {Target(*end): number for end, number in ends.items()}
        tracer = tracer_of(pid)
        owners = {
            self._remaining[one].listener.owner.pid for (inode, _), one in ends.items() if inode
        }
        problem = f"process {pid} is traced by process {tracer}"
        if not tracer:
            attempt = Attempt(pid, targets)
            while not attempt.is_over(_WAIT_SECONDS if monotonic() < self._wait_until else 0):
                yield
            done, problem = attempt.result()
            for target in done:
                self._end(targets.pop(target))
            problem = f"process {pid} could not be made to close it: {problem or 'not found'}"
        self._problems.update(dict.fromkeys(targets.values(), problem))
        self._ask({tracer} if tracer else {pid, *owners}, targets)

    def _ask(self, supervisors: Iterable[int], targets: dict[Target, int]) -> None:
        """Ask those of the processes ``supervisors`` that are supervisors to close ``targets``."""
        from ..supervisor.remote_shutdown import Requests  # rarely needed

        if self._requests is None:
            self._requests = Requests()
            self._loop.watch(self._requests.fileno(), lambda _: self._take_confirmations())
        for target, number in targets.items():
            for supervisor in supervisors:
                if self._requests.send(supervisor, target):
                    self._asked[target] = number, supervisor
                    self._problems[number] = f"supervisor {supervisor} has not closed it yet"

    def _await_supervisors(self) -> Iterator[None]:
        while self._asked and monotonic() < self._wait_until:
            assert self._requests is not None
            if not select.select([self._requests], [], [], _ASK_AGAIN_SECONDS)[0]:
                # The supervisor could not make the program shut down the stream at that moment.
                for target, (_, supervisor) in self._asked.items():
                    self._requests.send(supervisor, target)
            self._take_confirmations()
            yield

    def _take_confirmations(self) -> None:
        assert self._requests is not None
        for target in self._requests.confirmed():
            asked = self._asked.pop(target, None)
            if asked is not None:
                self._end(asked[0])


def _owners(connection: Connection) -> set[int]:
    """Return the ids of the processes that requested the connecting and the listening socket."""
    return {connection.owner.pid, connection.listener.owner.pid}


#: Check for ended streams after this many new ones, and this many seconds after the last one.
_REAP_EVERY = 256
_REAP_AFTER = 1.0
_REAP_AT_THE_LATEST = 60.0
#: Seconds between two checks for each group of streams, so that checking a hundred thousand streams
#: again and again, while new ones arrive, takes a fortieth of vsockd's time.
_REAP_PAUSE_PER_GROUP = 0.04


class Streams:
    """Every known stream.  vsockd has no descriptor of any of them."""

    def __init__(self, loop: EventLoop, fabric: Fabric, deferred: DeferredWork) -> None:
        self._loop = loop
        self._fabric = fabric
        self._deferred = deferred
        self._liveness = StreamLiveness(fabric.end)
        self.add = self._liveness.add
        self._disconnector = Disconnector(loop, deferred, fabric.end)
        self._new_streams = 0
        self._reap_delay: float | None = None  # None: no timer is set
        self._to_disconnect: list[Connection] = []  # of the previous vsockd

    def save_groups(self, writer: Writer) -> dict[int, Saved]:
        """Return the rows of all groups of registrations, by number."""
        return self._liveness.save_groups(writer)

    def save_early(self, writer: Writer, connections: Iterable[Connection]) -> list[Any]:
        """Return rows of established streams; :meth:`save` then returns the others.

        Nothing changes of an established stream before it ends.  The number of one that has ended
        is not used again for hours (:data:`vsockets.fabric.fabric.LAST_CONNECTION`).
        """
        known = self._fabric.connections
        established = [
            one
            for one in connections
            if known.get(one.number) is one
            and not one.listener.pending
            and one.watch in writer.groups
        ]
        writer.early.connections.update(one.number for one in established)
        return save_connections(writer, established)

    def save(self, writer: Writer) -> Saved:
        """Return the state of all streams, and those to be disconnected, for the next vsockd."""
        early, connections = writer.early.connections, self._fabric.connections
        liveness = self._liveness.save(writer)
        others = [one for number, one in connections.items() if number not in early]
        return {
            "liveness": liveness,
            "connections": save_connections(writer, others),
            "ended": list(early - connections.keys()),
            "remaining": save_connections(writer, self._disconnector.remaining),
            "moved": {
                number: (*one.meter.total,) for number, one in connections.items() if one.meter
            },
        }

    def restore_groups(self, reader: Reader, saved: dict[int, Saved]) -> None:
        """Add groups of registrations that the previous vsockd has saved."""
        self._liveness.restore_groups(reader, saved)

    def restore_connections(self, reader: Reader, saved: Iterable[Any]) -> None:
        """Add streams from rows."""
        found = restore_connections(reader, saved)
        self._fabric.connections.update({one.number: one for one in found})

    def end(self, numbers: Iterable[int]) -> None:
        """End streams that have ended since the previous vsockd saved them."""
        for number in numbers:
            self._fabric.end(number)

    def restore(self, reader: Reader, saved: Saved) -> None:
        """Add the streams that the previous vsockd has saved; endpoints are restored before."""
        self._liveness.restore(reader, saved["liveness"])
        self.restore_connections(reader, saved["connections"])
        self._to_disconnect = restore_connections(reader, saved["remaining"])
        for number, moved in saved.get("moved", {}).items():
            if (stream := self._fabric.connections.get(number)) is not None:
                stream.meter = restore_meter(moved)

    def keep_journal(self, journal: Journal) -> None:
        """Record in ``journal`` which streams have ended before descriptors are reused."""
        self._liveness.before_close = journal.commit

    def resume(self) -> None:
        """Disconnect the streams that the previous vsockd has not disconnected yet."""
        if self._to_disconnect:
            self._disconnector.disconnect(self._to_disconnect)
            self._to_disconnect = []
        self.reap_sometimes()

    def open(self) -> None:
        """Start detecting the end of streams.  Call it after vsockd has forked."""
        self._liveness.open()

    def add_pending(self, channel: Channel, connection: Connection) -> None:
        """Register the socket of ``channel``, handed off to a device that may return it."""
        group = self._liveness.add_pending(channel.sock.fileno(), connection.number, channel.watch)
        connection.watch = channel.watch = group

    def find_accepted(self, inode: int) -> Connection | None:
        """Return the stream whose accepting end has this inode, or None."""
        number = self._liveness.find(inode)
        return None if number is None else self._fabric.connections.get(number)

    def inodes(self) -> dict[int, int]:
        """Return the inodes of accepting ends, by the connection's number, at the last check."""
        return self._liveness.inodes()

    def disconnect(self, connections: Iterable[Connection]) -> list[Connection]:
        """Disconnect streams; return those not disconnected yet (:class:`.Disconnector`)."""
        return self._disconnector.disconnect(connections)

    def disconnect_problem(self, connection: Connection) -> str:
        """Return the reason why a stream could not be disconnected yet."""
        return self._disconnector.problem(connection)

    # Releasing ended streams

    def reap(self) -> None:
        """Release every stream that has ended."""
        for _ in self.reap_in_steps():
            pass

    def reap_in_steps(self) -> Iterator[None]:
        """Release every stream that has ended, a group of streams in each step."""
        self._liveness.end_hung_up(max(1, len(self._liveness.groups())))
        yield from self._check_all()

    def reap_one(self, connection: Connection) -> None:
        """Release ``connection`` if it has ended."""
        assert isinstance(connection.watch, Group)
        for number in connection.watch.hung_up():
            self._fabric.end(number)
        if connection.number in self._fabric.connections:
            self._liveness.check(connection.watch)

    def reap_some(self) -> None:
        """Release some of the ended streams now, the others as deferred work."""
        self._liveness.end_hung_up()
        self._liveness.check_oldest()
        self._deferred.start(self, self._check_all())

    def reap_sometimes(self) -> None:
        """Release ended streams from time to time; called for every new stream."""
        self._new_streams += 1
        if self._new_streams >= _REAP_EVERY:
            self._new_streams = 0
            self._liveness.end_hung_up()
        if self._reap_delay is None:
            self._loop.call_later(_REAP_AFTER, self._reap_later)
        self._reap_delay = max(_REAP_AFTER, _REAP_PAUSE_PER_GROUP * len(self._liveness.groups()))

    def _reap_later(self) -> None:
        assert self._reap_delay is not None
        self.reap_some()
        if self._fabric.connections:
            self._loop.call_later(self._reap_delay, self._reap_later)
            self._reap_delay = min(self._reap_delay * 2, _REAP_AT_THE_LATEST)
        else:
            self._reap_delay = None

    def _check_all(self) -> Iterator[None]:
        for group in self._liveness.groups():
            self._liveness.check(group)
            yield
