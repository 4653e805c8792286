"""Handlers of the intercepted system calls, a module for each family of them.

``HANDLERS`` are those of calls that create descriptors or take a path, ``SOCKET_HANDLERS`` those of
calls with a socket as their first argument.  ``CHECKING`` names the calls whose handlers check by
themselves, before any effect, that the call still waits.  Those of ``DUPLICATING`` also get a copy
of the socket before they look at its state.  ``ARGUMENTS`` are the numbers of arguments, ``PATHS``
the indexes of the path.  All are keyed by the call's name, an attribute of ``Architecture``.
"""

from __future__ import annotations

from ..call import Handler, SocketHandler
from .addresses import bind, getpeername, getsockname
from .connecting import accept, accept4, connect, listen, shutdown
from .creating import (
    access,
    faccessat,
    faccessat2,
    newfstatat,
    open_,
    openat,
    socket,
    stat,
    statx,
)
from .datagrams import sendmmsg, sendmsg, sendto, write, writev
from .options import getsockopt, ioctl, setsockopt
from .receive import recvfrom, recvmmsg, recvmsg

HANDLERS: dict[str, Handler] = {
    "socket": socket,
    "open": open_,
    "openat": openat,
    "ioctl": ioctl,
    "stat": stat,
    "lstat": stat,
    "newfstatat": newfstatat,
    "statx": statx,
    "access": access,
    "faccessat": faccessat,
    "faccessat2": faccessat2,
}

PATHS = {
    "open": 0,
    "openat": 1,
    "stat": 0,
    "lstat": 0,
    "newfstatat": 1,
    "statx": 1,
    "access": 0,
    "faccessat": 1,
    "faccessat2": 1,
}

SOCKET_HANDLERS: dict[str, SocketHandler] = {
    "bind": bind,
    "listen": listen,
    "accept": accept,
    "accept4": accept4,
    "connect": connect,
    "getsockname": getsockname,
    "getpeername": getpeername,
    "shutdown": shutdown,
    "setsockopt": setsockopt,
    "getsockopt": getsockopt,
    "sendto": sendto,
    "sendmsg": sendmsg,
    "sendmmsg": sendmmsg,
    "write": write,
    "writev": writev,
    "recvfrom": recvfrom,
    "recvmsg": recvmsg,
    "recvmmsg": recvmmsg,
}

DUPLICATING = ("accept", "accept4", "connect")
CHECKING = (*DUPLICATING, "getsockname", "getpeername")

ARGUMENTS = {
    "socket": 3,
    "open": 2,
    "openat": 3,
    "ioctl": 3,
    "stat": 2,
    "lstat": 2,
    "newfstatat": 4,
    "statx": 5,
    "access": 2,
    "faccessat": 3,
    "faccessat2": 4,
    "bind": 3,
    "listen": 2,
    "accept": 3,
    "accept4": 4,
    "connect": 3,
    "getsockname": 3,
    "getpeername": 3,
    "shutdown": 2,
    "setsockopt": 5,
    "getsockopt": 5,
    "sendto": 6,
    "sendmsg": 3,
    "sendmmsg": 4,
    "write": 3,
    "writev": 3,
    "recvfrom": 6,
    "recvmsg": 3,
    "recvmmsg": 5,
}
