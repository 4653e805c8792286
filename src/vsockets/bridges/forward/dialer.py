"""Opening the far side of a forwarded stream, whatever it is: in the end it is a socket."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import socket as stdlib
import subprocess
from collections.abc import Callable
from typing import Any

from ...attachment import Place
from ...limits import FORWARD_FIRST_PAUSE, FORWARD_LONGEST_PAUSE
from ...locator import Exec, Inet, Locator, Stdio, Unix, Vsock, VsockFolder, VsockMux
from ...socket import socket
from ...state_folder import connect_to
from ...wire.hybrid import Answer, connect_line, hyperkit_line
from .resolver import Resolver
from .stdio import standard_streams

#: The target is not there yet: what waiting may change.
NOT_YET = {
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.ENODEV,
    errno.ENOENT,
    errno.ETIMEDOUT,
}

#: Whether an address that a name led to may be connected to.
Admits = Callable[[ipaddress.IPv4Address | ipaddress.IPv6Address], bool]


class NotAdmitted(OSError):
    """All that the name leads to is refused by the allow list."""


class Dialer:
    """Connects to locators, in the running asyncio loop; ``context`` is where vsock: starts."""

    def __init__(self, context: Place | None = None) -> None:
        self._context = context
        self._loop = asyncio.get_running_loop()
        self.resolver = Resolver()

    async def connect(
        self,
        locator: Locator,
        *,
        timeout: float,
        wait: float = 0.0,
        admits: Admits | None = None,
        client: tuple[int, int] | None = None,
    ) -> stdlib.socket:
        """A connected, non-blocking stream socket.

        One attempt may take ``timeout`` seconds; a target that is not there yet is tried again
        for ``wait`` seconds.  A program is told in its environment of the ``client`` it serves.
        Raises OSError, NotAdmitted among them.
        """
        deadline = self._loop.time() + wait
        pause = FORWARD_FIRST_PAUSE
        while True:
            try:
                async with asyncio.timeout(timeout):
                    return await self._open(locator, admits, client)
            except TimeoutError as error:
                # asyncio's own says nothing; the kernel's does.
                why: OSError = error if error.errno else _error(errno.ETIMEDOUT)
            except OSError as error:
                why = error
            if why.errno not in NOT_YET or self._loop.time() + pause > deadline:
                raise why
            await asyncio.sleep(pause)
            pause = min(pause * 2, FORWARD_LONGEST_PAUSE)

    async def _open(
        self, locator: Locator, admits: Admits | None, client: tuple[int, int] | None
    ) -> stdlib.socket:
        match locator:
            case Vsock(cid, port):
                sock = socket(context=self._context)
                return await self._attempt(sock, self._loop.sock_connect(sock, (cid, port)))
            case Inet(host, port):
                return await self._tcp(host, port, admits)
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
                raise OSError(errno.EOPNOTSUPP, f"{locator} is nowhere to connect to")

    @staticmethod
    async def _attempt(sock: stdlib.socket, connecting: Any) -> stdlib.socket:
        try:
            sock.setblocking(False)
            await connecting
        except BaseException:
            sock.close()
            raise
        return sock

    async def _tcp(self, host: str, port: int, admits: Admits | None) -> stdlib.socket:
        found = await self.resolver.resolve(host, port, stdlib.SOCK_STREAM)
        if admits is not None:
            found = [one for one in found if admits(ipaddress.ip_address(one[1][0]))]
            if not found:
                raise NotAdmitted(errno.EACCES, f"{host}: no address of it is allowed")
        while True:
            family, address = found.pop(0)
            sock = stdlib.socket(family, stdlib.SOCK_STREAM)
            sock.setsockopt(stdlib.IPPROTO_TCP, stdlib.TCP_NODELAY, 1)
            try:
                return await self._attempt(sock, self._loop.sock_connect(sock, address))
            except OSError:
                if not found:
                    raise

    async def _unix(self, path: str) -> stdlib.socket:
        sock = stdlib.socket(stdlib.AF_UNIX, stdlib.SOCK_STREAM)
        return await self._attempt(sock, connect_unix(sock, path))

    async def _mux(self, path: str, port: int) -> stdlib.socket:
        sock = await self._unix(path)
        return await self._attempt(sock, self._ask_for_port(sock, port))

    async def _hyperkit(self, folder: str, line: bytes) -> stdlib.socket:
        sock = await self._unix(f"{folder}/connect")
        return await self._attempt(sock, self._loop.sock_sendall(sock, line))

    async def _ask_for_port(self, sock: stdlib.socket, port: int) -> None:
        await self._loop.sock_sendall(sock, connect_line(port))
        answer = Answer()
        while answer.port is None:
            answer.take(await self._loop.sock_recv(sock, 1))

    def _execute(self, command: tuple[str, ...], client: tuple[int, int] | None) -> stdlib.socket:
        environment = dict(os.environ)
        if client is not None:  # as for vsock listen --exec
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
        return ours


async def connect_unix(sock: stdlib.socket, path: str) -> None:
    """Connect a non-blocking unix socket; ``@`` begins an abstract name.

    A full backlog is EAGAIN there, and poll() does not tell when it no longer is.
    """
    pause = FORWARD_FIRST_PAUSE
    while True:
        try:
            if path.startswith("@"):
                sock.connect("\0" + path[1:])
            else:
                connect_to(sock.connect, path)
            return
        except BlockingIOError:
            await asyncio.sleep(pause)
            pause = min(pause * 2, FORWARD_LONGEST_PAUSE)


def _error(code: int) -> OSError:
    return OSError(code, os.strerror(code))
