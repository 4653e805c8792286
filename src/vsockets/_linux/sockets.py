"""Socket options and ancillary data of Linux that the standard library does not name."""

from __future__ import annotations

import _socket
import contextlib
import struct
from collections.abc import Collection, Iterator
from socket import AF_UNIX, CMSG_LEN, SCM_RIGHTS, SOCK_STREAM, SOL_SOCKET, socket
from typing import Any

SO_SNDBUFFORCE = 32  #: SO_SNDBUF above the system's limit (CAP_NET_ADMIN)
SO_COOKIE = 57  #: a number of 64 bits that the kernel gives to one socket only
#: Linux 6.16: whether descriptors can be sent to a unix socket (SCM_RIGHTS); the sender gets EPERM
#: if they cannot.  An accepted socket inherits the option at the moment of the connect.
SO_PASSRIGHTS = 83

#: ``struct timeval``, on 64-bit machines the same as ``struct __kernel_sock_timeval``.
TIMEVAL = struct.Struct("=qq")

_DESCRIPTOR = struct.Struct("i")
#: Room for one descriptor in a received ancillary message.
DESCRIPTOR_SPACE = CMSG_LEN(_DESCRIPTOR.size)

_set_option, _get_option = _socket.socket.setsockopt, _socket.socket.getsockopt


def cookie_of(sock: _socket.socket) -> int:
    """Return the number by which the kernel identifies ``sock`` (SO_COOKIE)."""
    return int.from_bytes(_get_option(sock, SOL_SOCKET, SO_COOKIE, 8), "little")


def pack_timeval(seconds: float) -> bytes:
    """Return ``seconds`` as the bytes of a ``struct timeval``."""
    whole = int(seconds)
    return TIMEVAL.pack(whole, int((seconds - whole) * 1e6))


def timeout_of(sock: _socket.socket, option: int) -> float:
    """Return a socket's SO_RCVTIMEO or SO_SNDTIMEO in seconds; 0 means no timeout."""
    seconds, microseconds = TIMEVAL.unpack(_get_option(sock, SOL_SOCKET, option, TIMEVAL.size))
    return float(seconds + microseconds / 1e6)


@contextlib.contextmanager
def closed_on_failure(sock: socket) -> Iterator[None]:
    """Close ``sock`` if the with block fails."""
    try:
        yield
    except BaseException:
        sock.close()
        raise


def connect_to_any(kind: int, addresses: Collection[tuple[int, Any]]) -> socket:
    """Return a socket connected to the first of ``addresses``, each a family and an address.

    Raises OSError of the last address if no connect succeeds.
    """
    for number, (family, address) in enumerate(addresses, 1):
        sock = socket(family, kind)
        try:
            sock.connect(address)
        except OSError:
            sock.close()
            if number == len(addresses):
                raise
        else:
            return sock
    raise AssertionError("no address was given")


# Descriptors in messages (SCM_RIGHTS)


def descriptor_in(ancillary: list[tuple[int, int, bytes]]) -> int | None:
    """Return the descriptor in ``ancillary``, as recvmsg() returns it, or None."""
    for level, kind, data in ancillary:
        if level == SOL_SOCKET and kind == SCM_RIGHTS and len(data) >= _DESCRIPTOR.size:
            fd: int = _DESCRIPTOR.unpack_from(data)[0]
            return fd
    return None


def with_descriptor(fd: int) -> tuple[int, int, bytes]:
    """Return the ancillary data that sends ``fd`` along with a message."""
    return SOL_SOCKET, SCM_RIGHTS, _DESCRIPTOR.pack(fd)


def _has_passrights() -> bool:
    sock = _socket.socket(AF_UNIX, SOCK_STREAM)
    try:
        return sock.getsockopt(SOL_SOCKET, SO_PASSRIGHTS) == 1
    except OSError:  # ENOPROTOOPT
        return False
    finally:
        sock.close()


#: Whether the kernel has SO_PASSRIGHTS.
HAS_PASSRIGHTS = _has_passrights()


def refuse_descriptors(sock: _socket.socket) -> bool:
    """Have the kernel refuse descriptors that are sent to ``sock``.

    Descriptors that were sent before stay in the queue.  A vSockets listener must not refuse them,
    because vsockd sends it the descriptors of its streams.

    Returns False if the kernel does not have the option (before Linux 6.16).
    """
    try:
        _set_option(sock, SOL_SOCKET, SO_PASSRIGHTS, 0)
    except OSError:
        return False
    return True


def allow_descriptors(sock: _socket.socket) -> None:
    """Have the kernel deliver descriptors that are sent to ``sock``, as it does by default."""
    if HAS_PASSRIGHTS:
        _set_option(sock, SOL_SOCKET, SO_PASSRIGHTS, 1)
