"""SO_PASSRIGHTS of Linux 6.16: whether descriptors can be sent to a unix socket (SCM_RIGHTS).

The sender gets EPERM where they cannot.  A socket that is accepted from a unix listener inherits it
from there, at the moment of its connect.
"""

from __future__ import annotations

import _socket
from socket import AF_UNIX, SOCK_STREAM, SOL_SOCKET

SO_PASSRIGHTS = 83

_set_option = _socket.socket.setsockopt


def _is_known() -> bool:
    sock = _socket.socket(AF_UNIX, SOCK_STREAM)
    try:
        return sock.getsockopt(SOL_SOCKET, SO_PASSRIGHTS) == 1
    except OSError:  # ENOPROTOOPT
        return False
    finally:
        sock.close()


#: Whether the kernel has the option.
IS_KNOWN = _is_known()


def refuse(sock: _socket.socket) -> bool:
    """Have the kernel refuse descriptors that are sent to ``sock``; False where it cannot.

    What was sent before is in its queue.  Never for a vSockets listener: vsockd passes it the
    descriptors of its streams.
    """
    try:
        _set_option(sock, SOL_SOCKET, SO_PASSRIGHTS, 0)
    except OSError:
        return False
    return True


def allow(sock: _socket.socket) -> None:
    """Have the kernel deliver descriptors that are sent to ``sock``, as it does by default."""
    if IS_KNOWN:
        _set_option(sock, SOL_SOCKET, SO_PASSRIGHTS, 1)
