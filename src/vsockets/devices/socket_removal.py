"""Removal of a device's socket once its process has ended.

The device cannot remove the socket itself: its sandbox (:mod:`.sandbox`) has dropped the user and
every system call on paths.  A child process, which does nothing else, waits for the device's end.
"""

from __future__ import annotations

import os
import signal
import socket

from .._linux.folders import SocketFile

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class SocketRemoval:
    """Removal of a socket's ``file`` when this process ends in any way.

    Create it before :func:`.sandbox.enter_sandbox`, in a process with one thread.
    """

    def __init__(self, file: SocketFile) -> None:
        self._child, theirs = socket.socketpair()
        # A signal to both must not end the child before it ignores signals.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            if os.fork() == 0:
                try:
                    _remove_afterwards(file, theirs.detach())
                finally:
                    os._exit(0)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        theirs.close()

    def finish(self) -> None:
        """Remove the socket now, and wait until it is removed."""
        self._child.shutdown(socket.SHUT_WR)
        self._child.recv(1)
        self._child.close()


def _remove_afterwards(file: SocketFile, end: int) -> None:
    # A service manager and a terminal signal every process of the device; this one ends last.
    os.setsid()
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    kept = sorted((end, file.folder))
    for first, last in zip([-1, *kept], [*kept, os.sysconf("SC_OPEN_MAX")], strict=True):
        os.closerange(first + 1, last)
    os.read(end, 1)
    file.remove()
