"""One virtual machine with hybrid vsock, put together: both directions, and its life."""

from __future__ import annotations

import logging
import socket

from ...control import Events
from ...model.constants import VMADDR_CID_HOST
from ..client import DeviceClient
from ..lifecycle_events import subscribe
from ..loop import DeviceLoop
from .connector import Connector, Done
from .host_sockets import HostSockets
from .host_to_guest import HostToGuest

log = logging.getLogger(__name__)

#: With these its streams are over.
_INTERRUPTIONS = ("suspend", "migrate", "ft-on", "power-off")


class HybridMachine:
    """``name`` is the monitor's socket, in the current directory, which stays as it is."""

    def __init__(
        self, loop: DeviceLoop, fabric: DeviceClient, events: Events, name: str, wait: float
    ) -> None:
        """``wait``: how long a connect to the guest is tried again, in seconds."""
        self._loop = loop
        self._fabric = fabric
        self._name = name
        self._wait = wait
        self._host_to_guest = HostToGuest(loop, fabric, self._make_connector)
        self._sockets = HostSockets(loop, name, self._on_connection)
        fabric.on_connect = self._host_to_guest.on_connect
        fabric.on_listening = self._sockets.set_listening
        fabric.on_lost = self._on_lost
        subscribe(loop, fabric, events, self._on_event)

    def close(self) -> None:
        """Leave nothing behind."""
        self._host_to_guest.close()
        self._sockets.close()

    def _make_connector(self, port: int, done: Done) -> Connector:
        return Connector(self._loop, self._name, port, self._wait, done)

    def _on_connection(self, port: int, fd: int) -> None:
        """The guest has connected to ``port``: whether it may, and to whom, is vsockd's to say."""
        with socket.socket(fileno=fd) as sock:
            try:
                self._fabric.hand_off(sock, (VMADDR_CID_HOST, port))
            except OSError as error:
                log.warning("the guest's connect to port %d is lost: %s", port, error)

    def _on_lost(self) -> None:
        """vsockd has gone, or the context: the streams there are may come to their end."""
        log.warning("no new connections: vsockd has gone, or the context")
        self._sockets.close()
        self._host_to_guest.close_when_idle(self._loop.stop)

    def _on_event(self, cid: int, set_listening: str) -> None:
        if cid == self._fabric.cid and set_listening in _INTERRUPTIONS:
            self._host_to_guest.close()
