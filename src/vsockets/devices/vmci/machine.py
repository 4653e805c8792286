"""One virtual machine's VMCI, put together: device, hypervisor, sockets, and its life."""

from __future__ import annotations

import logging

from ...control import Events
from ..attachment import Attachment
from ..loop import DeviceLoop
from .device import VmciDevice
from .hypervisor import Hypervisor
from .sockets import VmciSockets

log = logging.getLogger(__name__)

#: After these the guest is told that its streams are over, all at once.
_INTERRUPTIONS = ("resume", "migrate", "ft-on")


class VmciMachine:
    """The device of the guest ``cid``, to be served by vfio-user."""

    def __init__(
        self,
        loop: DeviceLoop,
        fabric: Attachment,
        cid: int,
        events: Events | None = None,
        legacy: bool = False,
        older: bool = False,
    ) -> None:
        """``legacy``: the device as before Linux 5.18; ``older``: the first stream protocol."""
        self._loop = loop
        self._fabric = fabric
        self.hypervisor = Hypervisor(cid)
        self.device = VmciDevice(
            self.hypervisor.perform,
            legacy,
            on_reset=self._reset,
            on_unmap=self.hypervisor.forget_memory,
        )
        self.sockets = VmciSockets(loop, self.hypervisor, fabric, older)
        self.hypervisor.device = self.device
        self.hypervisor.sockets = self.sockets
        if events is not None:
            self._events = events
            loop.watch(events.fileno(), self._heed)

    def settle(self) -> None:
        """Called after each thing the virtual machine did."""
        if self.device.has_room:
            self._fabric.resume()

    def _reset(self) -> None:
        self.hypervisor.reset()
        self.sockets.reset()

    def _heed(self, readiness: int) -> None:
        """What became of contexts."""
        happened = self._events.take()
        if happened is None:
            self._loop.unwatch(self._events.fileno())
            return
        for event in happened:
            if event["cid"] == self.hypervisor.cid:
                if event["change"] in _INTERRUPTIONS:
                    self.hypervisor.tell_resumed()
            elif event["change"] in ("removed", "power-off"):
                self.hypervisor.tell_removed(event["cid"])
