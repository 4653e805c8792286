"""How a session is asked for: HTTP/2's CONNECT with the guest's CID in a header.  Values only."""

from __future__ import annotations

#: Names and values, pseudo-headers among them.
Headers = dict[bytes, bytes]

#: What a session is to be connected with, unless one says otherwise.  An AMQP proxy knows it as
#: its service; a stock proxy looks the name up.
AUTHORITY = "rabbitmq:5672"

#: What says which guest a session is of.  The host proxy writes it, and nothing that a guest
#: sends becomes a header.
CID_HEADER = b"vsock-cid"


def connect_request(authority: str, cid: int) -> Headers:
    """What the host proxy asks for guest ``cid``."""
    return {b":method": b"CONNECT", b":authority": authority.encode(), CID_HEADER: b"%d" % cid}


def refusal(headers: Headers, authority: str) -> int | None:
    """The status to refuse a request with that does not ask for ``authority``; None if it does."""
    if headers.get(b":method") != b"CONNECT":
        return 405
    return None if headers.get(b":authority") == authority.encode() else 403


def who_asks(headers: Headers) -> str:
    """The guest that a session is of, for people; as its client says."""
    cid = headers.get(CID_HEADER, b"")
    return f"context {int(cid)}" if cid.isdigit() else "a client that names no guest"
