"""Doing what a call asks with its caller's rights, where we are root and have the choice."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from . import syscalls
from .exports import Identity


@contextlib.contextmanager
def run_as(identity: Identity) -> Iterator[None]:
    """Within the block our rights to files are ``identity``'s; without root, our own."""
    if os.geteuid() != 0 or identity == (0, 0, ()):
        yield
        return
    own = tuple(os.getgroups())
    try:
        syscalls.act_with(*identity)
        yield
    finally:
        syscalls.act_with(0, os.getegid(), own)
