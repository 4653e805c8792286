"""Report to a device which ports of the host its guest can connect to, and each change.

For a device that creates something per port: hybrid vsock's creates unix sockets.  The guest's
rights are checked again when it connects.
"""

from __future__ import annotations

import _socket
from select import EPOLLOUT
from socket import MSG_DONTWAIT, MSG_NOSIGNAL

from ..eventloop.loop import READABLE, EventLoop
from ..fabric import Context, Endpoint, EndpointKind, Fabric, Program, Refused
from ..model.constants import VMADDR_CID_HOST
from ..protocol import Record, Role

_SEND = int(MSG_DONTWAIT | MSG_NOSIGNAL)


class HostPorts:
    """Reports over a device's link.  A port's state is looked up when the link has space for the
    report: a device that reads slowly gets fewer reports, and never outdated ones.
    """

    def __init__(
        self,
        loop: EventLoop,
        fabric: Fabric,
        guest: Context,
        program: Program,
        link: _socket.socket,
    ) -> None:
        """Report the ports that ``program``, the client of the guest's connects, can reach."""
        self._loop = loop
        self._fabric = fabric
        self._guest = guest
        self._program = program
        self._link = link
        self._reported: set[int] = set()
        self._unchecked: dict[int, None] = {}  # in order
        self._link_full = False  # for room on the link
        fabric.watchers.append(self._changed)
        self.refresh()

    def close(self) -> None:
        """Stop reporting; call it before the link is closed."""
        self._fabric.watchers.remove(self._changed)

    def refresh(self) -> None:
        """Check all ports again after a change of the guest's state or isolation."""
        host = self._fabric.contexts.host
        listening = [
            holder.port
            for holder in host.connected.values()
            if isinstance(holder, Endpoint) and holder.listening
        ]
        self._unchecked.update(dict.fromkeys([*self._reported, *listening]))
        self.send_changes()

    def _changed(self, endpoint: Endpoint) -> None:
        self._unchecked[endpoint.port] = None
        self.send_changes()

    def send_changes(self) -> None:
        """Send reports until the link is full; continue when it has space again."""
        while self._unchecked:
            port = next(iter(self._unchecked))
            there = self._is_reachable(port)
            if there != (port in self._reported):
                role = Role.LISTENING if there else Role.NOT_LISTENING
                try:
                    self._link.send(Record(0, 0, VMADDR_CID_HOST, port, role=role).encode(), _SEND)
                except BlockingIOError:
                    break
                except OSError:
                    return  # closed; the link's reader notices
                self._reported ^= {port}
            del self._unchecked[port]
        if self._link_full != bool(self._unchecked):
            self._link_full = not self._link_full
            self._loop.change(self._link.fileno(), READABLE | (EPOLLOUT if self._link_full else 0))

    def _is_reachable(self, port: int) -> bool:
        wanted = self._guest, EndpointKind.STREAM, VMADDR_CID_HOST, port, self._program
        try:
            return not self._fabric.find_listener(*wanted).pending
        except Refused:
            return False
