"""Who is at the other end of a unix socket, asked of the kernel."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import select
import struct
from collections.abc import Callable, Iterator
from socket import SO_PEERCRED, SOL_SOCKET
from typing import Protocol, overload

from ..fabric import Credentials, Grant

#: getsockopt(2): the supplementary groups of the process that connected (Linux 4.13), and a
#: pidfd of it (Linux 6.5).
_SO_PEERGROUPS = 59
_SO_PEERPIDFD = 77

# Plain values, as every connect needs them: looking a member up in its enum costs as much as a
# short function, and a named tuple's own __new__ is one, in Python.
_SOCKET, _PEERCRED = int(SOL_SOCKET), int(SO_PEERCRED)
UCRED = struct.Struct("iII")
_UCRED_SIZE = UCRED.size
_new = tuple.__new__

#: The user and group of a request in whose name nobody may act.
_NOBODY = 0xFFFF_FFFF

#: The largest answer Python asks getsockopt(2) for, in bytes: 256 groups.
_MOST_GROUPS = 1024


class _Socket(Protocol):
    @overload
    def getsockopt(self, level: int, optname: int, /) -> int: ...
    @overload
    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes: ...


def peer_credentials(sock: _Socket) -> Credentials:
    """The process that connected ``sock``, as it was when it connected."""
    return _new(Credentials, UCRED.unpack(sock.getsockopt(_SOCKET, _PEERCRED, _UCRED_SIZE)))


class Peer:
    """The process that connected ``sock``: a :class:`vsockets.fabric.Program`.

    User and groups are those of the moment it connected.  The rest is read from ``/proc`` when a
    decision needs it.  The process runs meanwhile, and may be hostile: it can end, make a user
    namespace, or execute a program with more rights, between any two system calls of vsockd.  So
    an answer counts only if it holds whatever happens in between:

    - a pidfd of the peer, alive *after* the reading, proves that the process id was not reused;
    - its user namespace is read *after* its capabilities: a process that has left vsockd's
      namespace cannot return;
    - capabilities of a user other than root count only when they are ambient.  The kernel shows
      both sets from one moment, and clears the ambient one in a process that executes a
      set-user-ID program, or one with file capabilities, or that makes a user namespace;
    - the owner of its files in ``/proc``, which is not its user after such an execution, is read
      before and after.

    Whatever the kernel does not tell counts as no: a process that has ended, or one in a pid
    namespace that vsockd cannot see, has no privilege.
    """

    def __init__(self, sock: _Socket, credentials: Credentials) -> None:
        self.sock = sock
        self.credentials = credentials

    def has_capability(self, capability: int) -> bool:
        """Return whether the process has ``capability`` now, by its own right.

        It must have it in vsockd's user namespace: root of a namespace that a user made for
        himself does not count.
        """

        def read(folder: str) -> bool:
            with open(f"{folder}/status", "rb") as status:
                held = _held(status.read(), ambient=self.credentials.uid != 0)
            own = os.stat(f"{folder}/ns/user").st_ino == os.stat("/proc/self/ns/user").st_ino
            return own and bool(held >> capability & 1)

        return self._learn(read)

    def matches(self, grant: Grant) -> bool:
        """Return whether ``grant`` is for this process.  An executable is known by its inode, so
        another file of that name in another mount namespace is another executable.
        """
        if grant.user is not None and grant.user != self.credentials.uid:
            return False
        if grant.group is not None and not self._is_in(grant.group):
            return False
        executable = grant.executable
        return executable is None or self._learn(
            lambda folder: os.path.samefile(f"{folder}/exe", executable)
        )

    def _is_in(self, group: int) -> bool:
        groups = array.array("I", [self.credentials.gid])
        with contextlib.suppress(OSError):  # more groups than fit: its first one counts
            groups.frombytes(self.sock.getsockopt(SOL_SOCKET, _SO_PEERGROUPS, _MOST_GROUPS))
        return group in groups

    def executable(self) -> str | None:
        """What it runs now; None when it has gone, or vsockd may not know."""
        try:
            with self._folder() as folder:
                path = os.readlink(f"{folder}/exe")
        except OSError:
            return None
        return path

    def _learn(self, read: Callable[[str], bool]) -> bool:
        """Return what ``read`` finds in the process's folder of ``/proc``; False unless the
        process had no more rights than its user before and after.
        """
        try:
            with self._folder() as folder:
                return self._owns(folder) and read(folder) and self._owns(folder)
        except OSError:
            return False

    def _owns(self, folder: str) -> bool:
        return os.stat(f"{folder}/status").st_uid == self.credentials.uid

    @contextlib.contextmanager
    def _folder(self) -> Iterator[str]:
        """The process's folder of ``/proc``.  OSError unless it was there all the while."""
        pid = self.credentials.pid
        if pid <= 0:
            raise ProcessLookupError(errno.ESRCH, "in no pid namespace that vsockd can see")
        pidfd = self._pidfd()
        try:
            yield f"/proc/{pid}"
            if _exited(pidfd):
                raise ProcessLookupError(errno.ESRCH, "it has gone")
        finally:
            os.close(pidfd)

    def _pidfd(self) -> int:
        try:
            return self.sock.getsockopt(SOL_SOCKET, _SO_PEERPIDFD)
        except OSError:  # before Linux 6.5 the number is all there is
            return os.pidfd_open(self.credentials.pid)


