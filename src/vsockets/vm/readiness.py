"""Reports of a guest's systemd that it has started, by the protocol of ``sd_notify(3)``.

systemd sends them to the address in its credential ``vmm.notify_socket``: as a datagram, or where
the guest's device has no datagrams (virtio), as a sequenced packet on a connection of its own.  The
host listens for both at one port.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket as stdlib
from collections import deque
from collections.abc import Callable
from types import TracebackType

from .._linux.descriptor_passing import close_in_thread, guard
from ..attachment import ContextHandle
from ..limits import LOG_LINES_PER_SECOND
from ..logs import Throttle
from ..model.constants import VMADDR_CID_ANY, VMADDR_CID_HOST, VMADDR_PORT_ANY
from ..model.text import printable
from ..socket import socket
from .limits import (
    VM_NOTIFY_CONNECTIONS_MAX,
    VM_NOTIFY_MAX_BYTES,
    VM_NOTIFY_REMEMBERED_MAX,
    VM_NOTIFY_SHOWN_MAX_CHARACTERS,
    VM_NOTIFY_TIMEOUT_SECONDS,
)

#: Attempts to find a port that is free for both kinds of sockets.
_ATTEMPTS = 20

_IN_PARENTHESES = re.compile(r"\([^)]*\)")

#: Fields that are shown to the user, with the words before their value.
_SHOWN = {"STATUS": "", "X_SYSTEMD_UNIT_ACTIVE": "active: ", "ERRNO": "error "}


class ReadinessReports:
    """A port of the host at which one guest reports, in the running loop; a context manager."""

    def __init__(
        self,
        host: ContextHandle,
        cid: int,
        report: Callable[[str], object],
        ready: Callable[[], object],
    ) -> None:
        """Listen in the context ``host``, and accept messages from the context ``cid`` only.

        ``report`` gets lines for the user.  ``ready`` is called once, at ``READY=1``.

        Raises OSError when no port is free.
        """
        self.is_ready = False
        self._cid = cid
        self._report = report
        self._ready = ready
        self._throttle = Throttle(LOG_LINES_PER_SECOND)
        self._said: deque[str] = deque(maxlen=VM_NOTIFY_REMEMBERED_MAX)
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._datagrams, self._listener = _bound(host)
        self.port: int = self._datagrams.getsockname()[1]
        self._loop.add_reader(self._datagrams.fileno(), self._receive)
        self._loop.add_reader(self._listener.fileno(), self._accept)

    def __enter__(self) -> ReadinessReports:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for sock in (self._datagrams, self._listener):
            self._loop.remove_reader(sock.fileno())
            close_in_thread(sock)
        for task in self._tasks:
            task.cancel()

    @property
    def address(self) -> str:
        """The address as systemd writes it."""
        return f"vsock:{VMADDR_CID_HOST}:{self.port}"

    def _receive(self) -> None:
        with contextlib.suppress(OSError):
            data, (cid, _) = self._datagrams.recvfrom(VM_NOTIFY_MAX_BYTES)
            if cid == self._cid:
                self._handle(data)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            sock, (cid, _) = self._listener.accept()
            if cid != self._cid or len(self._tasks) >= VM_NOTIFY_CONNECTIONS_MAX:
                sock.close()
                return
            sock.setblocking(False)
            task = self._loop.create_task(self._serve(sock))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _serve(self, sock: stdlib.socket) -> None:
        with sock, contextlib.suppress(OSError):
            async with asyncio.timeout(VM_NOTIFY_TIMEOUT_SECONDS):
                while data := await self._loop.sock_recv(sock, VM_NOTIFY_MAX_BYTES):
                    self._handle(data)
                    await asyncio.sleep(0)  # sock_recv() lets others run only if it has to wait

    def _handle(self, data: bytes) -> None:
        """Handle the fields of one message; unknown ones are ignored, as by systemd."""
        for line in data.decode(errors="replace").split("\n"):
            name, _, value = line.partition("=")
            if name in _SHOWN:
                self._show(name, value[:VM_NOTIFY_SHOWN_MAX_CHARACTERS])
            elif line == "READY=1" and not self.is_ready:
                self.is_ready = True
                self._ready()

    def _show(self, name: str, value: str) -> None:
        """Show a field to the user, unless it differs from an earlier one in parentheses only.

        systemd sends the times of a job that waits there, twice a second.
        """
        text = _SHOWN[name] + _IN_PARENTHESES.sub("", value)
        if text not in self._said and self._throttle.admit(self._cid) is not None:
            self._said.append(text)
            self._report(f"guest: {_SHOWN[name]}{printable(value)}")


def _bound(host: ContextHandle) -> tuple[socket, socket]:
    """Return a datagram socket and a listener at the same port of the host, both non-blocking."""
    for attempt in range(1, _ATTEMPTS + 1):
        with contextlib.ExitStack() as opened:
            datagrams = opened.enter_context(socket(type=stdlib.SOCK_DGRAM, context=host))
            guard(datagrams)
            datagrams.bind((VMADDR_CID_ANY, VMADDR_PORT_ANY))
            listener = opened.enter_context(socket(type=stdlib.SOCK_SEQPACKET, context=host))
            try:
                listener.bind((VMADDR_CID_ANY, datagrams.getsockname()[1]))
            except OSError:
                if attempt == _ATTEMPTS:
                    raise
                continue
            listener.listen(VM_NOTIFY_CONNECTIONS_MAX)
            datagrams.setblocking(False)
            listener.setblocking(False)
            opened.pop_all()
            return datagrams, listener
    raise AssertionError
