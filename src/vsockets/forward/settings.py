"""The settings of one forward, as plain values."""

from __future__ import annotations

from dataclasses import dataclass

from ..model.constants import VMADDR_CID_ANY
from ..model.locator import Exec, Inet, Inherited, Locator, Proxy, Stdio, Vsock
from .limits import (
    FORWARD_CONNECT_TIMEOUT_SECONDS,
    FORWARD_CONNECTIONS_MAX,
    FORWARD_FLOW_IDLE_SECONDS,
)
from .rules import HostRule, PeerRule


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
            raise ValueError(f"{source}: a target (expected an address to listen on)")
        if isinstance(target, Inherited):
            raise ValueError(f"{target}: a source (expected an address to connect to)")
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
        """Return the seconds of silence after which a flow of datagrams is forgotten."""
        return FORWARD_FLOW_IDLE_SECONDS if self.idle is None else self.idle

    @property
    def is_shared(self) -> bool:
        """Return whether clients of several guests may connect."""
        cids = {rule.cid for rule in self.allow}
        return len(cids) != 1 or VMADDR_CID_ANY in cids

    @property
    def once(self) -> bool:
        """Return whether the forward has a single connection and ends with it."""
        return isinstance(self.source, Stdio | Exec) or isinstance(self.target, Stdio)

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}"
