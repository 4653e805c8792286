"""The settings of a forward, its allow lists, and the TOML file that contains them.

Allow lists name the contexts that may connect, and the hosts that a proxy may reach; an empty list
allows every context, and no host.  ``docs/forward.md`` has the schema of the file.

Public addresses are those that IANA's special-purpose registries (RFC 6890) do not list.  The
tables are written out because those of :mod:`ipaddress` differ between versions of Python and
ignore translators: an IPv6 address that embeds an IPv4 address is public only if that one is.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Any, TypeVar

from ..model.address import LARGEST, parse_cid, parse_port
from ..model.constants import VMADDR_CID_ANY
from ..model.locator import (
    Exec,
    Inet,
    Inherited,
    Locator,
    Proxy,
    Stdio,
    Vsock,
    parse_inet_port,
    parse_locator,
)
from ..toml import Table, kind, read_toml, shown
from .limits import (
    FORWARD_CONNECT_TIMEOUT_SECONDS,
    FORWARD_CONNECTIONS_MAX,
    FORWARD_FLOW_IDLE_SECONDS,
)

Address = IPv4Address | IPv6Address

#: IPv4 networks that are not part of the public Internet.
_SPECIAL_4 = tuple(
    map(
        IPv4Network,
        (
            "0.0.0.0/8",  # this network (RFC 791)
            "10.0.0.0/8",  # private use (RFC 1918)
            "100.64.0.0/10",  # shared between a provider and its customers (RFC 6598)
            "127.0.0.0/8",  # loopback (RFC 1122)
            "169.254.0.0/16",  # link-local (RFC 3927), including clouds' metadata services
            "172.16.0.0/12",  # private use
            "192.0.0.0/24",  # protocol assignments (RFC 6890), including local anycast
            "192.0.2.0/24",  # documentation (RFC 5737)
            "192.88.99.0/24",  # 6to4 relays, deprecated (RFC 7526)
            "192.168.0.0/16",  # private use
            "198.18.0.0/15",  # benchmarks (RFC 2544)
            "198.51.100.0/24",  # documentation
            "203.0.113.0/24",  # documentation
            "224.0.0.0/4",  # multicast (RFC 5771)
            "240.0.0.0/4",  # reserved, and limited broadcast (RFC 1112, RFC 8190)
        ),
    )
)

#: All assigned global unicast addresses (RFC 4291); ``fec0::/10`` and IPv4-compatible addresses,
#: for example, are outside.
_GLOBAL_UNICAST = IPv6Network("2000::/3")

#: IPv6 networks within it that are not part of the public Internet.
_SPECIAL_6 = tuple(
    map(
        IPv6Network,
        (
            "2001::/23",  # protocol assignments (RFC 2928), including Teredo (RFC 4380)
            "2001:db8::/32",  # documentation (RFC 3849)
            "3fff::/20",  # documentation (RFC 9637)
        ),
    )
)

_MAPPED = IPv6Network("::ffff:0:0/96")  # RFC 4291, 2.5.5.2
_NAT64 = IPv6Network("64:ff9b::/96")  # RFC 6052; 64:ff9b:1::/48 (RFC 8215) is never global
_6TO4 = IPv6Network("2002::/16")  # RFC 3056
#: Interface identifiers of ISATAP (RFC 5214), before the IPv4 address.
_ISATAP = (0x0000_5EFE, 0x0200_5EFE)


def is_public(address: Address) -> bool:
    """Return whether ``address``, and any IPv4 address embedded in it, is public."""
    if isinstance(address, IPv4Address):
        return not any(address in network for network in _SPECIAL_4)
    number = int(address)
    last = IPv4Address(number & 0xFFFF_FFFF)
    if address in _MAPPED or address in _NAT64:
        return is_public(last)
    if address not in _GLOBAL_UNICAST or any(address in network for network in _SPECIAL_6):
        return False
    if address in _6TO4 and not is_public(IPv4Address(number >> 80 & 0xFFFF_FFFF)):
        return False
    return number >> 32 & 0xFFFF_FFFF not in _ISATAP or is_public(last)


_HOST = re.compile(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*\.?", re.IGNORECASE)
_PATTERN = re.compile(r"[a-z0-9_*-]+(\.[a-z0-9_*-]+)*", re.IGNORECASE)
_LONGEST_HOST = 253  # RFC 1035: 255 bytes on the wire

#: Keys of a table in a TOML file.
_KEYS = (
    *("from", "to", "allow", "allow_host"),
    *("idle", "connect_timeout", "wait", "max_connections"),
)

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class PeerRule:
    """A rule ``CID``, ``CID:PORT`` or ``CID:FIRST-LAST``: source addresses that may connect."""

    cid: int
    first: int = 0
    last: int = LARGEST

    @classmethod
    def parse(cls, text: str) -> PeerRule:
        """Parse a rule of the command line, such as ``3:5000-5010``.

        Raises ValueError if it is invalid.
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
        """Return whether the rule permits the peer ``cid:port`` to connect."""
        return self.cid in (cid, VMADDR_CID_ANY) and self.first <= port <= self.last


def admits_peer(rules: Iterable[PeerRule], peer: tuple[int, int]) -> bool:
    """Return whether ``rules`` permit ``peer`` to connect; empty rules permit all peers."""
    rules = tuple(rules)
    return not rules or any(rule.admits(*peer) for rule in rules)


