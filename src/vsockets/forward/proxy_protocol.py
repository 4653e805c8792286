"""The interface of the proxy protocols, which receive a client's request without I/O.

The caller passes received bytes to :meth:`ProxyProtocol.receive` and sends the bytes that it
returns.  Once ``target`` is set, the caller connects and sends the bytes of :meth:`granted` or
:meth:`refused`.  After :meth:`granted` the connection is a stream that begins with ``rest``.
"""

from __future__ import annotations

import enum
from typing import Protocol

from .limits import FORWARD_PROXY_REQUEST_MAX_BYTES


class ProxyRefusal(enum.Enum):
    """The reason for a refused request."""

    NOT_ALLOWED = "the destination is not on the allow list"
    UNREACHABLE = "the destination is unreachable"
    REFUSED = "the destination refused the connection"
    TIMED_OUT = "the destination did not answer in time"
    OVERLOADED = "the proxy is overloaded"


class BadRequest(Exception):
    """The request is invalid; ``answer`` is to be sent to the client before closing."""

    def __init__(self, problem: str, answer: bytes = b"") -> None:
        super().__init__(problem)
        self.answer = answer


class ProxyProtocol(Protocol):
    """The request of one client."""

    @property
    def target(self) -> tuple[str, int] | None:
        """Return the requested host and port; None until the request is complete."""

    @property
    def rest(self) -> bytes:
        """Return the received bytes that follow the request."""

    def receive(self, data: bytes) -> bytes:
        """Add received bytes, empty at the end of stream; return the bytes to send.

        Raises BadRequest.
        """

    def granted(self) -> bytes:
        """Return the answer to a client that is connected to its target."""

    def refused(self, why: ProxyRefusal) -> bytes:
        """Return the answer to a client whose request is refused."""


#: Longest request in bytes.
LONGEST_REQUEST = FORWARD_PROXY_REQUEST_MAX_BYTES
