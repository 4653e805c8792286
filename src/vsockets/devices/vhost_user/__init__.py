"""The vhost-user protocol: a virtio device in another process than its virtual machine.

This package is the back end, which plays the device: it sets up rings and guest memory as the front
end, the virtual machine's monitor, requests.  It is independent of the kind of device.
"""

from .session import Device, Session, VhostUserServer, Vring

__all__ = ["Device", "Session", "VhostUserServer", "Vring"]