@dataclass(frozen=True, slots=True)
class HostRule:
    """A rule ``HOST`` or ``HOST:PORT``: a destination that a proxy's clients may connect to.

    HOST is a name, a pattern of a name (``*.example.org``), an address or a network
    (``10.0.0.0/8``, ``[fd00::]/8`` or ``[::1]``).  A pattern reaches public addresses only
    (:func:`.settings.is_public`), because the name server that answers for a name under it
    could answer 127.0.0.1; an exact name reaches any address, and so does a network.
    """

    name: str = ""
    network: ipaddress.IPv4Network | ipaddress.IPv6Network | None = None
    port: int | None = None

    @classmethod
    def parse(cls, text: str) -> HostRule:
        """Parse a rule of the command line, such as ``*.example.org:443``.

        Raises ValueError if it is invalid.
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
    """A proxy's allow list of hosts."""

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
    """Return ``text``, which is a host name, or an address that is converted to its usual form.

    Raises ValueError for anything else.
    """
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        if len(text) > _LONGEST_HOST or not _HOST.fullmatch(text):
            raise ValueError("expected a host name or an address") from None
    return text


@dataclass(frozen=True, slots=True)
class Settings:
    """The source, the target and the conditions of a forward.  Times are in seconds."""

    source: Locator  #: the address that clients connect to
    target: Locator  #: the address that each client is connected to
    allow: tuple[PeerRule, ...] = ()  #: vSockets clients that may connect; empty: all of them
    hosts: tuple[HostRule, ...] = ()  #: hosts that a proxy's clients may reach
    idle: float | None = None  #: silence that ends a connection or flow of datagrams
    connect_timeout: float = FORWARD_CONNECT_TIMEOUT_SECONDS  #: of one attempt
    wait: float = 0.0  #: time to retry a target that is not reachable yet
    max_connections: int = FORWARD_CONNECTIONS_MAX  #: at the same time; also limits flows

    def __post_init__(self) -> None:
        """Raise ValueError for contradictory settings."""
        source, target = self.source, self.target
        if isinstance(source, Proxy):
            raise ValueError(f"{source}: invalid as FROM (expected an address to listen on)")
        if isinstance(target, Inherited):
            raise ValueError(f"{target}: invalid as TO (expected an address to connect to)")
        # The type of an inherited socket is known once it is opened.
        if source.datagram != target.datagram and not isinstance(source, Inherited):
            raise ValueError(f"{source} and {target}: cannot join datagrams and a stream")
        if isinstance(target, Vsock) and VMADDR_CID_ANY in (target.cid, target.port):
            raise ValueError(f"{target}: expected a target with a CID and a port")
        if isinstance(target, Inet) and not (target.host and target.port):
            raise ValueError(f"{target}: expected a target with a host and a port")
        if isinstance(target, Proxy) and not self.hosts:
            raise ValueError(f"{target}: no hosts allowed (expected --allow-host, * for all)")
        if self.hosts and not isinstance(target, Proxy):
            raise ValueError(f"{target}: allowed hosts apply to http-proxy: and socks5: only")
        if self.allow and not isinstance(source, Vsock):
            raise ValueError(f"{source}: allowed CIDs apply to vSockets sources only")

    @property
    def flow_idle(self) -> float:
        """The seconds of silence after which a flow of datagrams is forgotten."""
        return FORWARD_FLOW_IDLE_SECONDS if self.idle is None else self.idle

    @property
    def is_shared(self) -> bool:
        """True if clients of several guests may connect."""
        cids = {rule.cid for rule in self.allow}
        return len(cids) != 1 or VMADDR_CID_ANY in cids

    @property
    def once(self) -> bool:
        """True if the forward serves one connection and then ends."""
        return isinstance(self.source, Stdio | Exec) or isinstance(self.target, Stdio)

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}"


def load(path: Path) -> list[Settings]:
    """Return the settings of the file's forwards, at least one.

    Raises ConfigurationError for the first mistake.
    """
    root = read_toml(path)
    root.require_known("forward")
    tables = root.tables("forward")
    if not tables:
        raise root.error("missing [[forward]] (expected at least one)")
    found: dict[Any, Table] = {}
    forwards = []
    for table in tables:
        settings = _settings(table)
        if settings.source in found:
            place = found[settings.source].place("from")
            raise table.error(f"{settings.source} is already forwarded at {place}", "from")
        found[settings.source] = table
        forwards.append(settings)
    return forwards


def _settings(table: Table) -> Settings:
    table.require_known(*_KEYS)
    locators: list[Any] = []
    for key in ("from", "to"):
        text = table.text(key)
        if text is None:
            raise table.error(f"missing {key} (expected an address)")
        locators.append(_read(table, parse_locator, text, key))
    given: dict[str, Any] = {
        "allow": _list(table, "allow", PeerRule.parse),
        "hosts": _list(table, "allow_host", HostRule.parse),
        "idle": _seconds(table, "idle"),
        "connect_timeout": _seconds(table, "connect_timeout"),
        "wait": _seconds(table, "wait"),
        "max_connections": table.integer("max_connections", 1, FORWARD_CONNECTIONS_MAX * 16),
    }
    present = {name: value for name, value in given.items() if value is not None}
    try:
        return Settings(*locators, **present)
    except ValueError as error:
        raise table.error(str(error)) from None


def _list(table: Table, key: str, parse: Callable[[str], _Value]) -> tuple[_Value, ...] | None:
    texts = table.texts(key)
    if texts is None:
        return None
    return tuple(_read(table, parse, text, key, index) for index, text in enumerate(texts))


def _read(table: Table, parse: Callable[[str], _Value], text: str, *place: str | int) -> _Value:
    try:
        return parse(text)
    except ValueError as error:
        raise table.error(str(error), *place) from None


def _seconds(table: Table, key: str) -> float | None:
    value = table.values.get(key)
    if value is None:
        return None
    if type(value) not in (int, float):
        raise table.error(f"{kind(value)} (expected seconds)", key)
    if not 0 <= value < float("inf"):
        raise table.error(f"{shown(value)} is out of range (expected seconds from 0)", key)
    return float(value)
