"""Descriptors that stay free, so that vsockd can serve when clients have taken the others.

The kernel gives out the lowest free number.  So the number of a new descriptor tells how many are
in use at least, and nothing has to be counted: one of the reserve is used for what ends at once (a
connect, a question, a refusal), and not kept.
"""

from __future__ import annotations

import errno
import logging
import resource

from .. import logs
from ..fabric import Refused
from .limits import DAEMON_DESCRIPTOR_RESERVE

log = logging.getLogger(__name__)


def require_free(fd: int) -> None:
    """Raise Refused (ENOBUFS) if ``fd``, a new descriptor, is of the reserve."""
    limit, reserve = _sizes()
    if fd >= limit - reserve:
        log.warning("few descriptors are left: new sockets are refused", extra=logs.rare(__name__))
        raise Refused(errno.ENOBUFS, "vsockd has few descriptors left")


def may_stay(fd: int) -> bool:
    """Return whether ``fd`` may be kept until its next request: below the reserve's middle."""
    limit, reserve = _sizes()
    return fd < limit - reserve // 2


def most_brief() -> int:
    """Return how many of the higher half may wait for their first request."""
    return _sizes()[1] // 4


def _sizes() -> tuple[int, int]:
    """Return how many descriptors the process may have, and how many of them are the reserve."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return limit, min(DAEMON_DESCRIPTOR_RESERVE, limit // 4)
