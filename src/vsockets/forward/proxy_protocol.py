"""What a proxy's front end is: a conversation that ends with where the client wants to go.

Front ends do no I/O.  Bytes that came are given to :meth:`ProxyProtocol.receive`, which returns
what to answer; once ``target`` is there, the caller connects, answers with :meth:`granted` or
:meth:`refused`, and from then on the connection is a stream whose first bytes are ``rest``.
"""

from __future__ import annotations

import enum
from typing import Protocol

from .limits import FORWARD_PROXY_REQUEST_MAX_BYTES


class ProxyRefusal(enum.Enum):
    """Why a proxy does not connect its client."""

    NOT_ALLOWED = "it is not on the allow list"
    UNREACHABLE = "it cannot be reached"
    REFUSED = "it refused the connection"
    TIMED_OUT = "it did not answer in time"
    OVERLOADED = "the proxy has too much to do"


class BadRequest(Exception):
    """The client does not speak the protocol; ``answer`` is what to tell it before closing."""

    def __init__(self, problem: str, answer: bytes = b"") -> None:
        super().__init__(problem)
        self.answer = answer


class ProxyProtocol(Protocol):
    """One client's conversation."""

    @property
    def target(self) -> tuple[str, int] | None:
        """Host and port, once the client has said."""

    @property
    def rest(self) -> bytes:
        """What came after the request."""

    def receive(self, data: bytes) -> bytes:
        """Take what came, empty for the end; returns what to answer.  Raises BadRequest."""

    def granted(self) -> bytes:
        """What to tell the client when it is connected."""

    def refused(self, why: ProxyRefusal) -> bytes:
        """What to tell the client when it is not going to be."""


#: The most a request may take, in bytes; who sends more is not asking for a connection.
LONGEST_REQUEST = FORWARD_PROXY_REQUEST_MAX_BYTES
