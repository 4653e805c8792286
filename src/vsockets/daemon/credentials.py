"""The identity of a unix socket's peer, as the kernel reports it."""

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

from .._linux.inspection import effective_capabilities, status_field
from ..fabric import Credentials, Grant

#: getsockopt(2): supplementary groups of the process that connected (Linux 4.13), and a
#: pidfd of it (Linux 6.5).
_SO_PEERGROUPS = 59
_SO_PEERPIDFD = 77

# Module aliases, for every connect: looking a member up in its enum, and a named tuple's __new__,
# which is Python code, each cost as much as a short function.
_SOCKET, _PEERCRED = int(SOL_SOCKET), int(SO_PEERCRED)
UCRED = struct.Struct("iII")
_UCRED_SIZE = UCRED.size
_new = tuple.__new__

#: User and group id of a request that has no rights of any user.
_NOBODY = 0xFFFF_FFFF

#: The largest reply that Python accepts from getsockopt(2), in bytes: 256 groups.
_MOST_GROUPS = 1024


class _Socket(Protocol):
    @overload
    def getsockopt(self, level: int, optname: int, /) -> int: ...
    @overload
    def getsockopt(self, level: int, optname: int, buflen: int, /) -> bytes: ...


def peer_credentials(sock: _Socket) -> Credentials:
    """Return the identity of the process that connected ``sock``, at the time of connect."""
    return _new(Credentials, UCRED.unpack(sock.getsockopt(_SOCKET, _PEERCRED, _UCRED_SIZE)))


class Peer:
    """The process that connected ``sock``: a :class:`vsockets.fabric.Program`.

    User and groups are those at the time of connect.  Everything else is read from ``/proc`` when a
    decision needs it.  The process runs during the reading, and may be hostile: it can exit, create
    a user namespace, or execute a program with more rights, between any two system calls of vsockd.
    So an answer counts only if no event in between can make it wrong:

    - a pidfd of the peer, alive *after* the reading, proves that the process id was not reused;
    - its user namespace is read *after* its capabilities: a process that has left vsockd's
      namespace cannot return;
    - capabilities of a user other than root count only when they are ambient.  The kernel shows
      both sets from one moment, and clears the ambient one in a process that executes a
      set-user-ID program, or one with file capabilities, or that creates a user namespace;
    - the owner of its files in ``/proc``, which is not its user after such an execution, is read
      before and after.

    Anything the kernel does not report counts as a missing right: a process that has exited, or is
    in a pid namespace that vsockd cannot see, has no privilege.
    """

    def __init__(self, sock: _Socket, credentials: Credentials) -> None:
        self.sock = sock
        self.credentials = credentials

    def has_capability(self, capability: int) -> bool:
        """Return whether the process has ``capability`` now, by its own right.

        The capability must be in vsockd's user namespace: being root of a namespace that the user
        created does not count.
        """

        def read(folder: str) -> bool:
            with open(f"{folder}/status", "rb") as status:
                held = _held(status.read(), ambient=self.credentials.uid != 0)
            own = os.stat(f"{folder}/ns/user").st_ino == os.stat("/proc/self/ns/user").st_ino
            return own and bool(held >> capability & 1)

        return self._learn(read)

    def matches(self, grant: Grant) -> bool:
        """Return whether ``grant`` applies to this process.

        An executable is identified by inode: a file with the same name in another mount namespace
        is a different executable.
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
        with contextlib.suppress(OSError):  # more groups than fit: only the primary one counts
            groups.frombytes(self.sock.getsockopt(SOL_SOCKET, _SO_PEERGROUPS, _MOST_GROUPS))
        return group in groups

    def executable(self) -> str | None:
        """Return the path of the process's executable; None if vsockd cannot read the path."""
        try:
            with self._folder() as folder:
                path = os.readlink(f"{folder}/exe")
        except OSError:
            return None
        return path

    def _learn(self, read: Callable[[str], bool]) -> bool:
        """Return the result of ``read`` for the process's ``/proc`` folder.

        Returns False unless the process had only the rights of its user both before and after.
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
        """Yield the path of the process's folder in ``/proc``.

        Raises OSError if the process has exited by the end of the with block.
        """
        pid = self.credentials.pid
        if pid <= 0:
            raise ProcessLookupError(errno.ESRCH, "the process is in no visible pid namespace")
        pidfd = self._pidfd()
        try:
            yield f"/proc/{pid}"
            if _exited(pidfd):
                raise ProcessLookupError(errno.ESRCH, "the process has exited")
        finally:
            os.close(pidfd)

    def _pidfd(self) -> int:
        try:
            return self.sock.getsockopt(SOL_SOCKET, _SO_PEERPIDFD)
        except OSError:  # before Linux 6.5 only the process id is available
            return os.pidfd_open(self.credentials.pid)


class Author(Peer):
    """A process that wrote a request on another process's connection.

    The kernel attaches its process, user and group ids to the request, and nothing else.  A process
    with all capabilities of root may choose those ids.
    """

    def __init__(self, credentials: Credentials) -> None:
        self.credentials = credentials

    def _is_in(self, group: int) -> bool:
        def read(folder: str) -> bool:
            with open(f"{folder}/status", "rb") as status:
                return b"%d" % group in status_field(status.read(), b"Groups").split()

        return group == self.credentials.gid or self._learn(read)

    def _pidfd(self) -> int:
        return os.pidfd_open(self.credentials.pid)


class Deputy:
    """The rights of a request that one process wrote on another's connection.

    A :class:`vsockets.fabric.Program` that has a right only if both processes have it.
    """

    def __init__(self, connected: Peer, author: Author) -> None:
        self._connected = connected
        self._author = author
        user = connected.credentials.uid
        #: the process whose grants count; None if their users have no right in common
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
        """Return whether both processes have ``capability`` now, each by its own right."""
        return self._connected.has_capability(capability) and self._author.has_capability(
            capability
        )

    def matches(self, grant: Grant) -> bool:
        """Return whether ``grant`` applies to the process with fewer rights."""
        return self._lesser is not None and self._lesser.matches(grant)

    def executable(self) -> str | None:
        """Return the path of the executable of the process that wrote the request."""
        return self._author.executable()


def _held(status: bytes, ambient: bool) -> int:
    """Return the effective capabilities in ``status`` of a process.

    With ``ambient``, only those that are also ambient count.  (The kernel prints both from one set
    of credentials.)
    """
    held = effective_capabilities(status)
    return held & int(status_field(status, b"CapAmb"), 16) if ambient else held


def _exited(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
