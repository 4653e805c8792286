"""What the administrator sets: the guests, their isolation, their limits, and who is trusted.

The guide's chapter 5 is where the words come from.  These are plain values; vsockd's
configuration files become them, and the policy reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from .limits import (
    AUDIT_LINES_PER_SECOND,
    GUEST_DATAGRAM_MAX_BYTES,
    GUEST_PENDING_CONNECTS_MAX,
    GUEST_REQUESTS_PER_SECOND,
    GUEST_SOCKETS_MAX,
)


class Profile(Enum):
    """How far a guest reaches."""

    #: The host and the hypervisor's services, and no other guest: ESXi 5.1 and later, "the
    #: only configuration" (guide page 23).
    DEFAULT = "default"
    #: Only the hypervisor's services and trusted endpoints: an isolated virtual machine
    #: ("Isolation of Virtual Machines" and "Trusted vSockets", guide page 24).
    RESTRICTED = "restricted"
    #: ESX 4.0 to ESXi 5.0, where ``unrestricted`` and ``domain`` decide ("Isolation Options
    #: in VMX", guide page 24).
    LEGACY = "legacy"


@dataclass(frozen=True, slots=True)
class Limits:
    """What one guest, or one user of the host, may have of vsockd; `vsockets.limits` has the
    reasons.
    """

    sockets: int = GUEST_SOCKETS_MAX  #: at the same time
    pending_connects: int = GUEST_PENDING_CONNECTS_MAX  #: asked for and not yet accepted
    request_rate: int = GUEST_REQUESTS_PER_SECOND  #: requests to vsockd, a second
    datagram_bytes: int = GUEST_DATAGRAM_MAX_BYTES  #: sent and not yet received; guests alone


@dataclass(frozen=True, slots=True)
class Isolation:
    """Whom a guest may talk to ("Isolation Options in VMX", guide page 24).

    ``unrestricted`` and ``domain`` have a meaning with the legacy profile alone; ESXi 5.1 and
    later ignore them, and so does every other profile.
    """

    profile: Profile = Profile.DEFAULT
    unrestricted: bool = False  #: may talk to all of the host, and to guests that are so too
    domain: str = ""  #: the group of guests and host programs it belongs to


@dataclass(frozen=True, slots=True)
class Grant:
    """Host programs whose sockets are trusted ("Trusted vSockets", guide page 24), or that may
    do something else that programs may not.

    A program matches when it matches all of ``user``, ``group`` and ``executable`` that are
    not None; ``user`` or ``group`` is not.  ``executable`` narrows a grant and authenticates
    nothing: a user can have any program executed that he may execute.
    """

    user: int | None
    group: int | None
    executable: str | None  #: an absolute path
    stream: bool  #: ESXi's ``stream_vsocket_trusted``
    datagram: bool  #: ESXi's ``dgram_vsocket_trusted``
    #: the domains the program belongs to, instead of the host's; None: those of the host
    domains: frozenset[str] | None
    capture: bool = False  #: may see what passes the devices of virtual machines


@dataclass(frozen=True, slots=True)
class ContextSettings:
    """One guest."""

    cid: int | None  #: None: vsockd chooses one
    name: str  #: "": vsockd makes one up
    owner: int | None  #: the user id that owns the virtual machine; None: vsockd's own
    isolation: Isolation
    limits: Limits
    powered: bool
    hybrid: str = ""  #: a path: its ports are also behind this unix socket (hybrid vsock)
    #: its programs may bind ports below 1024 without a capability; for the fabric owner's guests
    reserved_ports: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    """All that is configured.  Without any configuration: what ESXi 5.1 and later do."""

    contexts: tuple[ContextSettings, ...] = ()
    grants: tuple[Grant, ...] = ()
    #: the domains host programs belong to (guide page 24); "" is the default domain
    host_domains: frozenset[str] = frozenset({""})
    limits: Limits = Limits()  #: of guests that are not configured
    host_limits: Limits = Limits()  #: of each user of the host who is no administrator
    audit_rate: int = AUDIT_LINES_PER_SECOND  #: denials logged a second, for each context
