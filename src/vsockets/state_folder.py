"""Where a fabric keeps its sockets, and how programs find it.

``VSOCKETS_DIR``, by default ``/run/vsock`` for root and ``$XDG_RUNTIME_DIR/vsock`` (else
``/tmp/vsock-UID``) for a user, holds::

    vsockd.lock     held by the running vsockd; names its process
    vsockd.log      the log of a vsockd that was started on demand; vsockd.log.1: the one before
    control         the administrator's socket
    CID/stream      a context's control sockets: all a program in it needs,
    CID/seqpacket       so a container becomes a guest by mounting this one folder
    private/        vsockd's own
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

#: sockaddr_un holds 108 bytes, the last one a NUL.
_LONGEST_SOCKET_PATH = 107

STREAM = "stream"
SEQPACKET = "seqpacket"
CONTROL = "control"
LOCK = "vsockd.lock"
LOG = "vsockd.log"
PRIVATE = "private"
LIVES = "lives"  # in private/


def default_folder() -> Path:
    """The state folder this process uses unless told otherwise.  It need not exist."""
    configured = os.environ.get("VSOCKETS_DIR")
    if configured:
        return Path(configured)
    if os.geteuid() == 0:
        return Path("/run/vsock")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        return Path(runtime, "vsock")
    return Path(f"/tmp/vsock-{os.geteuid()}")


def require_private(folder: Path) -> None:
    """Raise PermissionError unless ``folder`` is ours to trust.

    Under ``/tmp`` anybody could have made it first, and then be everybody's host.
    """
    found = os.lstat(folder)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (os.geteuid(), 0):
        raise PermissionError(f"{folder} is not a folder of user {os.geteuid()}: not using it")
    if found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
        raise PermissionError(f"{folder} can be written by others: not using it")


@contextmanager
def short_path(path: str | os.PathLike[str]) -> Iterator[str]:
    """A spelling of ``path`` that fits a unix socket address, while the context lasts.

    A path of more than 107 bytes is reached through a descriptor of its folder.
    """
    spelled = os.fspath(path)
    if len(os.fsencode(spelled)) <= _LONGEST_SOCKET_PATH:
        yield spelled
        return
    parent, name = os.path.split(spelled)
    folder = os.open(parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{name}"
    finally:
        os.close(folder)


def is_short(path: str) -> bool:
    """Whether ``path`` fits a unix socket address as it is, and that is quickly seen."""
    return len(path) <= _LONGEST_SOCKET_PATH and path.isascii()


def connect_to(connect: Callable[[str], None], path: str) -> None:
    """Call ``connect``, of a unix socket, with ``path``, however long that is."""
    if is_short(path):
        connect(path)
        return
    with short_path(path) as spelled:
        connect(spelled)


def remove_stale(path: str | os.PathLike[str]) -> None:
    """Remove the unix socket at ``path`` if nobody holds it any more.

    Where there is something else bind() says so: EADDRINUSE.
    """
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as probe:
        try:
            connect_to(probe.connect, os.fspath(path))
        except ConnectionRefusedError:
            os.unlink(path)
        except OSError:
            pass  # another type, which is alive; or not ours
