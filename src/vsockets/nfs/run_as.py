"""Perform file operations with the caller's uid and gid (root only)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from . import syscalls
from .exports import Identity


@contextlib.contextmanager
def run_as(identity: Identity) -> Iterator[None]:
    """Run the block with the file system rights of ``identity``.

    If this process is not root, the block runs with the rights of this process.
    """
    if os.geteuid() != 0 or identity == (0, 0, ()):
        yield
        return
    own = tuple(os.getgroups())
    try:
        syscalls.set_file_rights(*identity)
        yield
    finally:
        syscalls.set_file_rights(0, os.getegid(), own)
