"""End of the datagram sockets of a vsockd that has ended, in whichever processes they are open.

A route works without vsockd and would outlive it: it would continue to show a source CID that by
then belongs to another guest, and ignore the policy of the next vsockd.  Therefore the names of all
sockets contain the *epoch* of the vsockd that bound them, 64 random bits.  A regular stop ends the
sockets of its own epoch.  After a crash the next vsockd in the state folder ends the old sockets,
before it serves the first request.  Any user can open very many descriptors, so either search takes
at most a second.  A search begins with the processes that have the fewest descriptors; what remains
is deferred work of the next vsockd (:mod:`.scheduling`).

- A route is shut down: its sender gets EPIPE, and requests a route from the next vsockd.
- A program's own socket is connected to a socket that is then closed, so that no datagram can reach
  it any longer, not even over a route whose descriptor was hidden from vsockd.  The program's next
  receive fails with ECONNRESET.  (The kernel reports that error when a peer with unread datagrams
  disconnects.)

The sockets are found as :mod:`.streams` finds streams, and with the same rights.
"""

from __future__ import annotations

import _socket
import contextlib
import fcntl
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from socket import AF_UNIX, MSG_DONTWAIT, SHUT_RDWR, SO_ERROR, SO_TYPE, SOCK_DGRAM, SOL_SOCKET

from .._linux.descriptor_passing import dispose_of_copy
from .._linux.inspection import (
    descriptor_count,
    duplicate,
    open_pidfd,
    process_ids,
    sockets_of,
)
from ..eventloop.loop import EventLoop
from .limits import (
    DATAGRAM_END_AT_ONCE_SECONDS,
    DISCONNECT_LONGEST_RETRY_SECONDS,
    DISCONNECT_RETRY_SECONDS,
)
from .scheduling import DeferredWork, run_for

log = logging.getLogger(__name__)

#: ioctl(2): open an O_PATH descriptor of the name that a unix socket is bound to (Linux 4.20).
_SIOCUNIXFILE = 0x89E0

#: Searches for sockets that are open in no accessible process: about ten seconds in total.
_TRIES = 16

#: Earlier epochs to record whose sockets were not all found.
_REMEMBERED = 16

#: Descriptors, processes or lines of the kernel's table to look at in one step: some 200
#: microseconds.
_LOOKS_PER_STEP = 64

#: A name in the current directory, which only vsockd can enter.
_CLOSED_NAME = "grave"

_EPOCH = re.compile(r"[0-9a-f]{16}")
# Names of a program's own socket, and of a route.
_OWN = re.compile(r"([0-9a-f]{16})\.\d+\.(?:\d+|all)\.\d+")
_ROUTE = re.compile(r"\0vsock:\d+:\d+:([0-9a-f]{16}):[0-9a-f]+(?::\d+)?")


class EarlierEpochs:
    """The epochs of the vsockds that have crashed in a state folder, recorded in ``file``."""

    def __init__(self, file: Path, own: str = "") -> None:
        """Read the file; ``own`` is the epoch that this vsockd has taken over."""
        self._file = file
        self._epochs: list[str] = []
        with contextlib.suppress(FileNotFoundError):
            words = file.read_text(errors="replace").split()
            self._epochs = [word for word in words if word != own and _EPOCH.fullmatch(word)][
                -_REMEMBERED:
            ]

    def record(self, epoch: str) -> None:
        """Record that a vsockd of ``epoch`` binds sockets from now on."""
        new = self._file.with_suffix(".new")
        new.write_text("\n".join((*self._epochs, epoch)))
        new.replace(self._file)

    def end(self, loop: EventLoop, deferred: DeferredWork, epoch: str) -> None:
        """End the sockets of all earlier epochs; ``epoch`` is the current one.

        What takes longer than DATAGRAM_END_AT_ONCE_SECONDS is done later.
        """
        if self._epochs:
            search = self._search(loop, deferred, epoch, _TRIES, DISCONNECT_RETRY_SECONDS)
            if not run_for(search, DATAGRAM_END_AT_ONCE_SECONDS):
                deferred.start(self, search)

    def _search(
        self, loop: EventLoop, deferred: DeferredWork, epoch: str, tries: int, delay: float
    ) -> Iterator[None]:
        left: dict[int, str] = {}
        yield from _find(self._epochs, left)
        yield from end_sockets(left)
        if not left:
            self._epochs.clear()
            with contextlib.suppress(OSError):  # a full disk: the next vsockd searches again
                self.record(epoch)
        elif tries:
            wait = min(2 * delay, DISCONNECT_LONGEST_RETRY_SECONDS)
            again = self._search(loop, deferred, epoch, tries - 1, wait)
            loop.call_later(delay, lambda: deferred.start(self, again))
        else:
            log.warning(
                "%d datagram sockets of a vsockd that has ended may still work: vsockd may not "
                "look into the processes that have them open",
                len(left),
            )


