"""Access files with the rights of a guest's owner, and without privileges."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import struct
from collections.abc import Iterator

from .._linux.libc import last_error, libc

#: Number of setgroups(2), for one thread: the C library's function waits for all threads, and one
#: of them may be blocked by a file system.
_SETGROUPS = {"x86_64": 116, "aarch64": 159}

_NOBODY = 65_534
_UNCHANGED = ctypes.c_uint32(0xFFFF_FFFF)


@contextlib.contextmanager
def acting_as(user: int) -> Iterator[None]:
    """Access files, in this context and thread, with the rights of ``user``, without any group.

    Raises PermissionError if vsockd may not act as another user.
    """
    own = os.geteuid()
    if user == own:
        yield
        return
    groups = os.getgroups()
    if own or not _act(user, _NOBODY, []):
        raise PermissionError(errno.EPERM, f"vsockd may not use files as user {user}")
    try:
        yield
    finally:
        _act(own, os.getegid(), groups)


def _act(user: int, group: int, groups: list[int]) -> bool:
    if user:  # groups first: setting them needs the privilege
        _set_groups(groups)
        libc.setfsgid(ctypes.c_uint32(group))
    libc.setfsuid(ctypes.c_uint32(user))
    if not user:
        libc.setfsgid(ctypes.c_uint32(group))
        _set_groups(groups)
    return ctypes.c_uint32(libc.setfsuid(_UNCHANGED)).value == user


def _set_groups(groups: list[int]) -> None:
    call = _SETGROUPS.get(platform.machine())
    if call is None:
        os.setgroups(groups)
    elif libc.syscall(call, len(groups), struct.pack(f"{len(groups)}I", *groups)):
        raise last_error()
