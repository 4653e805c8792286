"""Hybrid vsock: virtual machines whose vsock is a unix socket of the host.

The monitor (Firecracker, Cloud Hypervisor, vhost-device-vsock) has the device and speaks with the
guest's kernel; here is its host side.  Streams to the guest are led through the monitor's socket
after a handshake (:mod:`.outward`, :mod:`.dial`); streams from the guest come to sockets of ours,
one for each port (:mod:`.host_sockets`), and are handed to who listens without a byte being moved.
"""

from .machine import HybridMachine

__all__ = ["HybridMachine"]
