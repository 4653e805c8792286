"""The state folder of a fabric: its location, its files, and connections to its sockets.

``VSOCKETS_DIR``, by default ``/run/vsock`` for root and ``$XDG_RUNTIME_DIR/vsock`` (else
``/tmp/vsock-UID``) for a user, holds::

    vsockd.lock     held by the running vsockd; names its process
    vsockd.start    the options it was started with, for a restart after a crash
    vsockd.log      the log of a vsockd started on demand; vsockd.log.1 is the previous one
    control         the administrator's socket
    CID/stream      a context's control sockets, owned by its owner; a container becomes a
    CID/seqpacket       guest by mounting this one folder
    private/        accessible to vsockd only
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

#: sockaddr_un has 108 bytes, of which the last one is NUL.
LONGEST_SOCKET_PATH = 107

# The C methods, because a vSockets socket overrides them.
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
    """Return the path of the state folder that this process uses by default; it may be missing."""
    configured = os.environ.get("VSOCKETS_DIR")
    if configured:
        return Path(configured)
    if os.geteuid() == 0:
        return Path("/run/vsock")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime:
        return Path(runtime, "vsock")
    return Path(f"/tmp/vsock-{os.geteuid()}")


def how_to_start(folder: Path) -> str:
    """Return the command that starts vsockd in the state folder ``folder``."""
    import shlex  # imported here: few programs need it

    given = "" if folder == default_folder() else f"--dir {shlex.quote(os.fspath(folder))} "
    return f"vsock {given}up"


def require_private(folder: Path, create: bool = False) -> None:
    """Require that no other user except root controls the state folder ``folder``.

    In ``/tmp`` another user could have created the folder before, and would then control the host
    of every program; a user who can change a parent folder can replace the folder at any time.
    With ``create`` a missing folder is created.

    Raises PermissionError if another user has control.
    """
    folder = folder.absolute()
    try:
        above = folders.open_folder(folder.parent, private=True, create=0o755 if create else None)
    except PermissionError as error:
        raise PermissionError(
            f"{folder}: not used, because of {error.filename}: {error.strerror} (choose another "
            "folder by --dir or VSOCKETS_DIR)"
        ) from None
    try:
        if create:
            with contextlib.suppress(FileExistsError):
                os.mkdir(folder.name, 0o755 if os.geteuid() == 0 else 0o700, dir_fd=above)
        found = os.stat(folder.name, dir_fd=above, follow_symlinks=False)
    finally:
        os.close(above)
    if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (os.geteuid(), 0):
        raise PermissionError(
            f"{folder}: not used, because it is not a folder of user {os.geteuid()} (choose "
            "another by --dir or VSOCKETS_DIR)"
        )
    if found.st_mode & 0o022:
        raise PermissionError(
            f"{folder}: not used, because other users can write to it (chmod go-w {folder})"
        )


@contextmanager
def short_path(path: str | os.PathLike[str]) -> Iterator[str]:
    """Yield a path equivalent to ``path`` that fits a unix socket's address.

    A path of more than 107 bytes is replaced by one through a descriptor of its folder, which is
    closed after the with block.
    """
    spelled = os.fspath(path)
    if len(os.fsencode(spelled)) <= LONGEST_SOCKET_PATH:
        yield spelled
        return
    parent, name = os.path.split(spelled)
    folder = os.open(parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{name}"
    finally:
        os.close(folder)


def is_short(path: str) -> bool:
    """Return whether ``path`` certainly fits a unix socket's address, without encoding it."""
    return len(path) <= LONGEST_SOCKET_PATH and path.isascii()


def connect_to(connect: Callable[[str], None], path: str) -> None:
    """Call ``connect``, a unix socket's method, with ``path``, which may have any length."""
    if is_short(path):
        connect(path)
        return
    with short_path(path) as spelled:
        connect(spelled)


def wait_to_connect(sock: _socket.socket, path: str, seconds: float) -> float:
    """Connect ``sock`` to ``path``, whose backlog was full, within ``seconds``.

    Returns the remaining seconds.

    Raises OSError(ETIMEDOUT) after ``seconds``, OSError(ENOBUFS) at once if they are 0.
    """
    if seconds <= 0:
        raise OSError(errno.ENOBUFS, f"the backlog of vsockd at {path} is full")
    deadline = time.monotonic() + seconds
    timeout = sock.gettimeout()
    before = sock.getsockopt(SOL_SOCKET, SO_SNDTIMEO, TIMEVAL.size)
    # Clients blocked in connect(2) get free slots before those that retry.
    _set_timeout(sock, None)
    try:
        while (left := deadline - time.monotonic()) > 0:
            sock.setsockopt(
                SOL_SOCKET, SO_SNDTIMEO, TIMEVAL.pack(int(left), 1 + int(left % 1 * 1e6))
            )
            try:
                connect_to(functools.partial(_connect, sock), path)
                _peer_of(sock)  # Python reports success when a signal interrupts connect(2)
                return max(1e-6, deadline - time.monotonic())
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno != errno.ENOTCONN:
                    raise
    finally:
        sock.setsockopt(SOL_SOCKET, SO_SNDTIMEO, before)
        _set_timeout(sock, timeout)
    raise TimeoutError(errno.ETIMEDOUT, "no reply from vsockd")
