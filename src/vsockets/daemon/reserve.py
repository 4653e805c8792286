"""Reserved descriptors, so that vsockd can serve while clients have taken all others.

The kernel assigns the lowest free number.  So the number of a new descriptor bounds from below how
many are in use, and vsockd need not count.  A descriptor of the reserve is used for what completes
at once (a connect, a query, a refusal), and is not kept.
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
    """Raise Refused with ENOBUFS if ``fd``, a new descriptor, is in the reserve."""
    limit, reserve = _sizes()
    if fd >= limit - reserve:
        log.warning("few descriptors are left: refusing new sockets", extra=logs.rare(__name__))
        raise Refused(errno.ENOBUFS, "vsockd has few descriptors left")


def may_keep(fd: int) -> bool:
    """Return whether ``fd`` may be kept for the next request: it is in the reserve's lower half."""
    limit, reserve = _sizes()
    return fd < limit - reserve // 2


def max_silent() -> int:
    """Return how many descriptors of the upper half may wait for their first request."""
    return _sizes()[1] // 4


def _sizes() -> tuple[int, int]:
    """Return the process's limit of descriptors, and how many of them are the reserve."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return limit, min(DAEMON_DESCRIPTOR_RESERVE, limit // 4)
