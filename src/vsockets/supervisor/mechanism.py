"""The choice of a mechanism by which ``vsock run`` intercepts system calls.

Notification (:mod:`.notification`) needs a seccomp filter whose answer counts, and a container's
own filter that refuses AF_VSOCK has the stricter one.  Tracing (:mod:`.trace_interceptor`) works
below such a filter too, and excludes other tracers (gdb, strace).
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Literal, NamedTuple

from ..model.constants import AF_VSOCK
from .arch import this_architecture
from .interception import Mechanism
from .notification import NotificationMechanism
from .trace_interceptor import TraceMechanism

#: A type of sockets that does not exist: the kernel refuses it before it looks at the family, so
#: no socket is made, and no module is loaded.
_NO_SUCH_TYPE = 77
_GET_NOTIFICATION_SIZES = 3
_SIZES = 8


#: The names of the mechanisms.
Name = Literal["notify", "trace"]


class Choice(NamedTuple):
    """A mechanism, and why it was chosen."""

    mechanism: Mechanism
    name: Name
    reason: str


def choose(wanted: Literal["auto"] | Name) -> Choice:
    """Choose the mechanism for this process's programs.  OSError EBUSY: this process is such a
    program itself.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    code = _errno_of(libc.socket(AF_VSOCK, _NO_SUCH_TYPE, 0))
    if code == errno.ESOCKTNOSUPPORT:  # a supervisor's answer
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
    if wanted == "trace":
        return Choice(TraceMechanism(), wanted, "as asked for")
    notification = Choice(NotificationMechanism(), "notify", "as asked for")
    if wanted == "notify":
        return notification
    if code != errno.EINVAL:
        reason = f"a seccomp filter refuses AF_VSOCK ({errno.errorcode.get(code, code)})"
        return Choice(TraceMechanism(), "trace", reason)
    sizes = ctypes.create_string_buffer(_SIZES)
    code = _errno_of(libc.syscall(this_architecture().seccomp, _GET_NOTIFICATION_SIZES, 0, sizes))
    if code:
        reason = f"seccomp notification is unavailable ({errno.errorcode.get(code, code)})"
        return Choice(TraceMechanism(), "trace", reason)
    return notification._replace(reason="no seccomp filter refuses AF_VSOCK")


def _errno_of(result: int) -> int:
    return ctypes.get_errno() if result < 0 else 0
