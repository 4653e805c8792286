"""Connections to a locator of any kind, such as the target of a forward, and name resolution.

Each connection looks up its target's name again, so that a target that moves is found.
``getaddrinfo`` blocks until name servers answer, so it runs in threads.  The number of threads is
bounded, in total and for each party, and simultaneous lookups of one name for one party share a
thread.  The threads are daemons, so that a silent name server does not delay the program's end.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import os
import socket as stdlib
import subprocess
import threading
from collections.abc import Callable, Hashable, Sequence
from itertools import chain, zip_longest
from typing import Any
from weakref import WeakValueDictionary

from .._linux.descriptor_passing import guard
from ..attachment import ContextHandle
from ..eventloop.retry import Backoff
from ..model.locator import Exec, Inet, Locator, Stdio, Unix, Vsock, VsockFolder, VsockMux
from ..protocol.hybrid import ClientHandshake, hyperkit_line
from ..socket import socket
from ..state_folder import connect_to
from .limits import (
    FORWARD_ADDRESSES_MAX,
    FORWARD_LOOKUPS_MAX,
    FORWARD_NEXT_ADDRESS_SECONDS,
    FORWARD_PARTY_LOOKUPS_MAX,
)

#: Family and address of a host, the latter as connect() expects it.
Found = tuple[int, tuple[Any, ...]]


class Resolver:
    """A resolver for the running asyncio loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._threads = asyncio.Semaphore(FORWARD_LOOKUPS_MAX)
        #: the threads of each party with lookups in progress
        self._shares: WeakValueDictionary[Hashable, asyncio.Semaphore] = WeakValueDictionary()
        self._lookups: dict[Hashable, asyncio.Task[list[Found]]] = {}

    async def resolve(self, host: str, port: int, kind: int, party: Hashable = None) -> list[Found]:
        """Return the addresses of ``host`` with ``port``, at least one.

        ``kind`` is the socket type.  ``party`` identifies the client for which the name is looked
        up: the lookups of one party do not delay those of another.

        Raises socket.gaierror, an OSError, if the name cannot be resolved.
        """
        with contextlib.suppress(OSError):  # a literal address needs no name server
            return _resolve(host, port, kind, stdlib.AI_NUMERICHOST)
        key = host, port, kind, party
        task = self._lookups.get(key)
        if task is None:
            task = self._lookups[key] = self._loop.create_task(self._look_up(*key))
            task.add_done_callback(lambda done: self._forget(key, done))
        # shield(): a cancelled caller leaves the lookup to the others.
        return await asyncio.shield(task)

    async def _look_up(self, host: str, port: int, kind: int, party: Hashable) -> list[Found]:
        share = self._shares.get(party)
        if share is None:
            share = self._shares[party] = asyncio.Semaphore(FORWARD_PARTY_LOOKUPS_MAX)
        async with share, self._threads:
            answer: asyncio.Future[list[Found]] = self._loop.create_future()

            def look_up() -> None:
                try:
                    found = _resolve(host, port, kind, 0)
                except Exception as error:
                    self._answer(answer.set_exception, error)
                else:
                    self._answer(answer.set_result, found)

            threading.Thread(target=look_up, name=f"resolve {host}", daemon=True).start()
            return await answer

    def _answer(self, call: Any, value: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(call, value)

    def _forget(self, key: Hashable, done: asyncio.Task[list[Found]]) -> None:
        del self._lookups[key]
        if not done.cancelled():
            done.exception()  # retrieved here, in case all callers were cancelled


def _resolve(host: str, port: int, kind: int, flags: int) -> list[Found]:
    try:
        found = stdlib.getaddrinfo(host, port, type=kind, flags=flags)
    except UnicodeError as error:  # the idna codec's, for a label that is empty or too long
        raise OSError(f"{host!r}: invalid host name: {error}") from None
    return [(family, address) for family, _, _, _, address in found]


#: Errors of a target that is not reachable yet, which a later attempt may not meet.
NOT_YET = {
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.ENODEV,
    errno.ENOENT,
    errno.ETIMEDOUT,
}

#: Explanations of the errno of a vSockets connect.
_MEANINGS = {
    errno.ECONNRESET: "no listener at that port, or its backlog is full",
    errno.EHOSTUNREACH: "no such context, it is suspended or off, or connecting to it is not "
    "permitted",
    errno.EACCES: "the guest is isolated from this program",
    errno.EINVAL: "the buffer sizes of the two sides are incompatible",
}

#: Bytes copied at a time between a socket and standard input or output.
_CHUNK = 65_536

#: A function that returns whether a client may connect to an address.
Admits = Callable[[ipaddress.IPv4Address | ipaddress.IPv6Address], bool]


class NotAdmitted(OSError):
    """The allow list admits none of the name's addresses."""


class Dialer:
    """A connector for locators in the running asyncio loop.

    vSockets connections start in ``context``.
    """

    def __init__(self, context: ContextHandle | None = None) -> None:
        self._context = context
        self._loop = asyncio.get_running_loop()
        self._accepted_before: set[Locator] = set()  # vSockets ports
        self.resolver = Resolver()

    async def connect(
        self,
        locator: Locator,
        *,
        timeout: float,
        wait: float = 0.0,
        admits: Admits | None = None,
        client: tuple[int, int] | None = None,
        party: Hashable = None,
    ) -> stdlib.socket:
        """Return a connected, non-blocking stream socket.

        An attempt takes at most ``timeout`` seconds, for each address of a host name.  Attempts are
        repeated for ``wait`` seconds while the target is not reachable, and for ``timeout`` seconds
        while a vSockets port that has accepted before refuses: its backlog may be full.  ``admits``
        filters the addresses of a host name, which is looked up on behalf of ``party``.  A program
        that is started (``exec:``) finds ``client``, a CID and port, in its environment.

        Raises OSError if no attempt succeeds, NotAdmitted if ``admits`` rejects all addresses.
        """
        backoff = Backoff(jitter=True)
        while True:
            try:
                sock = await self._open(locator, timeout, admits, client, party)
            except OSError as error:
                # asyncio's TimeoutError has no errno; the kernel's has.
                by_asyncio = isinstance(error, TimeoutError) and not error.errno
                why = _error(errno.ETIMEDOUT) if by_asyncio else error
            else:
                if isinstance(locator, Vsock | VsockMux):
                    # Bounded: such locators come from settings, never from a client.
                    self._accepted_before.add(locator)
                return sock
            patience = wait if why.errno in NOT_YET else 0.0
            if why.errno == errno.ECONNRESET and locator in self._accepted_before:
                patience = max(patience, timeout)
            if not backoff.permits(patience):
                self._accepted_before.discard(locator)
                raise why
            await asyncio.sleep(backoff.next_pause())

    async def _open(
        self,
        locator: Locator,
        timeout: float,
        admits: Admits | None,
        client: tuple[int, int] | None,
        party: Hashable,
    ) -> stdlib.socket:
        if isinstance(locator, Inet):
            async with asyncio.timeout(timeout):
                found = await self._look_up(locator, admits, party)
            return await self._first(found, timeout)
        async with asyncio.timeout(timeout):
            return await self._open_local(locator, client)

    async def _open_local(self, locator: Locator, client: tuple[int, int] | None) -> stdlib.socket:
        match locator:
            case Vsock(cid, port):
                return await self._vsock(cid, port)
            case Unix(path):
                return await self._unix(path)
            case VsockMux(path, port):
                return await self._mux(path, port)
            case VsockFolder("hyperkit", path, cid, port):
                return await self._hyperkit(path, hyperkit_line(cid, port))
            case VsockFolder():
                return await self._unix(locator.socket_path)
            case Exec(command):
                return self._execute(command, client)
            case Stdio():
                return standard_streams()
            case _:
                raise OSError(errno.EOPNOTSUPP, f"{locator}: unsupported as a target")

    async def _vsock(self, cid: int, port: int) -> stdlib.socket:
        sock = guard(socket(context=self._context))
        try:
            return await self._attempt(sock, self._connect(sock, (cid, port)))
        except OSError as error:
            code = error.errno or 0
            if code not in _MEANINGS:
                raise
            raise OSError(code, f"{os.strerror(code)} ({_MEANINGS[code]})") from None

    @staticmethod
    async def _attempt(sock: stdlib.socket, connecting: Any) -> stdlib.socket:
        try:
            sock.setblocking(False)
            await connecting
        except BaseException:
            sock.close()
            raise
        return sock

    async def _connect(self, sock: stdlib.socket, address: tuple[Any, ...]) -> None:
        """Connect a non-blocking socket; an OSError has the text of its errno."""
        try:
            sock.connect(address)
        except BlockingIOError:
            pass
        else:
            return
        writable = asyncio.Event()
        fd = sock.fileno()
        self._loop.add_writer(fd, writable.set)
        try:
            await writable.wait()
        finally:
            self._loop.remove_writer(fd)
        code = sock.getsockopt(stdlib.SOL_SOCKET, stdlib.SO_ERROR)
        if code:
            raise _error(code)

    async def _look_up(self, locator: Inet, admits: Admits | None, party: Hashable) -> list[Found]:
        """Return the addresses of ``locator`` in the order to try them (RFC 8305, section 4)."""
        host, port = locator.host, locator.port
        found = await self.resolver.resolve(host, port, stdlib.SOCK_STREAM, party)
        if admits is not None:
            found = [one for one in found if admits(ipaddress.ip_address(one[1][0]))]
            if not found:
                raise NotAdmitted(errno.EACCES, f"{locator.host}: none of its addresses is allowed")
        return interleave(found)[:FORWARD_ADDRESSES_MAX]

    async def _first(self, found: Sequence[Found], timeout: float) -> stdlib.socket:
        """Connect to the address that answers first (RFC 8305, section 5).

        The next attempt begins when the previous one has failed, or has had no answer for
        FORWARD_NEXT_ADDRESS_SECONDS seconds; earlier attempts continue.
        """
        if len(found) == 1:
            return await self._tcp(*found[0], timeout)
        left = list(found)
        attempts: set[asyncio.Task[stdlib.socket]] = set()
        why: OSError | None = None
        try:
            while left or attempts:
                if left:
                    attempt = self._tcp(*left.pop(0), timeout)
                    attempts.add(self._loop.create_task(attempt))
                done, attempts = await asyncio.wait(
                    attempts,
                    timeout=FORWARD_NEXT_ADDRESS_SECONDS if left else None,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                for task in done:
                    error = task.exception()
                    if error is None:
                        attempts |= done - {task}
                        return task.result()
                    if not isinstance(error, OSError):
                        raise error
                    # A target's refusal is more informative than a missing route.
                    if why is None or error.errno in NOT_YET or why.errno not in NOT_YET:
                        why = error
        finally:
            for task in attempts:
                task.cancel()
                task.add_done_callback(_close_unwanted)
        assert why is not None
        raise why

    async def _tcp(self, family: int, address: tuple[Any, ...], timeout: float) -> stdlib.socket:
        sock = stdlib.socket(family, stdlib.SOCK_STREAM)
        sock.setsockopt(stdlib.IPPROTO_TCP, stdlib.TCP_NODELAY, 1)
        try:
            async with asyncio.timeout(timeout):
                return await self._attempt(sock, self._connect(sock, address))
        except TimeoutError:
            raise _error(errno.ETIMEDOUT) from None

    async def _unix(self, path: str) -> stdlib.socket:
        sock = guard(stdlib.socket(stdlib.AF_UNIX, stdlib.SOCK_STREAM))
        return await self._attempt(sock, connect_unix(sock, path))

    async def _mux(self, path: str, port: int) -> stdlib.socket:
        sock = await self._unix(path)
        return await self._attempt(sock, self._request_port(sock, port))

    async def _hyperkit(self, folder: str, line: bytes) -> stdlib.socket:
        sock = await self._unix(f"{folder}/connect")
        return await self._attempt(sock, self._loop.sock_sendall(sock, line))

    async def _request_port(self, sock: stdlib.socket, port: int) -> None:
        handshake = ClientHandshake(port)
        await self._loop.sock_sendall(sock, handshake.request)
        while handshake.port is None:
            handshake.take(await self._loop.sock_recv(sock, 1))

    def _execute(self, command: tuple[str, ...], client: tuple[int, int] | None) -> stdlib.socket:
        environment = dict(os.environ)
        if client is not None:  # the same variables as vsock listen --exec
            environment["VSOCK_PEER_CID"], environment["VSOCK_PEER_PORT"] = map(str, client)
        ours, theirs = stdlib.socketpair()
        try:
            with theirs:
                process = subprocess.Popen(
                    command, stdin=theirs.fileno(), stdout=theirs.fileno(), env=environment
                )
        except BaseException:
            ours.close()
            raise
        pidfd = os.pidfd_open(process.pid)

        def reap() -> None:
            self._loop.remove_reader(pidfd)
            os.close(pidfd)
            process.wait()

        self._loop.add_reader(pidfd, reap)
        ours.setblocking(False)
        return guard(ours)


async def connect_unix(sock: stdlib.socket, path: str) -> None:
    """Connect a non-blocking unix socket; a path that begins with ``@`` is an abstract name.

    Retries while the backlog is full (EAGAIN), because poll() does not report room in it.
    """
    backoff = Backoff()
    while True:
        try:
            if path.startswith("@"):
                sock.connect("\0" + path[1:])
            else:
                connect_to(sock.connect, path)
            return
        except BlockingIOError:
            await asyncio.sleep(backoff.next_pause())


def interleave(found: Sequence[Found]) -> list[Found]:
    """Alternate between address families, the first address first (RFC 8305, section 4)."""
    first = [one for one in found if one[0] == found[0][0]]
    others = [one for one in found if one[0] != found[0][0]]
    pairs = chain.from_iterable(zip_longest(first, others))
    return [one for one in pairs if one is not None]


def _close_unwanted(attempt: asyncio.Task[stdlib.socket]) -> None:
    """Close the socket of ``attempt``, which has succeeded after another attempt."""
    if not attempt.cancelled() and attempt.exception() is None:
        attempt.result().close()


def _error(code: int) -> OSError:
    return OSError(code, os.strerror(code))


def standard_streams() -> stdlib.socket:
    """Return a non-blocking socket that is joined to the process's standard input and output.

    Two threads copy between the standard streams and the socket.  Standard streams may be files,
    which epoll rejects, or terminals, which must stay blocking because other processes share them.
    """
    ours, theirs = stdlib.socketpair()
    ours.setblocking(False)
    # A daemon thread, because a read from a terminal cannot be cancelled when the program ends.
    threading.Thread(target=_copy_input, args=(theirs,), daemon=True).start()
    # Not a daemon thread: the program ends after all output is written.
    threading.Thread(target=_copy_output, args=(theirs,)).start()
    return ours


def _copy_input(sock: stdlib.socket) -> None:
    with contextlib.suppress(OSError):  # the stream is closed, or standard input is
        while data := os.read(0, _CHUNK):
            sock.sendall(data)
    with contextlib.suppress(OSError):
        sock.shutdown(stdlib.SHUT_WR)


def _copy_output(sock: stdlib.socket) -> None:
    try:
        while data := sock.recv(_CHUNK):
            view = memoryview(data)
            while view:
                view = view[os.write(1, view) :]
    except OSError:  # the reader of standard output has closed it
        with contextlib.suppress(OSError):
            sock.shutdown(stdlib.SHUT_RD)
