"""Hybrid vsock: virtual machines whose vsock device is a unix socket of the host.

The monitor (Firecracker, Cloud Hypervisor, vhost-device-vsock) implements the device towards the
guest's kernel; this package is the host's side.  Streams to the guest are spliced to the monitor's
socket after a handshake (:mod:`.host_to_guest`).  Streams from the guest arrive at one unix socket
for each port (:mod:`.machine`); vsockd hands the descriptor of a stream to the listener, so that
its bytes do not pass through the device.
"""

from .machine import HybridMachine

__all__ = ["HybridMachine"]
