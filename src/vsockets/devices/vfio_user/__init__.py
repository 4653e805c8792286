"""The vfio-user protocol: a PCI device in another process than its virtual machine.

This is the server's side, independent of the device.
"""

from .pci import ConfigSpace, Identity, Interrupts, Irq
from .session import Device, Region, Session, VfioUserServer

__all__ = [
    "ConfigSpace",
    "Device",
    "Identity",
    "Interrupts",
    "Irq",
    "Region",
    "Session",
    "VfioUserServer",
]
