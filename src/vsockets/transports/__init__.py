"""What a socket is made of.

A transport is a set of behaviours, classes derived from :class:`vsockets.socket.socket`, that
it enters in ``vsockets.socket.SOCKET_CLASSES`` when it is imported.  A new socket becomes an
instance of the behaviour for its type; CONTRIBUTING.md shows how to add one.
"""

from . import fabric, kernel

__all__ = ["fabric", "kernel"]
