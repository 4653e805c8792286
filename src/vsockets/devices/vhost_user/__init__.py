"""The vhost-user protocol, back-end side: virtqueues of a device that is another process.

It knows rings and memory, and nothing of what the device does with them.
"""

from .server import VhostUserServer
from .session import Device, Session
from .vring import Vring

__all__ = ["Device", "Session", "VhostUserServer", "Vring"]
