"""The intercepted system calls, a module for each family of them.

``HANDLERS`` are the calls that make descriptors, ``SOCKET_HANDLERS`` those about a socket in
their first argument, ``ARGUMENTS`` how many each has; all by the call's name, an attribute of
``Machine``.
"""

from __future__ import annotations

from ..call import Handler, SocketHandler
from .accepting import accept, accept4
from .connecting import connect
from .creating import open_, openat, socket
from .datagrams import sendmmsg, sendmsg, sendto, write, writev
from .messages import recvfrom, recvmmsg, recvmsg
from .naming import bind, getpeername, getsockname, listen, shutdown
from .options import getsockopt, ioctl, setsockopt

HANDLERS: dict[str, Handler] = {
    "socket": socket,
    "open": open_,
    "openat": openat,
    "ioctl": ioctl,
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

ARGUMENTS = {
    "socket": 3,
    "open": 2,
    "openat": 3,
    "ioctl": 3,
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
