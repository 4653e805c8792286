"""The fabric: vsockd brokers, the kernel's unix sockets carry the data."""

from . import datagram, stream

__all__ = ["datagram", "stream"]
