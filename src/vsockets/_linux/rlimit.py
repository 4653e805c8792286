"""How many descriptors a process may have."""

from __future__ import annotations

import contextlib
import resource


def allow_many_descriptors() -> None:
    """As many as the hard limit says: the usual soft one is for programs that use select().

    For whoever holds some for every connection or socket of others.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # a hard limit above fs.nr_open
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
