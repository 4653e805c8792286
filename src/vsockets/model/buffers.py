"""Stream buffer sizes and their negotiation (guide page 14).

A stream socket proposes a size and states the smallest and largest it would
accept.  The two sides agree on one size before the connection exists, and it
stays until the connection is closed.
"""

from __future__ import annotations

from typing import NamedTuple

from ..limits import STREAM_BUFFER_DEFAULT_BYTES, STREAM_BUFFER_MAX_BYTES, STREAM_BUFFER_MIN_BYTES


class BufferSizes(NamedTuple):
    """What one side asks for, in bytes; immutable, so a change is a new value."""

    size: int = STREAM_BUFFER_DEFAULT_BYTES
    minimum: int = STREAM_BUFFER_MIN_BYTES
    maximum: int = STREAM_BUFFER_MAX_BYTES

    def with_size(self, size: int) -> BufferSizes:
        """Ask for ``size``, clamped to the limits as Linux does: too large, then too small."""
        return self._replace(size=max(min(size, self.maximum), self.minimum))

    def with_minimum(self, minimum: int) -> BufferSizes:
        """Move the lower limit; the size follows it."""
        return self._replace(minimum=minimum).with_size(self.size)

    def with_maximum(self, maximum: int) -> BufferSizes:
        """Move the upper limit; the size follows it."""
        return self._replace(maximum=maximum).with_size(self.size)


DEFAULT_SIZES = BufferSizes()


def negotiate(client: BufferSizes, server: BufferSizes) -> int | None:
    """The size both sides agree on, or None when there is none.

    The rule of the VMCI transport: the client's proposal stands when it lies within
    the server's limits; otherwise the server proposes its own size, which the
    client takes only if it lies within its own limits.
    """
    if server.minimum <= client.size <= server.maximum:
        return client.size
    if client.minimum <= server.size <= client.maximum:
        return server.size
    return None
