"""The virtio-vsock device of one virtual machine, connected to the fabric."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from functools import partial
from socket import MSG_DONTWAIT

from ...control import Events
from ...model.buffers import BufferSizes
from ...protocol import RECORD_SIZE
from ...protocol.client import decode_reply
from ..client import INTERRUPTIONS, ConnectRequest, DeviceClient, subscribe
from ..limits import VIRTIO_ENLARGED_BUFFER_MAX_BYTES, VIRTIO_ENLARGED_BUFFERS_MAX
from ..loop import DeviceLoop
from .device import VirtioVsock

log = logging.getLogger(__name__)

_RECEIVE_FLAGS = int(MSG_DONTWAIT)


class VirtioMachine:
    """Virtio-vsock device of the guest ``cid``, with its connection to the fabric.

    A :class:`.VhostUserServer` connects :attr:`device` to the virtual machine.
    """

    def __init__(
        self, loop: DeviceLoop, fabric: DeviceClient, cid: int, events: Events | None = None
    ) -> None:
        self._loop = loop
        self._fabric = fabric
        self._cid = cid
        self.device = VirtioVsock(loop, cid, self)
        self.device.capture = fabric.capture
        self.device.byte_reports = fabric.byte_reports
        fabric.on_connect = self._on_connect
        fabric.on_resized = self._on_resized
        fabric.on_lost = lambda: log.warning("no new connections: vsockd has closed the link")
        if events is not None:
            subscribe(loop, fabric, events, self._on_event)

    def connect(
        self,
        kind: int,
        port: int,
        peer: tuple[int, int],
        done: Callable[[socket.socket | None], None],
    ) -> Callable[[], None]:
        """Implement :class:`.device.Fabric`."""
        try:
            sock = self._fabric.connect(port, peer, BufferSizes(), kind)
        except OSError as error:
            log.info("connect to %s failed: %s", peer, error)
            done(None)
            return lambda: None
        self._loop.watch(sock.fileno(), lambda events: self._on_reply(sock, done))
        return partial(self._cancel, sock)

    def _on_reply(self, sock: socket.socket, done: Callable[[socket.socket | None], None]) -> None:
        try:
            data = sock.recv(RECORD_SIZE, _RECEIVE_FLAGS)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._loop.unwatch(sock.fileno())
        try:
            decode_reply(data)
        except OSError:
            sock.close()
            done(None)
        else:
            done(sock)

    def _cancel(self, sock: socket.socket) -> None:
        if sock.fileno() >= 0:
            self._loop.unwatch(sock.fileno())
            sock.close()

    def _on_connect(self, connect_to_guest: ConnectRequest) -> None:
        def reply(error: int) -> None:
            self._fabric.settle(connect_to_guest, connect_to_guest.sizes.size, error)

        self.device.connect_to_guest(
            connect_to_guest.sock, connect_to_guest.peer, connect_to_guest.port, reply
        )

    def _on_resized(self, port: int, peer: tuple[int, int], size: int) -> None:
        connection = self.device.connections.get((*peer, port))
        if connection is not None and len(self.device.connections) <= VIRTIO_ENLARGED_BUFFERS_MAX:
            connection.enlarge_buffer(min(size, VIRTIO_ENLARGED_BUFFER_MAX_BYTES))
            self.device.mark_dirty(connection)
            self.device.poll()

    def _on_event(self, cid: int, change: str) -> None:
        if cid == self._cid and change in INTERRUPTIONS:
            self.device.reset_connections()
