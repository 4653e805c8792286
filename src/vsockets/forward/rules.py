"""Allow lists of a forward: the contexts that may connect, and the hosts a proxy may reach.

An empty list allows every context, and no host.  Performs no I/O.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from ..model.address import LARGEST, parse_cid, parse_port
from ..model.constants import VMADDR_CID_ANY
from ..model.locator import parse_inet_port
from .reachability import Address, is_public

_HOST = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?", re.IGNORECASE)
_PATTERN = re.compile(r"[a-z0-9_*-]+(\.[a-z0-9_*-]+)*", re.IGNORECASE)
_LONGEST_HOST = 253  # RFC 1035: 255 bytes on the wire


@dataclass(frozen=True, slots=True)
class PeerRule:
    """A rule ``CID``, ``CID:PORT`` or ``CID:FIRST-LAST``: source addresses that may connect."""

    cid: int
    first: int = 0
    last: int = LARGEST

    @classmethod
    def parse(cls, text: str) -> PeerRule:
        """Parse a rule of the command line.

        Raises ValueError.
        """
        cid, colon, ports = text.partition(":")
        if not colon:
            return cls(parse_cid(cid))
        first, _, last = ports.partition("-")
        rule = cls(parse_cid(cid), parse_port(first), parse_port(last or first))
        if rule.first > rule.last:
            raise ValueError(f"{text!r}: expected the smaller port first")
        return rule

    def admits(self, cid: int, port: int) -> bool:
        """Return whether the rule covers the peer ``cid:port``."""
        return self.cid in (cid, VMADDR_CID_ANY) and self.first <= port <= self.last


def admits_peer(rules: Iterable[PeerRule], peer: tuple[int, int]) -> bool:
    """Return whether ``peer`` may connect; True without rules."""
    rules = tuple(rules)
    return not rules or any(rule.admits(*peer) for rule in rules)


@dataclass(frozen=True, slots=True)
class HostRule:
    """A rule ``HOST`` or ``HOST:PORT``: a destination that a proxy's clients may connect to.

    HOST is a name, a pattern of a name (``*.example.org``), an address or a network
    (``10.0.0.0/8``, ``[fd00::]/8`` or ``[::1]``).  A pattern reaches public addresses only
    (:func:`.reachability.is_public`), because the name server that answers for a name under it
    could answer 127.0.0.1; an exact name reaches any address, and so does a network.
    """

    name: str = ""
    network: ipaddress.IPv4Network | ipaddress.IPv6Network | None = None
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> HostRule:
        """Parse a rule of the command line.

        Raises ValueError.
        """
        match = re.fullmatch(r"(\[[^\]]*\](?:/\d+)?|[^:\[\]]+)(?::(\d+|\*))?", text)
        if match is None:
            raise ValueError(f"{text!r}: expected HOST or HOST:PORT, an IPv6 address in brackets")
        host, given = match[1], match[2]
        port = None if given in (None, "*") else parse_inet_port(given)
        try:
            return cls(network=ipaddress.ip_network(re.sub(r"[][]", "", host)), port=port)
        except ValueError:
            if not _PATTERN.fullmatch(host):
                raise ValueError(f"{text!r}: expected a host name, address or network") from None
        return cls(name=host.lower(), port=port)

    def _covers(self, port: int) -> bool:
        return self.port in (None, port)

    def admits_name(self, name: str, port: int) -> bool:
        """Return whether ``name`` may be looked up for ``port``."""
        return self._covers(port) and bool(self.name) and fnmatchcase(name, self.name)

    def admits_address(self, name: str, address: Address, port: int) -> bool:
        """Return whether the client may connect to ``address``.

        ``name`` is the host name that resolved to it; "" if the client gave an address.
        """
        if not self._covers(port):
            return False
        if self.network is not None:
            return address in self.network
        if not name:
            return self.name == "*" and is_public(address)
        return self.admits_name(name, port) and ("*" not in self.name or is_public(address))


class HostRules:
    """A proxy's allow list."""

    def __init__(self, rules: Iterable[HostRule]) -> None:
        self._rules = tuple(rules)

    def admits_name(self, name: str, port: int) -> bool:
        """Return whether ``name`` may be looked up; its addresses are checked separately.

        A name needs a matching rule, because even a lookup discloses something to its name server.
        """
        name = name.lower().rstrip(".")
        return any(rule.admits_name(name, port) for rule in self._rules)

    def admits_address(self, name: str, address: Address, port: int) -> bool:
        """Return whether the client may connect to ``address``, which ``name`` resolved to."""
        name = name.lower().rstrip(".")
        address = getattr(address, "ipv4_mapped", None) or address
        return any(rule.admits_address(name, address, port) for rule in self._rules)


def check_host(text: str) -> str:
    """Return ``text``, a host name, or an address in its usual form.

    Raises ValueError for anything else.
    """
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        if len(text) > _LONGEST_HOST or not _HOST.fullmatch(text):
            raise ValueError("expected a host name or an address") from None
    return text
