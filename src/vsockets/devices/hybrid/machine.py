"""Hybrid vsock of one virtual machine: both directions, and life-cycle events.

Streams from the guest arrive at unix sockets, one for each port of the host
(:class:`HostSockets`); streams to the guest: :mod:`.host_to_guest`.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import socket
from collections.abc import Callable
from functools import partial
from socket import AF_UNIX, SOCK_NONBLOCK, SOCK_STREAM

from ..._linux.folders import remove_stale
from ..._linux.sockets import refuse_descriptors
from ...control import Events
from ...eventloop.loop import Acceptor
from ...limits import LISTEN_BACKLOG_MAX
from ...model.constants import VMADDR_CID_HOST
from ...protocol.hybrid import port_name
from ..client import DeviceClient, subscribe
from ..limits import HYBRID_PORTS_MAX
from ..loop import DeviceLoop
from .host_to_guest import Connector, Done, HostToGuest

log = logging.getLogger(__name__)


class HostSockets:
    """The unix sockets of all ports that the guest can connect to.

    ``name`` is the monitor's socket in the current directory.  ``on_connection`` is called with a
    port and the descriptor of a connection to that port; the callback takes ownership of the
    descriptor.
    """

    def __init__(
        self, loop: DeviceLoop, name: str, on_connection: Callable[[int, int], None]
    ) -> None:
        self._loop = loop
        self._name = name
        self._on_connection = on_connection
        self._acceptors: dict[int, Acceptor] = {}
        self._remove_stale_sockets()

    def set_listening(self, port: int, listening: bool) -> None:
        """Open the socket of ``port`` if the port has a listener, else close the socket."""
        if not listening:
            self._close(port)
        elif len(self._acceptors) >= HYBRID_PORTS_MAX:
            log.warning(
                "port %d: not reachable from the guest: limit of %d ports", port, HYBRID_PORTS_MAX
            )
        elif port not in self._acceptors:
            try:
                self._open(port)
            except OSError as error:
                name = port_name(self._name, port)
                log.warning(
                    "port %d: not reachable from the guest: %s: %s", port, name, error.strerror
                )

    def close(self) -> None:
        """Close and remove all sockets."""
        for port in list(self._acceptors):
            self._close(port)

    def _open(self, port: int) -> None:
        name = port_name(self._name, port)
        remove_stale(name)
        if os.path.lexists(name):
            raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        listener = socket.socket(AF_UNIX, SOCK_STREAM | SOCK_NONBLOCK)
        refuse_descriptors(listener)
        try:
            # Rename after listen(), so that a connect to the visible name always succeeds.
            new = f"{self._name}_new"
            listener.bind(new)
            listener.listen(LISTEN_BACKLOG_MAX)
            os.rename(new, name)
        except OSError:
            listener.close()
            raise
        on_connection = partial(self._on_connection, port)
        self._acceptors[port] = Acceptor(self._loop, listener, f"{name}: the guest", on_connection)

    def _close(self, port: int) -> None:
        acceptor = self._acceptors.pop(port, None)
        if acceptor is not None:
            acceptor.close()
            with contextlib.suppress(OSError):
                os.unlink(port_name(self._name, port))

    def _remove_stale_sockets(self) -> None:
        """Remove the sockets that a killed device has left under the same name."""
        ours = re.compile(re.escape(self._name) + r"_(\d+|new)")
        for name in filter(ours.fullmatch, os.listdir()):
            remove_stale(name)


#: Changes of the guest that end all its streams.
_INTERRUPTIONS = ("suspend", "migrate", "ft-on", "power-off")


class HybridMachine:
    """Host side of one virtual machine.

    ``name`` is the monitor's socket, in the current directory.
    """

    def __init__(
        self, loop: DeviceLoop, fabric: DeviceClient, events: Events, name: str, wait: float
    ) -> None:
        """Serve the guest; a connect to the guest is retried for ``wait`` seconds."""
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
        """Refuse new connections after the link to vsockd has closed; existing streams continue."""
        log.warning("no new connections: vsockd has closed the link")
        self._sockets.close()
        self._host_to_guest.close_when_idle(self._loop.stop)

    def _on_event(self, cid: int, change: str) -> None:
        if cid == self._fabric.cid and change in _INTERRUPTIONS:
            self._host_to_guest.close()
