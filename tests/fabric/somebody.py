"""Programs, as the fabric knows them."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

from vsockets.fabric import CAP_NET_ADMIN, CAP_NET_BIND_SERVICE, Credentials, Grant

_ME = Credentials(100, 1000, 1000)


@dataclass(frozen=True)
class Somebody:
    """A program that is what it says."""

    credentials: Credentials = _ME
    capabilities: Container[int] = field(default=())
    grants: Container[Grant] = field(default=())

    def has_capability(self, capability: int) -> bool:
        return capability in self.capabilities

    def matches(self, grant: Grant) -> bool:
        return grant in self.grants


def granted(*grants: Grant) -> Somebody:
    """A program that matches ``grants``, if they are configured."""
    return Somebody(grants=grants)


ME = Somebody()
YOU = Somebody(Credentials(200, 2000, 2000))
SERVICE = Somebody(capabilities={CAP_NET_BIND_SERVICE})
ADMIN = Somebody(capabilities={CAP_NET_ADMIN})
ROOT = Somebody(Credentials(1, 0, 0))
