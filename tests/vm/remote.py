"""Sockets of the host for a program in a guest: each call is executed on the host.

The library's tests have both ends of a connection in one program.  For a program in a guest, the
host's end is one of these sockets, which form a transport of their own: each thread in the guest
sends its calls over its own connection to a thread of the host.
"""

from __future__ import annotations

import contextlib
import itertools
import pickle
import threading
from collections.abc import Callable
from socket import SOCK_DGRAM, SOCK_SEQPACKET, SOCK_STREAM
from typing import Any

import vsockets
from vsockets import VMADDR_CID_ANY, VMADDR_CID_HOST, VMADDR_PORT_ANY
from vsockets.attachment import KernelContext
from vsockets.socket import SOCKET_CLASSES

#: Timeout of a call in seconds.
PATIENCE = 60.0

_NEW = -1


class CallExecutor:
    """The executor of a guest's calls in ``context``; it listens on ``port``."""

    def __init__(self, context: vsockets.Attachment) -> None:
        self._context = context
        self._sockets: dict[int, Any] = {}
        self._numbers = itertools.count()
        self._server = vsockets.create_server((VMADDR_CID_ANY, VMADDR_PORT_ANY), context=context)
        self.port = self._server.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Stop accepting calls and close all sockets."""
        self._server.close()
        for sock in self._sockets.values():
            sock.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the server was closed
            while True:
                sock, _ = self._server.accept()
                threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock: vsockets.socket) -> None:
        with sock, sock.makefile("rwb") as file, contextlib.suppress(EOFError, OSError):
            while True:
                call = pickle.load(file)
                try:
                    answer = True, self._perform(*call)
                except Exception as error:
                    answer = False, error
                pickle.dump(answer, file)
                file.flush()

    def _perform(self, number: int, name: str, arguments: tuple[Any, ...]) -> Any:
        if number == _NEW:
            return self._add(vsockets.socket(type=arguments[0], context=self._context))
        sock = self._sockets[number]
        if name == "accept":
            accepted, peer = sock.accept()
            return self._add(accepted), peer
        return getattr(sock, name)(*arguments)

    def _add(self, sock: vsockets.socket) -> int:
        number = next(self._numbers)
        self._sockets[number] = sock
        return number


class Remote(KernelContext):
    """The host's context for a program in the guest; ``port`` is that of the CallExecutor."""

    transport = "remote"
    cid = VMADDR_CID_HOST

    def __init__(self, port: int) -> None:
        self._port = port
        self._thread_state = threading.local()

    def call(self, number: int, name: str, *arguments: Any) -> Any:
        """Execute a call on the host; raise the exception that it raises there."""
        file = getattr(self._thread_state, "file", None)
        if file is None:
            sock = vsockets.create_connection(
                (VMADDR_CID_HOST, self._port), context=KernelContext()
            )
            sock.settimeout(PATIENCE)
            file = self._thread_state.file = sock.makefile("rwb")
        pickle.dump((number, name, arguments), file)
        file.flush()
        ok, result = pickle.load(file)
        if not ok:
            raise result
        return result


class RemoteSocket(vsockets.socket):
    """A socket of the host.  Its own descriptor in the guest is unused."""

    _number: int | None = None
    _context: Remote

    def call(self, name: str, *arguments: Any) -> Any:
        """Execute a call on the host's socket."""
        if self._number is None:
            self._number = self._context.call(_NEW, "", int(self.type))
        return self._context.call(self._number, name, *arguments)

    def accept(self) -> tuple[vsockets.socket, tuple[int, int]]:
        """Accept a connection on the host."""
        number, peer = self.call("accept")
        accepted = vsockets.socket(type=self.type, context=self._context)
        assert isinstance(accepted, RemoteSocket)
        accepted._number = number
        return accepted, peer

    def recvfrom_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> tuple[int, Any]:
        """Receive on the host."""
        with memoryview(buffer).cast("B") as view:
            data, source = self.call("recvfrom", nbytes or len(view), flags)
            view[: len(data)] = data
        return len(data), source

    def recvmsg_into(self, buffers: Any, *arguments: int) -> tuple[int, Any, int, Any]:
        """Receive on the host."""
        (buffer,) = buffers
        data, ancillary, shown, source = self.call("recvmsg", len(buffer), *arguments)
        buffer[: len(data)] = data
        return len(data), ancillary, shown, source

    def recv_into(self, buffer: Any, nbytes: int = 0, flags: int = 0) -> int:
        """Receive on the host."""
        return self.recvfrom_into(buffer, nbytes, flags)[0]

    def send(self, data: Any, flags: int = 0, /) -> int:
        """Send on the host."""
        sent: int = self.call("send", bytes(data), flags)
        return sent

    def sendall(self, data: Any, flags: int = 0, /) -> None:
        """Send on the host."""
        self.call("sendall", bytes(data), flags)

    def close(self) -> None:
        """Close the socket on the host and here."""
        if self.fileno() >= 0:
            self.call("close")
        super().close()


def _remote_method(name: str) -> Callable[..., Any]:
    def call_remotely(self: RemoteSocket, *arguments: Any) -> Any:
        return self.call(name, *arguments)

    return call_remotely


for _name in (
    *("bind", "connect", "connect_ex", "listen", "getsockname", "getpeername", "shutdown"),
    *("recv", "recvfrom", "recvmsg", "sendto", "sendmsg", "setsockopt", "getsockopt"),
    *("settimeout", "gettimeout", "setblocking", "peer_credentials"),
):
    setattr(RemoteSocket, _name, _remote_method(_name))
SOCKET_CLASSES["remote"] = {
    int(kind): RemoteSocket for kind in (SOCK_STREAM, SOCK_SEQPACKET, SOCK_DGRAM)
}
