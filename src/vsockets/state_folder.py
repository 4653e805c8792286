"""Where a fabric keeps its sockets, and how programs find it.

``VSOCKETS_DIR``, by default ``/run/vsock`` for root and ``$XDG_RUNTIME_DIR/vsock`` (else
``/tmp/vsock-UID``) for a user, holds::

    vsockd.lock     held by the running vsockd; names its process
    vsockd.start    how it was started, for the time after a crash
    vsockd.log      the log of a vsockd that was started on demand; vsockd.log.1: the one before
    control         the administrator's socket
    CID/stream      a context's control sockets, its owner's: all a program in it needs,
    CID/seqpacket       so a container becomes a guest by mounting this one folder
    private/        vsockd's own
"""

from __future__ import annotations

import _socket
import contextlib
import errno
import functools
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from socket import SO_SNDTIMEO, SOL_SOCKET

from ._linux import folders
from ._linux.sockets import TIMEVAL

#: sockaddr_un holds 108 bytes, the last one a NUL.
_LONGEST_SOCKET_PATH = 107

# As unix sockets have them, whatever the class.
_connect, _peer_of = _socket.socket.connect, _socket.socket.getpeername
_set_timeout = _socket.socket.settimeout

STREAM = "stream"
SEQPACKET = "seqpacket"
CONTROL = "control"
LOCK = "vsockd.lock"
LOG = "vsockd.log"
PRIVATE = "private"
START = "vsockd.start"
# In private/:
ISOLATED = "isolated"
LIVES = "lives"
TRASH = "trash"


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


def require_private(folder: Path, create: bool = False) -> None:
    """Raise PermissionError unless the state folder ``folder`` is ours or root's, for good.

    Under ``/tmp`` any user could have made it first, and then be every program's host; and a folder
    above it that others can change leads elsewhere the next moment.  With ``create`` it is made.
    """
    folder = folder.absolute()
    try:
        above = folders.open_folder(folder.parent, private=True, create=0o755 if create else None)
    except PermissionError as error:
        raise PermissionError(f"{error.filename}: {error.strerror}: not using {folder}") from None
    try:
        if create:
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder.name, 0o755 if os.geteuid() == 0 else 0o700, dir_fd=above)
        found = os.stat(folder.name, dir_fd=above, follow_symlinks=False)
    finally:
        os.close(above)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (os.geteuid(), 0):
        raise PermissionError(f"{folder} is not a folder of user {os.geteuid()}: not using it")
    if found.st_mode & 0o022:
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


def wait_to_connect(sock: _socket.socket, path: str, seconds: float) -> float:
    """Connect ``sock`` to ``path``, where the backlog was full, within ``seconds``.

    Returns what is left of them.  OSError: ETIMEDOUT, or ENOBUFS when there are none.
    """
    if seconds <= 0:
        raise OSError(errno.ENOBUFS, f"vsockd at {path} has too much to do")
    deadline = time.monotonic() + seconds
    timeout = sock.gettimeout()
    before = sock.getsockopt(SOL_SOCKET, SO_SNDTIMEO, TIMEVAL.size)
    # The kernel lets those in that wait in it, not those that try again now and then.
    _set_timeout(sock, None)
    try:
        while (left := deadline - time.monotonic()) > 0:
            sock.setsockopt(
                SOL_SOCKET, SO_SNDTIMEO, TIMEVAL.pack(int(left), 1 + int(left % 1 * 1e6))
            )
            try:
                connect_to(functools.partial(_connect, sock), path)
                _peer_of(sock)  # when interrupted by a signal, Python believes in success
                return max(1e-6, deadline - time.monotonic())
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno != errno.ENOTCONN:
                    raise
    finally:
        sock.setsockopt(SOL_SOCKET, SO_SNDTIMEO, before)
        _set_timeout(sock, timeout)
    raise TimeoutError(errno.ETIMEDOUT, "vsockd does not answer")
