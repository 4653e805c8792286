"""socket(), and open() of ``/dev/vsock``."""

from __future__ import annotations

import errno
import fcntl
import os
from socket import SOCK_CLOEXEC, SOCK_DGRAM, SOCK_NONBLOCK, SOCK_SEQPACKET, SOCK_STREAM

from ...model.constants import AF_VSOCK
from ..call import Answer, Call, failure

DEVICE = b"/dev/vsock\0"
#: The name, in /proc, of the file that stands for ``/dev/vsock``.
DEVICE_NAME = "vsock-device"

_TYPE_BITS = ~int(SOCK_NONBLOCK | SOCK_CLOEXEC)
_TYPES = (int(SOCK_STREAM), int(SOCK_SEQPACKET), int(SOCK_DGRAM))


async def socket(call: Call) -> Answer:
    """Serve socket(AF_VSOCK, …); the filter intercepts no other family."""
    asked, protocol = call.integer(1), call.integer(2)
    type_ = asked & _TYPE_BITS
    if protocol not in (0, AF_VSOCK):
        raise failure(errno.EPROTONOSUPPORT)
    if type_ not in _TYPES:
        raise failure(errno.ESOCKTNOSUPPORT)
    call.create_socket(asked)
    return None


async def open_(call: Call) -> Answer:
    """Serve open() of ``/dev/vsock``."""
    return _open(call, call.integer(1))


async def openat(call: Call) -> Answer:
    """Serve openat() of ``/dev/vsock``."""
    return _open(call, call.integer(2))


def _open(call: Call, flags: int) -> Answer:
    # The path was read once, by the dispatcher: a change since has no effect.
    call.check()
    device = os.memfd_create(DEVICE_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        fcntl.fcntl(device, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW)
        call.answer_with_descriptor(device, bool(flags & os.O_CLOEXEC))
    finally:
        os.close(device)
    return None


def is_device(link: str) -> bool:
    """Return whether a link of /proc is that of ``/dev/vsock``, the stand-in or the device."""
    return link.startswith(f"/memfd:{DEVICE_NAME}") or link == DEVICE[:-1].decode()
