"""The proxy protocols: their interface, and the proxy's side of SOCKS version 5 (RFC 1928).

A protocol object receives a client's request without I/O.  The caller passes received bytes to
:meth:`ProxyProtocol.receive` and sends the bytes that it returns.  Once ``target`` is set, the
caller connects and sends the bytes of :meth:`ProxyProtocol.granted` or ``refused``.  After
``granted`` the connection is a stream that begins with ``rest``.

SOCKS5 is served for CONNECT without authentication: clients are authorized by their CID when they
connect.  HTTP's CONNECT is in :mod:`.http_connect`, which needs h11.
"""

from __future__ import annotations

import enum
import ipaddress
from typing import Protocol

from .limits import FORWARD_PROXY_REQUEST_MAX_BYTES
from .settings import check_host

_VERSION = 5
_NO_AUTHENTICATION, _NO_ACCEPTABLE_METHOD = 0x00, 0xFF
_CONNECT = 1
_IPV4, _NAME, _IPV6 = 1, 3, 4
_SUCCEEDED = 0
_GENERAL_FAILURE = 1
_COMMAND_NOT_SUPPORTED = 7
_ADDRESS_TYPE_NOT_SUPPORTED = 8


class ProxyRefusal(enum.Enum):
    """The reason for a refused request."""

    NOT_ALLOWED = "the destination is not on the allow list"
    UNREACHABLE = "the destination is unreachable"
    REFUSED = "the destination refused the connection"
    TIMED_OUT = "the destination did not answer in time"
    OVERLOADED = "the proxy is overloaded"


class BadRequest(Exception):
    """An invalid request; ``answer`` is to be sent to the client before closing."""

    def __init__(self, problem: str, answer: bytes = b"") -> None:
        super().__init__(problem)
        self.answer = answer


class ProxyProtocol(Protocol):
    """The interface of a protocol in which a client requests a target."""

    @property
    def target(self) -> tuple[str, int] | None:
        """The requested host and port; None until the request is complete."""

    @property
    def rest(self) -> bytes:
        """The received bytes that follow the request."""

    def receive(self, data: bytes) -> bytes:
        """Add received bytes, empty at the end of stream; return the bytes to send.

        Raises BadRequest if the request is invalid or incomplete.
        """

    def granted(self) -> bytes:
        """Return the answer to a client that is connected to its target."""

    def refused(self, why: ProxyRefusal) -> bytes:
        """Return the answer to a client whose request is refused."""


_REPLIES = {
    ProxyRefusal.NOT_ALLOWED: 2,
    ProxyRefusal.UNREACHABLE: 4,
    ProxyRefusal.REFUSED: 5,
    ProxyRefusal.TIMED_OUT: 4,
    ProxyRefusal.OVERLOADED: _GENERAL_FAILURE,
}


class Socks5:
    """The SOCKS5 request of one client; implements :class:`~.proxies.ProxyProtocol`."""

    def __init__(self) -> None:
        self.target: tuple[str, int] | None = None
        self.rest = b""
        self._greeted = False
        self._received = b""

    def receive(self, data: bytes) -> bytes:
        """Add received bytes; return the bytes to send.

        Raises BadRequest if the request is invalid or incomplete.
        """
        if not data:
            raise BadRequest("end of stream before the request")
        self._received += data
        if len(self._received) > FORWARD_PROXY_REQUEST_MAX_BYTES:
            raise BadRequest(
                f"request too long (expected at most {FORWARD_PROXY_REQUEST_MAX_BYTES} bytes)"
            )
        answer = b""
        if not self._greeted:
            answer = self._greeting()
        if self._greeted:
            self._request()
        return answer

    def granted(self) -> bytes:
        """Return the reply "succeeded"."""
        return _reply(_SUCCEEDED)

    def refused(self, why: ProxyRefusal) -> bytes:
        """Return the reply with the code for ``why``."""
        return _reply(_REPLIES[why])

    def _greeting(self) -> bytes:
        data = self._received
        if data[0] != _VERSION:
            raise BadRequest(f"SOCKS version {data[0]} (expected {_VERSION})")
        if len(data) < 2 or len(data) < 2 + data[1]:
            return b""
        methods, self._received = data[2 : 2 + data[1]], data[2 + data[1] :]
        if _NO_AUTHENTICATION not in methods:
            why = "the client requires authentication"
            raise BadRequest(why, bytes([_VERSION, _NO_ACCEPTABLE_METHOD]))
        self._greeted = True
        return bytes([_VERSION, _NO_AUTHENTICATION])

    def _request(self) -> None:
        data = self._received
        if len(data) < 5:  # the fifth byte is the length of a name
            return
        version, command, _, kind, first = data[:5]
        if version != _VERSION:
            raise BadRequest(f"SOCKS version {version} (expected {_VERSION})")
        if command != _CONNECT:
            why = f"command {command} (expected CONNECT)"
            raise BadRequest(why, _reply(_COMMAND_NOT_SUPPORTED))
        sizes = {_IPV4: (4, 4), _IPV6: (4, 16), _NAME: (5, first)}
        if kind not in sizes:
            raise BadRequest(f"invalid address type {kind}", _reply(_ADDRESS_TYPE_NOT_SUPPORTED))
        begin, size = sizes[kind]
        end = begin + size
        if len(data) < end + 2:
            return
        address = data[begin:end]
        if kind == _NAME:
            try:
                host = check_host(address.decode("ascii"))
            except ValueError:
                raise BadRequest("invalid host name", _reply(_GENERAL_FAILURE)) from None
        else:
            host = str(ipaddress.ip_address(address))
        self.target = host, int.from_bytes(data[end : end + 2], "big")
        self.rest = data[end + 2 :]


def _reply(code: int) -> bytes:
    # The bound address is all zero: it would disclose the host's, and few clients read it.
    return bytes([_VERSION, code, 0, _IPV4]) + bytes(6)
