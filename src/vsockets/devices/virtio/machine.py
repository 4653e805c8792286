"""One virtual machine's virtio-vsock, put together: the device, its fabric, and its life."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable
from functools import partial
from socket import MSG_DONTWAIT

from ...control import Events
from ...model.buffers import BufferSizes
from ...protocol import RECORD_SIZE, ProtocolError, Record
from ..client import DeviceClient, Offer
from ..lifecycle_events import INTERRUPTIONS, subscribe
from ..loop import DeviceLoop
from .device import VirtioVsock
from .limits import VIRTIO_ENLARGED_BUFFER_MAX_BYTES, VIRTIO_ENLARGED_BUFFERS_MAX

log = logging.getLogger(__name__)

_TAKE = int(MSG_DONTWAIT)


class VirtioMachine:
    """The device of the guest ``cid``, to be served by vhost-user."""

    def __init__(
        self, loop: DeviceLoop, fabric: DeviceClient, cid: int, events: Events | None = None
    ) -> None:
        self._loop = loop
        self._fabric = fabric
        self._cid = cid
        self.device = VirtioVsock(loop, cid, self)
        self.device.tap = fabric.tap
        fabric.offered = self._offered
        fabric.resized = self._resized
        fabric.lost = lambda: log.warning("vsockd has gone: no new connections")
        if events is not None:
            subscribe(loop, fabric, events, self._heed)

    def connect(
        self,
        kind: int,
        port: int,
        peer: tuple[int, int],
        done: Callable[[socket.socket | None], None],
    ) -> Callable[[], None]:
        """As :class:`.device.Fabric` says."""
        try:
            sock = self._fabric.connect(port, peer, BufferSizes(), kind)
        except OSError as error:
            log.info("no connection to %s: %s", peer, error)
            done(None)
            return lambda: None
        self._loop.watch(sock.fileno(), lambda events: self._answered(sock, done))
        return partial(self._give_up, sock)

    def _answered(self, sock: socket.socket, done: Callable[[socket.socket | None], None]) -> None:
        try:
            record = Record.decode(sock.recv(RECORD_SIZE, _TAKE))
        except BlockingIOError:
            return
        except (OSError, ProtocolError):
            agreed = False
        else:
            agreed = not record.status
        self._loop.unwatch(sock.fileno())
        if not agreed:
            sock.close()
        done(sock if agreed else None)

    def _give_up(self, sock: socket.socket) -> None:
        if sock.fileno() >= 0:
            self._loop.unwatch(sock.fileno())
            sock.close()

    def _offered(self, offer: Offer) -> None:
        def answer(error: int) -> None:
            self._fabric.settle(offer, offer.sizes.size, error)

        self.device.offer(offer.sock, offer.peer, offer.port, answer)

    def _resized(self, port: int, peer: tuple[int, int], size: int) -> None:
        link = self.device.links.get((*peer, port))
        if link is not None and len(self.device.links) <= VIRTIO_ENLARGED_BUFFERS_MAX:
            link.enlarge(min(size, VIRTIO_ENLARGED_BUFFER_MAX_BYTES))
            self.device.touched(link)
            self.device.work()

    def _heed(self, cid: int, change: str) -> None:
        if cid == self._cid and change in INTERRUPTIONS:
            self.device.drop_connections()