def socket_name(epoch: str, address: str, number: int) -> str:
    """Return the name to bind a program's socket to, in the folder that only vsockd can enter."""
    return f"{epoch}.{address}.{number}"


def is_other_epoch(name: object, epoch: str) -> bool:
    """Return whether ``name``, of a program's socket, was chosen by a vsockd of another epoch."""
    return isinstance(name, str) and bool(_OWN.fullmatch(name)) and not name.startswith(epoch)


def end_sockets(
    left: dict[int, str], nodes: Mapping[int, int] | None = None, likely: Iterable[int] = ()
) -> Iterator[None]:
    """End the datagram sockets with these inodes and names, in steps; remove them from ``left``.

    ``nodes`` has O_PATH descriptors of programs' own sockets, where the caller has them; ``likely``
    has processes to search first.
    """
    likely = set(likely)
    pids: list[tuple[bool, int, int]] = []
    for number, pid in enumerate(process_ids(), 1):
        pids.append((pid not in likely, descriptor_count(pid), pid))
        if number % _LOOKS_PER_STEP == 0:
            yield
    looked = 0
    for *_, pid in sorted(pids):
        if not left:
            return
        with contextlib.suppress(OSError), open_pidfd(pid) as pidfd:  # exited, or not accessible
            for fd, inode in sockets_of(pid):
                if inode in left:
                    with duplicate(pidfd, fd) as sock:
                        if _name(sock) == left[inode]:  # the number may name another socket by now
                            _end(sock, left.pop(inode), (nodes or {}).get(inode))
                        # Descriptors in its unread datagrams can delay the last close.
                        dispose_of_copy(sock.detach())
                looked += 1
                if looked % _LOOKS_PER_STEP == 0:
                    yield
        looked += 1
        if looked % _LOOKS_PER_STEP == 0:
            yield


def _find(epochs: Iterable[str], found: dict[int, str]) -> Iterator[None]:
    """Add the names of all sockets of ``epochs`` to ``found``, by inode, in steps.

    Any process can bind a socket to a name that looks like one of vsockd's, or even like several
    lines of the kernel's table, so the caller must verify the names.
    """
    epochs = set(epochs)
    for table in _tables():
        yield
        with contextlib.suppress(OSError), open(table, "rb") as lines:
            for number, line in enumerate(lines, 1):
                if number % _LOOKS_PER_STEP == 0:
                    yield
                fields = line.split()
                if len(fields) != 8 or not fields[6].isdigit():
                    continue
                name = os.fsdecode(fields[7]).replace("@", "\0", 1)
                match = _OWN.fullmatch(name) or _ROUTE.fullmatch(name)
                if match and match[1] in epochs:
                    found[int(fields[6])] = name


def _tables() -> Iterator[str]:
    """Yield the kernel's tables of unix sockets, one per network namespace."""
    yield "/proc/self/net/unix"
    seen = {os.stat("/proc/self/ns/net").st_ino}
    for pid in process_ids():
        with contextlib.suppress(OSError):
            namespace = os.stat(f"/proc/{pid}/ns/net").st_ino
            if namespace not in seen:
                seen.add(namespace)
                yield f"/proc/{pid}/net/unix"


def _name(sock: _socket.socket) -> str | None:
    if sock.getsockopt(SOL_SOCKET, SO_TYPE) != SOCK_DGRAM:
        return None
    name = sock.getsockname()
    return os.fsdecode(name) if isinstance(name, (str, bytes)) else None


def _end(sock: _socket.socket, name: str, node: int | None) -> None:
    with contextlib.suppress(OSError):
        if name.startswith("\0"):
            sock.shutdown(SHUT_RDWR)
            return
        closed, elsewhere = _socket.socket(AF_UNIX, SOCK_DGRAM), _socket.socket(AF_UNIX, SOCK_DGRAM)
        try:
            elsewhere.bind("")
            closed.bind(_CLOSED_NAME)  # not an abstract name, which is local to a network namespace
            sock.getsockopt(SOL_SOCKET, SO_ERROR)  # clear: the next call would fail with it
            try:
                sock.connect(_CLOSED_NAME)
            finally:
                os.unlink(_CLOSED_NAME)
            sock.send(b"", MSG_DONTWAIT)
            with _node(sock, name, node) as path:
                closed.connect(path)
                closed.connect(elsewhere.getsockname())
        finally:
            closed.close()
            elsewhere.close()


@contextlib.contextmanager
def _node(sock: _socket.socket, name: str, node: int | None) -> Iterator[str]:
    """Yield a path to ``sock``.

    Raises OSError if ``node`` is missing and vsockd lacks CAP_NET_ADMIN.
    """
    if node is not None:
        yield f"/proc/self/fd/{node}"
        return
    fd = fcntl.ioctl(sock.fileno(), _SIOCUNIXFILE)
    try:
        path = f"/proc/self/fd/{fd}"
        # A path elsewhere may be on a file system in user space, which can block for long.
        if os.readlink(path) == f"{os.getcwd()}/{name} (deleted)":
            yield path
    finally:
        os.close(fd)
