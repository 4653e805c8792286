"""The transports of sockets.

A transport is a set of classes derived from :class:`vsockets.socket.socket`, one per type, which it
registers in ``vsockets.socket.SOCKET_CLASSES`` when it is imported.  CONTRIBUTING.md shows how to
add one.
"""

from . import fabric, kernel

__all__ = ["fabric", "kernel"]
