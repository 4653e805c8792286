"""Programs for tests of the fabric's decisions."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field

from vsockets.fabric import CAP_NET_ADMIN, CAP_NET_BIND_SERVICE, Credentials, Grant

_ME = Credentials(100, 1000, 1000)


@dataclass(frozen=True)
class StubProgram:
    """A program with the given identity and capabilities."""

    credentials: Credentials = _ME
    capabilities: Container[int] = field(default=())
    grants: Container[Grant] = field(default=())

    def has_capability(self, capability: int) -> bool:
        return capability in self.capabilities

    def matches(self, grant: Grant) -> bool:
        return grant in self.grants


def granted(*grants: Grant) -> StubProgram:
    """Return a program that matches ``grants`` where they are configured."""
    return StubProgram(grants=grants)


ME = StubProgram()
YOU = StubProgram(Credentials(200, 2000, 2000))
SERVICE = StubProgram(capabilities={CAP_NET_BIND_SERVICE})
ADMIN = StubProgram(capabilities={CAP_NET_ADMIN})
ROOT = StubProgram(Credentials(1, 0, 0))
