"""What must not overtake an ATTACH.

Linux's driver takes a packet for a socket that is just in use by a work item of its own, and work
items overtake each other.  A socket that is still connecting and sees a WROTE or a SHUTDOWN gives
up with EPROTO.  So what follows our ATTACH waits until the guest has said something on the stream,
or for :data:`VMCI_ATTACH_HOLD_SECONDS`.
"""

from __future__ import annotations

from ..loop import DeviceLoop
from .flow_control import Send
from .limits import VMCI_ATTACH_HOLD_SECONDS
from .packets import Kind


class AttachOrdering:
    """Passes packets on to ``send``, in order, once the guest may see them."""

    def __init__(self, loop: DeviceLoop, send: Send) -> None:
        self._send = send
        #: each once: a second WROTE says no more than the first
        self._held: dict[tuple[Kind, int, int], None] | None = {}
        loop.call_later(VMCI_ATTACH_HOLD_SECONDS, self.release)

    def send(self, kind: Kind, value: int, offset: int) -> None:
        """Send it now, or when the time has come."""
        if self._held is None:
            self._send(kind, value, offset)
        else:
            self._held[kind, value, offset] = None

    def release(self) -> None:
        """The guest has seen the ATTACH."""
        if self._held is not None:
            held, self._held = self._held, None
            for packet in held:
                self._send(*packet)

    def discard(self) -> None:
        """The stream is none any more: what was held is for nobody."""
        self._held = None
