"""The process that starts vsockd again when it is killed or has crashed.

The holder starts vsockd as a child that shares its table of descriptors, so they stay open when the
child is killed, at no cost: nothing has to be sent or copied for each socket.  Holder and child
also share the memory that has the request under way (:mod:`.in_flight`) and the descriptor of the
journal (:mod:`.journal`).  From both the next child restores the state.

The holder does nothing else: it waits, passes signals on, and reports to the service manager.  When
it ends, however it ends, vsockd ends.  After a replacement (:mod:`.succession`) the successor has a
holder of its own, and the first holder of all remains for the service manager.
"""

from __future__ import annotations

import logging
import os
import signal
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

from .._linux.cloning import clone_sharing_descriptors
from .._linux.inspection import open_descriptors
from .._linux.process import notify_ready
from .in_flight import InFlight, Step
from .limits import DAEMON_RESTARTS_SECONDS
from .succession import FORWARDED, adopt_orphans, wait_for_successors

log = logging.getLogger(__name__)

#: Sent by vsockd to its holder when it serves.
_READY = signal.SIGUSR1
_EXPECTED = {*FORWARDED, signal.SIGCHLD, _READY}
#: The identity of an open file: a number may be used again.
_Identity = tuple[int, int]


class Holder:
    """The holder's side of a vsockd; in vsockd's own process, the connection to the holder."""

    def __init__(self, restarts: int, remains: bool) -> None:
        """Start vsockd again at most ``restarts`` times within DAEMON_RESTARTS_SECONDS.

        With ``remains``, this process also waits for the vsockds that replace its own.
        """
        self._restarts = restarts
        self._remains = remains
        self._ending = False
        self.in_flight = InFlight()
        self.is_again = False  #: whether this vsockd replaces one that was killed
        self._inherited = {fd: _identity(fd) for fd in open_descriptors()}

    @property
    def inherited(self) -> set[int]:
        """The descriptors that are not vsockd's, and the three standard ones."""
        # vsockd in the background has replaced those three.
        return {0, 1, 2} | {fd for fd, one in self._inherited.items() if _identity(fd) == one}

    def run(self, serve: Callable[[Holder | None], int]) -> int:
        """Call ``serve`` in a child process, again when that was killed; return the exit status.

        Where the kernel does not allow such a child, call ``serve`` with None in this process.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, _EXPECTED)
        starts: deque[float] = deque()
        status = 0
        while True:
            try:
                os.close(os.memfd_create("vsockd-journal"))  # allowed, if the journal is
                pid = clone_sharing_descriptors()
            except OSError as error:
                if self.is_again:
                    log.error("vsockd cannot be started again: %s", error)
                    return status
                log.warning("vsockd is not started again if it is killed: %s", error)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _EXPECTED)
                return serve(None)
            if not pid:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _EXPECTED - set(FORWARDED))
                return serve(self)
            if self._remains:
                adopt_orphans()
            code = os.waitstatus_to_exitcode(self._wait(pid))
            if self.in_flight.is_done(Step.HAND_OVER):
                return self._leave()
            is_killed = code < 0 and -code not in FORWARDED
            status = code if code >= 0 else 128 - code
            if not is_killed or self._ending or self.in_flight.memory.journal < 0:
                return status
            name = signal.Signals(-code).name
            while starts and starts[0] < time.monotonic() - DAEMON_RESTARTS_SECONDS:
                starts.popleft()
            if len(starts) >= self._restarts:
                log.error("vsockd was ended by %s again: it is not restarted", name)
                return status
            starts.append(time.monotonic())
            log.error("vsockd was ended by %s: starting it again", name)
            self.is_again = True

    def announce_ready(self) -> None:
        """Report to the holder's service manager, from vsockd, that vsockd serves."""
        os.kill(os.getppid(), _READY)

    def _wait(self, pid: int) -> int:
        """Return the wait status of vsockd when it has ended."""
        while True:
            try:
                while ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    _, status = os.waitpid(ended.si_pid, 0)
                    if ended.si_pid == pid:
                        return status
            except ChildProcessError:
                return 0
            number = signal.sigwait(_EXPECTED)
            if number == _READY:
                notify_ready()
            elif number != signal.SIGCHLD:
                self._ending |= number != signal.SIGHUP
                os.kill(pid, number)

    def _leave(self) -> int:
        """Close all descriptors, which the successor has now; wait for the successor, or end."""
        folder = self.in_flight.memory.folder
        if not self._remains:
            return 0
        os.closerange(3, folder)
        os.closerange(folder + 1, os.sysconf("SC_OPEN_MAX"))
        return wait_for_successors(Path(f"/proc/self/fd/{folder}"), self._ending)


def _identity(fd: int) -> _Identity | None:
    try:
        found = os.fstat(fd)
    except OSError:
        return None
    return found.st_dev, found.st_ino
