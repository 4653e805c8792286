"""Order of packets after an ATTACH.

Linux's driver handles packets of a socket that is in use in separate work items, which can
overtake each other.  A socket that is still connecting fails with EPROTO when it sees a WROTE or
SHUTDOWN.  So packets after the device's ATTACH wait until the guest has sent a packet on the
stream, or for :data:`VMCI_ATTACH_HOLD_SECONDS`.
"""

from __future__ import annotations

from ..loop import DeviceLoop
from .flow_control import Send
from .limits import VMCI_ATTACH_HOLD_SECONDS
from .packets import Kind


class AttachOrdering:
    """Queue of packets to ``send``, in order, until the guest has handled the ATTACH."""

    def __init__(self, loop: DeviceLoop, send: Send) -> None:
        self._send = send
        #: each once: a second WROTE adds nothing to the first
        self._held: dict[tuple[Kind, int, int], None] | None = {}
        loop.call_later(VMCI_ATTACH_HOLD_SECONDS, self.release)

    def send(self, kind: Kind, value: int, offset: int) -> None:
        """Send a packet, now or after the ATTACH was handled."""
        if self._held is None:
            self._send(kind, value, offset)
        else:
            self._held[kind, value, offset] = None

    def release(self) -> None:
        """Send the queued packets: the guest has handled the ATTACH."""
        if self._held is not None:
            held, self._held = self._held, None
            for packet in held:
                self._send(*packet)

    def discard(self) -> None:
        """Discard the queued packets: the stream has ended."""
        self._held = None
