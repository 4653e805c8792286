"""Trusted vSockets (guide page 24).

"The vSockets API permits some host applications to create trusted vSockets, which may be used
for communication with isolated guest virtual machines."  Who may, in the guide's order: on
Linux a process with CAP_NET_ADMIN; on ESXi one with the privilege ``stream_vsocket_trusted`` or
``dgram_vsocket_trusted``, which here is granted in the configuration; on Workstation 8 one with
the user id of the virtual machine.

An endpoint is trusted, or not, from its creation on, whatever becomes of the process.
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
    """Who asks.  The kernel is asked about it only as far as a decision needs."""

    @property
    def credentials(self) -> Credentials:
        """Process, user and group."""

    def has_capability(self, capability: int) -> bool:
        """Whether it has a capability of ``capabilities(7)``, by its number."""

    def matches(self, grant: Grant) -> bool:
        """Whether it is who the grant is for."""


@dataclass(frozen=True, slots=True)
class Trust:
    """What a program's endpoint of one kind has from its program."""

    user: int
    privileged: bool  #: by capability or by grant: trusted for every guest
    domains: frozenset[str]  #: legacy profile: the domains the program belongs to

    def toward(self, context: Context) -> bool:
        """Whether the endpoint is a trusted one for the virtual machine ``context``."""
        return self.privileged or self.user == context.owner


def trust_of(program: Program, kind: EndpointKind, settings: Settings) -> Trust:
    """The trust of an endpoint that ``program`` creates now."""
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
