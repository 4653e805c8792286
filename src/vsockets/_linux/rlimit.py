"""The limit of a process's descriptors."""

from __future__ import annotations

import contextlib
import resource


def allow_many_descriptors() -> None:
    """Raise the soft limit of descriptors to the hard limit.

    For programs that hold descriptors for each connection of their clients.  The usual soft limit
    is for programs that call select().
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # a hard limit above fs.nr_open
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
