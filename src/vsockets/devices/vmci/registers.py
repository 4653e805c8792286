"""Registers of the device, from Linux's ``linux/vmw_vmci_defs.h``."""

from __future__ import annotations

from enum import IntEnum, IntFlag


class Register(IntEnum):
    """Offset of a register; those from 0x24 on came with DMA datagrams (Linux 5.18)."""

    STATUS = 0x00
    CONTROL = 0x04
    ICR = 0x08  #: interrupt cause; reading clears it
    IMR = 0x0C  #: interrupt mask: the enabled causes
    DATA_OUT = 0x10  #: a byte port
    DATA_IN = 0x14  #: a byte port
    CAPS = 0x18
    RESULT_LOW = 0x1C
    RESULT_HIGH = 0x20
    DATA_OUT_LOW = 0x24
    DATA_OUT_HIGH = 0x28
    DATA_IN_LOW = 0x2C
    DATA_IN_HIGH = 0x30
    GUEST_PAGE_SHIFT = 0x34


class Control(IntFlag):
    """Bits of CONTROL, which is write-only."""

    RESET = 1
    INT_ENABLE = 2
    INT_DISABLE = 4


class Cause(IntEnum):
    """Cause of an interrupt; its vector is the bit's number, shared vectors read ICR."""

    DATAGRAM = 1
    NOTIFICATION = 2
    DMA_DATAGRAM = 4  #: a datagram read is complete


IO_VECTORS_MAX = {Cause.DATAGRAM: 0, Cause.NOTIFICATION: 1, Cause.DMA_DATAGRAM: 2}


class Caps(IntFlag):
    """Capabilities of the device; the driver writes back those it uses."""

    DATAGRAM = 4
    NOTIFICATIONS = 8
    PPN64 = 0x10
    DMA_DATAGRAM = 0x20


#: Size of BAR1, by which the driver recognizes a device with DMA datagrams.
MMIO_BAR = 0x40000
#: Offset of the registers in BAR1; the MSI-X table is at its start.
MMIO_REGISTERS = 0x20000
MSIX_TABLE, MSIX_PENDING = 0, 0x1000

#: The device with byte ports: registers in I/O ports, only MSI-X in BAR1.
IO_BAR = 64
OLD_MSIX_BAR = 0x2000
