"""PCI configuration space and interrupts of a device."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import NamedTuple

from .messages import IrqFlag

SIZE = 256  #: bytes of configuration space

_COMMAND, _STATUS, _CAPABILITIES, _PIN = 0x04, 0x06, 0x34, 0x3D
_BARS = 0x10
_BUS_MASTER = 0x04
_HAS_CAPABILITIES = 0x10
_FIRST_CAPABILITY = 0x40


class Identity(NamedTuple):
    """Identification registers of a device."""

    vendor: int
    device: int
    subsystem_vendor: int
    subsystem: int
    class_code: int  #: 24 bits
    revision: int


def msix(vectors: int, bar: int, table: int, pending: int) -> bytes:
    """Encode the MSI-X capability; ``table`` and ``pending`` are byte offsets in BAR ``bar``."""
    return struct.pack("<BBHII", 0x11, 0, vectors - 1, table | bar, pending | bar)


def msi() -> bytes:
    """Encode the MSI capability, for one message with a 64-bit address."""
    return struct.pack("<BBHQHH", 0x05, 0, 0x0080, 0, 0, 0)


class ConfigSpace:
    """The 256 bytes of configuration space.

    The vfio client emulates BARs, MSI and MSI-X for its guest, so the device only stores what the
    guest writes to these registers.
    """

    def __init__(
        self, identity: Identity, capabilities: Sequence[bytes], io_bars: Sequence[int] = ()
    ) -> None:
        space = bytearray(SIZE)
        struct.pack_into("<HH", space, 0, identity.vendor, identity.device)
        struct.pack_into("<I", space, 8, identity.class_code << 8 | identity.revision)
        for bar in io_bars:
            space[_BARS + 4 * bar] = 1
        struct.pack_into("<HH", space, 0x2C, identity.subsystem_vendor, identity.subsystem)
        space[_PIN] = 1  # INTA
        at, link = _FIRST_CAPABILITY, _CAPABILITIES
        for capability in capabilities:
            space[_STATUS] |= _HAS_CAPABILITIES
            space[link] = at
            space[at : at + len(capability)] = capability
            link, at = at + 1, at + (len(capability) + 3) // 4 * 4
        self._initial = bytes(space)
        self._space = space

    @property
    def bus_master(self) -> bool:
        """Flag: true while the guest allows the device to access memory (bus master)."""
        return bool(self._space[_COMMAND] & _BUS_MASTER)

    def read(self, offset: int, count: int) -> bytes:
        """Return ``count`` bytes from ``offset``; the caller has checked the range."""
        return bytes(self._space[offset : offset + count])

    def write(self, offset: int, data: bytes) -> None:
        """Store ``data`` at ``offset``; the caller has checked the range."""
        self._space[offset : offset + len(data)] = data

    def reset(self) -> None:
        """Restore the initial contents."""
        self._space[:] = self._initial


_ONE = (1).to_bytes(8, "little")


class Irq(IntEnum):
    """Kind of interrupt; values are indices of ``linux/vfio.h``."""

    INTX = 0
    MSI = 1
    MSIX = 2
    ERR = 3
    REQ = 4


class Interrupts:
    """Eventfds of the interrupt vectors; ``counts`` has the number of vectors of each kind."""

    def __init__(self, counts: Mapping[Irq, int]) -> None:
        self.counts = {kind: counts.get(kind, 0) for kind in Irq}
        self._eventfds: dict[Irq, list[int | None]] = {
            kind: [None] * count for kind, count in self.counts.items()
        }
        self._in_use: list[int | None] = []  # eventfds of the vectors that the driver uses

    @property
    def vectors(self) -> int:
        """Number of vectors that the driver uses; 0 while interrupts are off."""
        return len(self._in_use)

    @property
    def message_signalled(self) -> bool:
        """Flag: true while the driver has MSI-X or MSI enabled."""
        kinds = (Irq.MSIX, Irq.MSI)
        return any(eventfd is not None for kind in kinds for eventfd in self._eventfds[kind])

    def trigger(self, vector: int) -> None:
        """Signal ``vector``, or the last vector in use if the driver uses fewer."""
        eventfds = self._in_use
        if eventfds:
            eventfd = eventfds[vector if vector < len(eventfds) else -1]
            if eventfd is not None:
                try:
                    os.write(eventfd, _ONE)
                except BlockingIOError:
                    return  # the counter is full: 2**64 interrupts that the client has not read

    def set(self, flags: int, index: int, start: int, count: int, fds: Sequence[int]) -> None:
        """Apply SET_IRQS to ``count`` vectors from ``start`` of the kind ``index``.

        Takes ownership of ``fds``, also when an error is raised.

        Raises OSError(EINVAL) when the vectors do not exist, or the flags or the number of
        descriptors is invalid.
        """
        taken = False
        try:
            kind = Irq(index) if index in Irq.__members__.values() else None
            if kind is None or start + count > self.counts[kind]:
                raise OSError(
                    errno.EINVAL, f"invalid interrupts {start} to {start + count} of {index}"
                )
            eventfds = self._eventfds[kind]
            if flags == IrqFlag.DATA_NONE | IrqFlag.TRIGGER and count == 0:
                for number in range(len(eventfds)):
                    self._replace(eventfds, number, None)
            elif flags == IrqFlag.DATA_EVENTFD | IrqFlag.TRIGGER:
                if len(fds) not in (0, count):
                    raise OSError(errno.EINVAL, f"{len(fds)} eventfds for {count} interrupts")
                taken = True
                for number in range(count):
                    self._replace(eventfds, start + number, fds[number] if fds else None)
            elif not flags & (IrqFlag.MASK | IrqFlag.UNMASK):
                raise OSError(errno.EINVAL, f"SET_IRQS with unsupported flags {flags:#x}")
            # The client masks interrupts at its side of the eventfd.
        finally:
            self._in_use = self._find_in_use()
            if not taken:
                for fd in fds:
                    os.close(fd)

    def close(self) -> None:
        """Close all eventfds."""
        for eventfds in self._eventfds.values():
            for number in range(len(eventfds)):
                self._replace(eventfds, number, None)
        self._in_use = []

    def _find_in_use(self) -> list[int | None]:
        for kind in (Irq.MSIX, Irq.MSI, Irq.INTX):
            eventfds = self._eventfds[kind]
            number = len(eventfds)
            while number and eventfds[number - 1] is None:
                number -= 1
            if number:
                return eventfds[:number]
        return []

    @staticmethod
    def _replace(eventfds: list[int | None], number: int, eventfd: int | None) -> None:
        old = eventfds[number]
        eventfds[number] = eventfd
        if old is not None:
            os.close(old)
