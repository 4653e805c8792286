"""Rules of the proxies: valid requests, the choice of a cluster's node, and virtual hosts."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ..model.address import parse_cid
from ..model.constants import VMADDR_CID_ANY
from ..model.locator import Locator

#: Names and values of headers, including pseudo-headers.
Headers = dict[bytes, bytes]

#: The default authority of a CONNECT request.  An AMQP proxy treats it as its service's name; a
#: stock HTTP/2 proxy resolves it.
AUTHORITY = "rabbitmq:5672"

#: The header with the CID of the guest that owns the session.  Only the host proxy sets it: no
#: bytes from a guest become a header.
CID_HEADER = b"vsock-cid"

#: The name that stands for every virtual host in a rule.
ALL_VIRTUAL_HOSTS = "*"

_SHORT_STRING_MAX_BYTES = 255  # bytes of an AMQP short string


def connect_request(authority: str, cid: int) -> Headers:
    """Return the headers of the host proxy's request for guest ``cid``."""
    return {b":method": b"CONNECT", b":authority": authority.encode(), CID_HEADER: b"%d" % cid}


def refusal(headers: Headers, authority: str) -> int | None:
    """Return the HTTP status that refuses a request; None for a CONNECT to ``authority``."""
    if headers.get(b":method") != b"CONNECT":
        return 405
    return None if headers.get(b":authority") == authority.encode() else 403


def requester(headers: Headers) -> str:
    """Return the guest that owns a session, as text for log lines, from the request's headers."""
    cid = headers.get(CID_HEADER, b"")
    return f"context {int(cid)}" if cid.isdigit() else "a client without a CID header"


@dataclass(eq=False, slots=True)
class BrokerNode:
    """A broker of the cluster, with its number of sessions and its health."""

    locator: Locator
    sessions: int = 0  #: sessions that this proxy has open to the node
    healthy: bool = True  #: whether the last health check or connect succeeded


class BrokerNodes:
    """The interchangeable nodes of a cluster."""

    def __init__(self, locators: Iterable[Locator]) -> None:
        self.all = [BrokerNode(locator) for locator in locators]
        self._turn = 0

    def choose(self, tried: Collection[BrokerNode] = ()) -> BrokerNode | None:
        """Return the healthy node with the fewest sessions that is not in ``tried``.

        Nodes that seem to be down are the last resort; equal nodes take turns.  Returns None
        when all nodes were tried.
        """
        self._turn += 1
        order = self.all[self._turn % len(self.all) :] + self.all[: self._turn % len(self.all)]
        left = [node for node in order if node not in tried]
        return min(left, key=lambda node: (not node.healthy, node.sessions), default=None)


@dataclass(frozen=True, slots=True)
class VirtualHostRule:
    """A rule ``CID=VHOST,…``: the virtual hosts that a guest (``any``: every guest) may use."""

    cid: int
    names: frozenset[str]

    @classmethod
    def parse(cls, text: str) -> VirtualHostRule:
        """Parse a rule of the command line, such as ``3=/,test``.

        Raises ValueError if it is invalid.
        """
        cid, equals, names = text.partition("=")
        found = frozenset(names.split(","))
        if not equals or "" in found:
            raise ValueError(f"{text!r}: expected CID=VHOST or CID=VHOST,VHOST or CID=*")
        if any(len(name.encode()) > _SHORT_STRING_MAX_BYTES for name in found):
            raise ValueError(
                f"{text!r}: expected virtual hosts of at most {_SHORT_STRING_MAX_BYTES} bytes"
            )
        return cls(parse_cid(cid), found)

    def admits(self, cid: int, name: str) -> bool:
        """Return whether the rule permits guest ``cid`` to use the virtual host ``name``."""
        return self.cid in (cid, VMADDR_CID_ANY) and bool(self.names & {name, ALL_VIRTUAL_HOSTS})


def admits(rules: Iterable[VirtualHostRule], cid: int, name: str) -> bool:
    """Return whether guest ``cid`` may use the virtual host ``name``; True without rules."""
    rules = tuple(rules)
    return not rules or any(rule.admits(cid, name) for rule in rules)