class Author(Peer):
    """A process that wrote a request on the connection of another one.

    The kernel attaches its process id, user and group to what it writes, and no more: for a process
    with all rights of root, those that it names.
    """

    def __init__(self, credentials: Credentials) -> None:
        self.credentials = credentials

    def _is_in(self, group: int) -> bool:
        def read(folder: str) -> bool:
            with open(f"{folder}/status", "rb") as status:
                return b"%d" % group in _field(status.read(), b"Groups").split()

        return group == self.credentials.gid or self._learn(read)

    def _pidfd(self) -> int:
        return os.pidfd_open(self.credentials.pid)


class Deputy:
    """A request that one process wrote on the connection of another: a
    :class:`vsockets.fabric.Program` that has a right only if both have it.

    - Root connects for programs with fewer rights, as the supervisor of ``vsock run`` does, and
      names the program with each request.  What a program writes itself on such a connection is
      judged by the rights of the program.
    - A process with more rights may be brought to write what it does not mean to, by another that
      gives it a connection as standard output.
    - A child writes on the connection of its parent.
    """

    def __init__(self, connected: Peer, author: Author) -> None:
        self._connected = connected
        self._author = author
        user = connected.credentials.uid
        #: whose grants count; None: they are users who have no right in common
        self._lesser: Peer | None = None
        if user == 0:
            self._lesser = author
        elif author.credentials.uid in (0, user):
            self._lesser = connected
        self.credentials = (
            Credentials(author.credentials.pid, _NOBODY, _NOBODY)
            if self._lesser is None
            else self._lesser.credentials
        )

    def has_capability(self, capability: int) -> bool:
        """Return whether both have ``capability`` now, each by its own right."""
        return self._connected.has_capability(capability) and self._author.has_capability(
            capability
        )

    def matches(self, grant: Grant) -> bool:
        """Return whether ``grant`` is for the one of both that has fewer rights."""
        return self._lesser is not None and self._lesser.matches(grant)

    def executable(self) -> str | None:
        """What the process runs now that wrote the request."""
        return self._author.executable()


def _held(status: bytes, ambient: bool) -> int:
    """Return the effective capabilities in a process's ``status``; ``ambient``: those of them
    that are ambient as well.  (The kernel prints both from one set of credentials.)
    """
    held = int(_field(status, b"CapEff"), 16)
    return held & int(_field(status, b"CapAmb"), 16) if ambient else held


def _field(status: bytes, name: bytes) -> bytes:
    return status.partition(b"\n" + name + b":")[2].partition(b"\n")[0]


def _exited(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
