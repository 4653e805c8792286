"""Who is at the other end of a unix socket, asked of the kernel."""

from __future__ import annotations

import os
import select
import struct
from socket import SO_PEERCRED, SOL_SOCKET
from typing import Protocol, overload

from ..fabric import Credentials

CAP_NET_BIND_SERVICE = 10
CAP_NET_ADMIN = 12

#: getsockopt(2): a pidfd of the process that connected (Linux 6.5).
_SO_PEERPIDFD = 77

_UCRED = struct.Struct("iII")


class _Socket(Protocol):
    @overload
    def getsockopt(self, level: int, optname: int, /) -> int: ...
    @overload
    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes: ...


def peer_credentials(sock: _Socket) -> Credentials:
    """The process that connected ``sock``, as it was when it connected."""
    return Credentials._make(_UCRED.unpack(sock.getsockopt(SOL_SOCKET, SO_PEERCRED, _UCRED.size)))


def has_capability(sock: _Socket, capability: int) -> bool:
    """Whether the process that connected ``sock`` has ``capability`` now.

    It must have it in vsockd's own user namespace: root of a namespace a user made for
    himself does not count.  False whenever the kernel will not say, so a process that has
    gone, or one in a pid namespace vsockd cannot see, has no privilege.
    """
    pid = peer_credentials(sock).pid
    if pid <= 0:
        return False
    try:
        pidfd = _peer_pidfd(sock, pid)
    except OSError:
        return False
    try:
        if os.stat(f"/proc/{pid}/ns/user").st_ino != os.stat("/proc/self/ns/user").st_ino:
            return False
        with open(f"/proc/{pid}/status", "rb") as status:
            held = next((int(row.split()[1], 16) for row in status if row[:7] == b"CapEff:"), 0)
        # Alive after the reading means alive during it: the number was not reused.
        return not _exited(pidfd) and bool(held >> capability & 1)
    except OSError:
        return False
    finally:
        os.close(pidfd)


def _peer_pidfd(sock: _Socket, pid: int) -> int:
    try:
        return sock.getsockopt(SOL_SOCKET, _SO_PEERPIDFD)
    except OSError:  # before Linux 6.5 the number is all there is
        return os.pidfd_open(pid)


def _exited(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
