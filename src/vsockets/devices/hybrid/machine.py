"""Hybrid vsock of one virtual machine: both directions, and life-cycle events."""

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

#: Changes that end all streams.
_INTERRUPTIONS = ("suspend", "migrate", "ft-on", "power-off")


class HybridMachine:
    """Host side of one virtual machine.

    ``name`` is the monitor's socket, in the current directory.
    """

    def __init__(
        self, loop: DeviceLoop, fabric: DeviceClient, events: Events, name: str, wait: float
    ) -> None:
        """Serve the guest; ``wait`` is the time in seconds for which connects to it are retried."""
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
        """Close all streams and remove all sockets."""
        self._host_to_guest.close()
        self._sockets.close()

    def _make_connector(self, port: int, done: Done) -> Connector:
        return Connector(self._loop, self._name, port, self._wait, done)

    def _on_connection(self, port: int, fd: int) -> None:
        """Hand a connection of the guest off to vsockd, which finds the listener."""
        with socket.socket(fileno=fd) as sock:
            try:
                self._fabric.hand_off(sock, (VMADDR_CID_HOST, port))
            except OSError as error:
                log.warning("connection of the guest to port %d lost: %s", port, error)

    def _on_lost(self) -> None:
        """Stop new connections after the link has closed; existing streams continue."""
        log.warning("no new connections: vsockd has closed the link")
        self._sockets.close()
        self._host_to_guest.close_when_idle(self._loop.stop)

    def _on_event(self, cid: int, set_listening: str) -> None:
        if cid == self._fabric.cid and set_listening in _INTERRUPTIONS:
            self._host_to_guest.close()
