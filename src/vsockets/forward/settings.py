"""What one forward is to do, as plain values."""

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
    """From where to where, and under what conditions.  Times are in seconds."""

    source: Locator  #: where clients come to
    target: Locator  #: where each of them is taken
    allow: tuple[PeerRule, ...] = ()  #: vSockets clients that may connect; empty: all
    hosts: tuple[HostRule, ...] = ()  #: where a proxy's clients may go
    idle: float | None = None  #: a connection, or flow of datagrams, ends when silent for so long
    connect_timeout: float = FORWARD_CONNECT_TIMEOUT_SECONDS  #: of one attempt to reach the target
    wait: float = 0.0  #: how long to try to reach a target that is not there yet
    max_connections: int = FORWARD_CONNECTIONS_MAX  #: at the same time; also of flows

    def __post_init__(self) -> None:
        """Raises ValueError for what makes no sense."""
        source, target = self.source, self.target
        if isinstance(source, Proxy):
            raise ValueError(f"{source} is a target: clients come to an address")
        if isinstance(target, Inherited):
            raise ValueError(f"{target} is a source: it is a socket that listens")
        # What an inherited socket is shows when it is looked at.
        if source.datagram != target.datagram and not isinstance(source, Inherited):
            raise ValueError(f"{source} and {target}: one has datagrams, the other a stream")
        if isinstance(target, Vsock) and VMADDR_CID_ANY in (target.cid, target.port):
            raise ValueError(f"{target}: a target needs a CID and a port")
        if isinstance(target, Inet) and not (target.host and target.port):
            raise ValueError(f"{target}: a target needs a host and a port")
        if isinstance(target, Proxy) and not self.hosts:
            raise ValueError(f"{target} needs hosts it may connect to: --allow-host, * for all")
        if self.hosts and not isinstance(target, Proxy):
            raise ValueError(f"{target}: a list of hosts is for http-proxy: and socks5:")
        if self.allow and not isinstance(source, Vsock):
            raise ValueError(f"{source}: only vSockets clients have a CID to allow")

    @property
    def flow_idle(self) -> float:
        """After how long a silent flow of datagrams is forgotten."""
        return FORWARD_FLOW_IDLE_SECONDS if self.idle is None else self.idle

    @property
    def is_shared(self) -> bool:
        """Whether several guests may come."""
        cids = {rule.cid for rule in self.allow}
        return len(cids) != 1 or VMADDR_CID_ANY in cids

    @property
    def once(self) -> bool:
        """Whether there is one connection only, with whose end the forward ends."""
        return isinstance(self.source, Stdio | Exec) or isinstance(self.target, Stdio)

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}"
