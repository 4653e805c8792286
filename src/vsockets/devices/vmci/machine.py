"""The VMCI device of one virtual machine, with hypervisor, vSockets and life-cycle events."""

from __future__ import annotations

from ...control import Events
from ..client import INTERRUPTIONS, DeviceClient, subscribe
from ..limits import VMCI_INTERRUPTS_POLL_SECONDS
from ..loop import DeviceLoop
from .device import VmciDevice
from .hypervisor import Hypervisor
from .transport import VmciTransport


class VmciMachine:
    """VMCI device of the guest ``cid``, with its connection to the fabric.

    A :class:`.VfioUserServer` connects :attr:`device` to the virtual machine.
    """

    def __init__(
        self,
        loop: DeviceLoop,
        fabric: DeviceClient,
        cid: int,
        events: Events | None = None,
        pio_device: bool = False,
        protocol_v1: bool = False,
    ) -> None:
        """Attach the device to ``fabric``.

        ``pio_device`` selects the device with I/O ports, for drivers before Linux 5.18.
        ``protocol_v1`` selects version 1 of the stream protocol.
        """
        self._loop = loop
        self._fabric = fabric
        self._is_polling = False
        self.hypervisor = Hypervisor(cid)
        self.device = VmciDevice(
            self.hypervisor.perform,
            pio_device,
            on_reset=self._reset,
            on_unmap=self.hypervisor.release_memory,
            on_wake=self.hypervisor.notify_resumed,
            on_blocked=self._poll_for_interrupts,
        )
        self.sockets = VmciTransport(loop, self.hypervisor, fabric, protocol_v1)
        self.hypervisor.device = self.device
        self.hypervisor.sockets = self.sockets
        if events is not None:
            subscribe(loop, fabric, events, self._heed)

    def settle(self) -> None:
        """Resume receiving datagrams if the guest has room; called after vfio-user messages."""
        if self.device.has_room:
            self._fabric.resume_datagrams()

    def _poll_for_interrupts(self) -> None:
        """Check at intervals if the guest has enabled interrupts, while datagrams wait for it.

        A starting driver does so by a mapped register, and may then access no other one.
        """
        if not self._is_polling:
            self._is_polling = True
            self._loop.call_later(VMCI_INTERRUPTS_POLL_SECONDS, self._check_interrupts)

    def _check_interrupts(self) -> None:
        self._is_polling = False
        if self.device.follow_control():
            self._poll_for_interrupts()

    def _reset(self) -> None:
        self.hypervisor.reset()
        self.sockets.reset()

    def _heed(self, cid: int, change: str) -> None:
        if cid == self.hypervisor.cid:
            if change in INTERRUPTIONS:
                self.hypervisor.notify_resumed()
        elif change in ("removed", "power-off"):
            self.hypervisor.notify_removed(cid)
