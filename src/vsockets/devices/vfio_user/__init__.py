"""The vfio-user protocol: a PCI device in another process than its virtual machine.

This is the server's side, independent of the device.
"""

from .interrupts import Interrupts, Irq
from .pci import ConfigSpace, Identity
from .server import VfioUserServer
from .session import Device, Region, Session

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
