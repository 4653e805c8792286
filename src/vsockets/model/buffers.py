"""Stream buffer sizes and their negotiation (guide page 14).

A stream socket proposes a size, with a smallest and a largest size that it accepts.  Both sides
agree on one size before the connection is established, for the life of the connection.
"""

from __future__ import annotations

from typing import NamedTuple

from ..limits import STREAM_BUFFER_DEFAULT_BYTES, STREAM_BUFFER_MAX_BYTES, STREAM_BUFFER_MIN_BYTES


class BufferSizes(NamedTuple):
    """The buffer sizes requested by one side, in bytes."""

    size: int = STREAM_BUFFER_DEFAULT_BYTES
    minimum: int = STREAM_BUFFER_MIN_BYTES
    maximum: int = STREAM_BUFFER_MAX_BYTES

    def with_size(self, size: int) -> BufferSizes:
        """Return these sizes with ``size``, reduced to the maximum, then raised to the minimum.

        Linux applies the limits in the same order.
        """
        return self._replace(size=max(min(size, self.maximum), self.minimum))

    def with_minimum(self, minimum: int) -> BufferSizes:
        """Return the sizes with another minimum, to which a smaller size is raised."""
        return self._replace(minimum=minimum).with_size(self.size)

    def with_maximum(self, maximum: int) -> BufferSizes:
        """Return the sizes with another maximum, to which a larger size is reduced."""
        return self._replace(maximum=maximum).with_size(self.size)


DEFAULT_SIZES = BufferSizes()


def negotiate(client: BufferSizes, server: BufferSizes) -> int | None:
    """Return the buffer size that both sides accept, or None if they do not agree.

    By the rule of the VMCI transport, the client's size is used if it is within the server's
    limits, else the server's size if it is within the client's limits.
    """
    if server.minimum <= client.size <= server.maximum:
        return client.size
    if client.minimum <= server.size <= client.maximum:
        return server.size
    return None
