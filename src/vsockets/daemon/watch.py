"""Knowing when a stream ends without holding it open.

vsockd must not keep a descriptor of a stream it brokered: the peers would never see its end.
But an epoll registration outlives the descriptor it was made with for as long as *somebody*
has the socket open, and it holds nothing open itself.  So each brokered stream is registered
here, in an epoll that is asked only now and then:

- the connecting side closed: the kernel reports EPOLLHUP for the accepting side's socket;
- the accepting side closed: the registration is gone from ``/proc/self/fdinfo``, which lists
  what an epoll watches, and also the socket's inode.

It works across network and pid namespaces, and whoever holds the socket by then.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import select

_EPOLL_CTL_ADD, _EPOLL_CTL_MOD = 1, 3
_ENTRY = re.compile(rb"data:\s*([0-9a-f]+)\s+pos:\s*\d+\s+ino:([0-9a-f]+)")


class _EpollEvent(ctypes.Structure):
    # The kernel packs it on x86-64 only, for its 32-bit programs' sake.
    if platform.machine() in ("x86_64", "AMD64"):
        _pack_ = 1
    _fields_ = (("events", ctypes.c_uint32), ("data", ctypes.c_uint64))


# The standard library's epoll reports descriptor numbers, and ours are closed and reused;
# epoll_ctl(2) itself takes any number to report.  It never waits, so the GIL is kept.
_epoll_ctl = ctypes.PyDLL(None, use_errno=True).epoll_ctl


class StreamWatch:
    """The streams that were brokered, by their connections' numbers."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._fd = self._epoll.fileno()
        self._event = _EpollEvent(select.EPOLLET, 0)  # EPOLLHUP is always reported
        self._event_at = ctypes.byref(self._event)
        #: a number that stands for each socket lent, and for nothing else in between
        self._lending = os.dup(self._fd)
        self._registrations = -1

    def open(self) -> None:
        """Be able to tell who is present also when no descriptor is left.

        Called in the process that goes on: ``/proc/self`` is whoever opens it.
        """
        if self._registrations < 0:
            path = f"/proc/self/fdinfo/{self._fd}"
            self._registrations = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def add(self, fd: int, number: int) -> None:
        """Watch the stream that ``fd`` is one end of.  ``number`` fits 31 bits."""
        self._control(_EPOLL_CTL_ADD, fd, number)

    def lend(self, fd: int, number: int) -> None:
        """As :meth:`add`, for a socket that may come back, and be lent again as another stream.

        The kernel knows a registration by the socket and the descriptor's number, and the socket
        comes back with another one; so all are registered with the same.
        """
        os.dup2(fd, self._lending, inheritable=False)
        try:
            self._control(_EPOLL_CTL_ADD, self._lending, number)
        except FileExistsError:
            self._control(_EPOLL_CTL_MOD, self._lending, number)
        finally:
            os.dup2(self._fd, self._lending, inheritable=False)

    def _control(self, operation: int, fd: int, number: int) -> None:
        self._event.data = number
        if _epoll_ctl(self._fd, operation, fd, self._event_at) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def hung_up(self) -> list[int]:
        """The streams whose connecting side has closed since the last call."""
        return [number for number, _ in self._epoll.poll(0, 4096)]

    def present(self) -> dict[int, int]:
        """The streams whose accepting side somebody still has open, and its inode.

        Costs a read proportional to the number of streams.
        """
        self.open()
        os.lseek(self._registrations, 0, os.SEEK_SET)
        text = b"".join(iter(lambda: os.read(self._registrations, 1 << 16), b""))
        found = _ENTRY.findall(text)
        return {int(number, 16): int(inode, 16) for number, inode in found}
