"""The request for a session: an HTTP/2 CONNECT with the guest's CID in a header."""

from __future__ import annotations

#: Names and values of headers, including pseudo-headers.
Headers = dict[bytes, bytes]

#: The default authority of a CONNECT request.  An AMQP proxy treats it as its service's name; a
#: stock HTTP/2 proxy resolves it.
AUTHORITY = "rabbitmq:5672"

#: The header with the CID of the guest that owns the session.  Only the host proxy sets it: no
#: bytes from a guest become a header.
CID_HEADER = b"vsock-cid"


def connect_request(authority: str, cid: int) -> Headers:
    """Return the headers of the host proxy's request for guest ``cid``."""
    return {b":method": b"CONNECT", b":authority": authority.encode(), CID_HEADER: b"%d" % cid}


def refusal(headers: Headers, authority: str) -> int | None:
    """Return the status of the refusal, or None if the request is a CONNECT to ``authority``."""
    if headers.get(b":method") != b"CONNECT":
        return 405
    return None if headers.get(b":authority") == authority.encode() else 403


def requester(headers: Headers) -> str:
    """Return the guest that owns a session, for log lines, as the request's header names it."""
    cid = headers.get(CID_HEADER, b"")
    return f"context {int(cid)}" if cid.isdigit() else "a client without a CID header"
