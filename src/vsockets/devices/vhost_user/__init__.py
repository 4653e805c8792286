"""The vhost-user protocol, back-end side: virtqueues of a device in another process.

This package handles rings and memory, independent of the device.
"""

from .session import Device, Session, VhostUserServer, Vring

__all__ = ["Device", "Session", "VhostUserServer", "Vring"]
