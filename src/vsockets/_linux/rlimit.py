"""The limit on the number of a process's descriptors (RLIMIT_NOFILE)."""

from __future__ import annotations

import contextlib
import resource


def allow_many_descriptors() -> None:
    """Raise the soft limit of descriptors to the hard limit.

    For programs that hold descriptors for every client connection.  The usual soft limit of 1024
    exists for programs that call select().
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # a hard limit above fs.nr_open
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
