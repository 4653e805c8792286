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
        self._outward = HostToGuest(loop, fabric, self._dial)
        self._sockets = HostSockets(loop, name, self._arrived)
        fabric.offered = self._outward.offered
        fabric.listening = self._sockets.change
        fabric.lost = self._lost
        subscribe(loop, fabric, events, self._heed)

    def close(self) -> None:
        """Leave nothing behind."""
        self._outward.drop()
        self._sockets.close()

    def _dial(self, port: int, done: Done) -> Connector:
        return Connector(self._loop, self._name, port, self._wait, done)

    def _arrived(self, port: int, fd: int) -> None:
        """The guest has connected to ``port``: whether it may, and to whom, is vsockd's to say."""
        with socket.socket(fileno=fd) as sock:
            try:
                self._fabric.hand_over(sock, (VMADDR_CID_HOST, port))
            except OSError as error:
                log.warning("the guest's connect to port %d is lost: %s", port, error)

    def _lost(self) -> None:
        """vsockd has gone, or the context: the streams there are may come to their end."""
        log.warning("no new connections: vsockd has gone, or the context")
        self._sockets.close()
        self._outward.finish(self._loop.stop)

    def _heed(self, cid: int, change: str) -> None:
        if cid == self._fabric.cid and change in _INTERRUPTIONS:
            self._outward.drop()
