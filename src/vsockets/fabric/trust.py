"""Trusted vSockets (guide page 24).

"The vSockets API permits some host applications to create trusted vSockets, which may be used
for communication with isolated guest virtual machines."  In the guide's order these are: on Linux
a process with CAP_NET_ADMIN; on ESXi one with the privilege ``stream_vsocket_trusted`` or
``dgram_vsocket_trusted``, which here is granted in the configuration; on Workstation 8 one with
the user id of the virtual machine.

The trust of an endpoint is determined when it is created, and fixed from then on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from .endpoint import Credentials, EndpointKind
from .settings import Grant, Settings

if TYPE_CHECKING:
    from .context import Context

CAP_NET_BIND_SERVICE = 10
CAP_NET_ADMIN = 12


class Program(Protocol):
    """The client of a request.  The kernel is asked for its rights only as a decision needs."""

    @property
    def credentials(self) -> Credentials:
        """Process, user and group id."""

    def has_capability(self, capability: int) -> bool:
        """Return whether it has a capability of ``capabilities(7)``, by number."""

    def matches(self, grant: Grant) -> bool:
        """Return whether the grant applies to it."""


@dataclass(frozen=True, slots=True)
class Trust:
    """The trust of a program's endpoint of one socket type."""

    user: int
    privileged: bool  #: by capability or by grant: trusted for every guest
    domains: frozenset[str]  #: legacy profile: the domains the program belongs to

    def for_context(self, context: Context) -> bool:
        """Return whether the endpoint is trusted for the virtual machine ``context``."""
        return self.privileged or self.user == context.owner


def trust_of(program: Program, kind: EndpointKind, settings: Settings) -> Trust:
    """Return the trust of an endpoint that ``program`` creates now."""
    grants = [grant for grant in settings.grants if program.matches(grant)]
    granted = any(
        grant.datagram if kind is EndpointKind.DATAGRAM else grant.stream for grant in grants
    )
    domains = [grant.domains for grant in grants if grant.domains is not None]
    return Trust(
        program.credentials.uid,
        granted or program.has_capability(CAP_NET_ADMIN),
        frozenset().union(*domains) if domains else settings.host_domains,
    )
