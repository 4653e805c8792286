"""The proxy's side of HTTP's CONNECT (RFC 9110, section 9.3.6); h11 parses the requests."""

from __future__ import annotations

import h11

from ..model.locator import parse_inet_port
from .limits import FORWARD_PROXY_REQUEST_MAX_BYTES
from .proxies import BadRequest, ProxyRefusal
from .settings import check_host

_STATUS = {
    ProxyRefusal.NOT_ALLOWED: (403, b"Forbidden"),
    ProxyRefusal.UNREACHABLE: (502, b"Bad Gateway"),
    ProxyRefusal.REFUSED: (502, b"Bad Gateway"),
    ProxyRefusal.TIMED_OUT: (504, b"Gateway Timeout"),
    ProxyRefusal.OVERLOADED: (503, b"Service Unavailable"),
}


class HttpConnect:
    """The CONNECT request of one client; implements :class:`~.proxies.ProxyProtocol`."""

    def __init__(self) -> None:
        self.target: tuple[str, int] | None = None
        self._http = h11.Connection(
            h11.SERVER, max_incomplete_event_size=FORWARD_PROXY_REQUEST_MAX_BYTES
        )

    @property
    def rest(self) -> bytes:
        """The received bytes that follow the request."""
        return self._http.trailing_data[0]

    def receive(self, data: bytes) -> bytes:
        """Add received bytes; return b"", because no answer precedes the connection.

        Raises BadRequest if the request is invalid or incomplete.
        """
        try:
            self._http.receive_data(data)
            event = self._http.next_event()
        except h11.RemoteProtocolError as error:
            answer = self._respond(error.error_status_hint, b"Bad Request", b"not HTTP")
            raise BadRequest(str(error), answer) from None
        if isinstance(event, h11.ConnectionClosed):
            raise BadRequest("end of stream before the request")
        if isinstance(event, h11.Request):
            if event.method != b"CONNECT":
                answer = self._respond(
                    405,
                    b"Method Not Allowed",
                    b"expected CONNECT",
                    (b"Allow", b"CONNECT"),
                )
                raise BadRequest("unsupported method (expected CONNECT)", answer)
            try:
                self.target = _host_and_port(event.target.decode("ascii"))
            except ValueError as error:
                answer = self._respond(400, b"Bad Request", b"expected CONNECT HOST:PORT")
                raise BadRequest(str(error), answer) from None
            if not isinstance(self._http.next_event(), h11.EndOfMessage):
                answer = self._respond(400, b"Bad Request", b"CONNECT with a body")
                raise BadRequest("CONNECT with a body", answer)
        return b""

    def granted(self) -> bytes:
        """Return a response with status 200, after which the connection is a stream."""
        # Only the head is sent: a successful response to CONNECT has no body.
        response = h11.Response(status_code=200, headers=[], reason=b"Connection established")
        return self._http.send(response) or b""

    def refused(self, why: ProxyRefusal) -> bytes:
        """Return a response with the status code and the text for ``why``."""
        return self._respond(*_STATUS[why], why.value.encode())

    def _respond(
        self, status: int, reason: bytes, text: bytes, *headers: tuple[bytes, bytes]
    ) -> bytes:
        text += b"\n"
        described = [
            (b"Content-Type", b"text/plain"),
            (b"Content-Length", b"%d" % len(text)),
            (b"Connection", b"close"),
            *headers,
        ]
        response = h11.Response(status_code=status, headers=described, reason=reason)
        data = self._http.send(response) or b""
        data += self._http.send(h11.Data(data=text)) or b""
        return data + (self._http.send(h11.EndOfMessage()) or b"")


def _host_and_port(target: str) -> tuple[str, int]:
    host, colon, port = target.rpartition(":")
    if not colon:
        raise ValueError(f"CONNECT {target!r}: expected HOST:PORT")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    return check_host(host), parse_inet_port(port)
