"""The vfio-user protocol: a PCI device in another process than its virtual machine.

This package is the server, which plays the device; it is independent of the kind of device.
"""

from .pci import ConfigSpace, Identity, Interrupts, Irq
from .session import Device, MappedArea, Region, Session, VfioUserServer

__all__ = [
    "ConfigSpace",
    "Device",
    "Identity",
    "Interrupts",
    "Irq",
    "MappedArea",
    "Region",
    "Session",
    "VfioUserServer",
]
