"""The choice of a mechanism by which ``vsock run`` intercepts system calls.

Of several seccomp filters the strictest answer counts.  If a container's own filter refuses
AF_VSOCK, notification (:mod:`.notification`) is therefore not possible.  Tracing
(:mod:`.trace_interceptor`) works below such a filter too, and excludes other tracers (gdb, strace).
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Literal, NamedTuple

from .._linux.libc import libc
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
    """A mechanism, its name, and the reason for its selection."""

    mechanism: Mechanism
    name: Name
    reason: str


def choose(wanted: str) -> Choice:
    """Choose the mechanism for this process's programs: ``wanted`` is auto, notify or trace.

    Raises OSError(EBUSY) if this process is under a supervisor itself.
    """
    code = refusal()
    if code == errno.ESOCKTNOSUPPORT:  # a supervisor's answer
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
    trace = Choice(TraceMechanism(), "trace", "selected by --interceptor")
    notify = Choice(NotificationMechanism(), "notify", "selected by --interceptor")
    if wanted != "auto":
        return trace if wanted == "trace" else notify
    if code:
        return trace._replace(reason=f"a seccomp filter refuses AF_VSOCK ({_name(code)})")
    sizes = ctypes.create_string_buffer(_SIZES)
    if libc.syscall(this_architecture().seccomp, _GET_NOTIFICATION_SIZES, 0, sizes) < 0:
        code = ctypes.get_errno()
        return trace._replace(reason=f"seccomp notification is unavailable ({_name(code)})")
    return notify._replace(reason="no seccomp filter refuses AF_VSOCK")


def refusal() -> int:
    """Return the errno by which a seccomp filter refuses AF_VSOCK to this process, or 0.

    No socket is created.  ESOCKTNOSUPPORT means that a supervisor of ``vsock run`` has answered.
    """
    libc.socket(AF_VSOCK, _NO_SUCH_TYPE, 0)
    code = ctypes.get_errno()
    return 0 if code == errno.EINVAL else code


def _name(code: int) -> str:
    return errno.errorcode.get(code, str(code))
