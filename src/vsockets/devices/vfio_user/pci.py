"""PCI configuration space of a device."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

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
    """Encode the MSI-X capability; ``table`` and ``pending`` are offsets in ``bar``."""
    return struct.pack("<BBHII", 0x11, 0, vectors - 1, table | bar, pending | bar)


def msi() -> bytes:
    """Encode the MSI capability, for one message with a 64-bit address."""
    return struct.pack("<BBHQHH", 0x05, 0, 0x0080, 0, 0, 0)


class ConfigSpace:
    """The 256 bytes of configuration space.

    A vfio client emulates BARs, MSI and MSI-X for its guest, so writes to them are stored and have
    no effect here.
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
        """True if the guest allows the device to access memory (bus master)."""
        return bool(self._space[_COMMAND] & _BUS_MASTER)

    def read(self, offset: int, count: int) -> bytes:
        """Return ``count`` bytes; the caller has checked the range."""
        return bytes(self._space[offset : offset + count])

    def write(self, offset: int, data: bytes) -> None:
        """Store ``data``; the caller has checked the range."""
        self._space[offset : offset + len(data)] = data

    def reset(self) -> None:
        """Restore the initial contents."""
        self._space[:] = self._initial
