"""The fabric: vsockd brokers connections, and unix sockets carry the data."""

from . import datagram, stream

__all__ = ["datagram", "stream"]
