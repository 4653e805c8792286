"""The vfio-user protocol: a device that lives in another process than its virtual machine.

The server's side of it, for any PCI device.  Nothing here knows which one is served.
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
