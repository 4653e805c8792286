"""The identity of a forwarder's or proxy's client, for log lines and for limits."""

from __future__ import annotations

import logging
import socket as stdlib
from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

from ..logs import by
from ..model.constants import AF_VSOCK

log = logging.getLogger("vsockets.forward")

if TYPE_CHECKING:
    ClientLog = logging.LoggerAdapter[logging.Logger]


class Client:
    """The peer of an accepted stream: its name, its party and its log."""

    def __init__(self, sock: stdlib.socket, log: logging.Logger = log) -> None:
        try:
            name = sock.getpeername()
        except OSError:
            name, self.who = None, "a client that has disconnected"
        else:
            self.who = describe_source(name)  #: the name in log lines
        #: CID and port; None unless it is a vSockets client
        self.peer: tuple[int, int] | None = name if sock.family == AF_VSOCK else None
        self.party = party_of(name)
        #: for lines that the client causes; their rate is limited for each party
        self.log: ClientLog = logging.LoggerAdapter(log, by(self.party))


def party_of(name: Any) -> Hashable:
    """Return the party, for limits, of a client at the socket address ``name``: CID or host."""
    return name[0] if isinstance(name, tuple) else "this machine"


def caused_by(name: Any) -> dict[str, Any]:
    """Return the ``extra`` argument of a logging call about the client at the address ``name``."""
    return by(party_of(name))


def describe_source(name: Any) -> str:
    """Return a socket address of the socket module as text for log lines."""
    if isinstance(name, tuple):
        return f"[{name[0]}]:{name[1]}" if ":" in str(name[0]) else f"{name[0]}:{name[1]}"
    return f"unix {name!r}" if name else "a local process"
