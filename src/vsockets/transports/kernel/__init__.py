"""The kernel's own AF_VSOCK, in a virtual machine or on a host with its modules."""

from . import socket

__all__ = ["socket"]
