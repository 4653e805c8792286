"""Configured values: guests, their isolation and limits, and grants of trust.

The terms are those of the guide's chapter 5.  The classes are plain values, read from vsockd's
configuration files and evaluated by the policy.
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
    """The set of peers that a guest may communicate with."""

    #: The host and the hypervisor's services, but no other guest: ESXi 5.1 and later, "the
    #: only configuration" (guide page 23).
    DEFAULT = "default"
    #: Hypervisor services and trusted endpoints only: an isolated virtual machine
    #: ("Isolation of Virtual Machines" and "Trusted vSockets", guide page 24).
    RESTRICTED = "restricted"
    #: ESX 4.0 to ESXi 5.0: ``unrestricted`` and ``domain`` apply ("Isolation Options
    #: in VMX", guide page 24).
    LEGACY = "legacy"


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one guest, or of one user of the host; reasons are in :mod:`.fabric.limits`."""

    sockets: int = GUEST_SOCKETS_MAX  #: simultaneous sockets
    pending_connects: int = GUEST_PENDING_CONNECTS_MAX  #: requested and not yet accepted
    request_rate: int = GUEST_REQUESTS_PER_SECOND  #: requests to vsockd per second
    datagram_bytes: int = GUEST_DATAGRAM_MAX_BYTES  #: unread bytes sent; applies to guests only


@dataclass(frozen=True, slots=True)
class Isolation:
    """Isolation of a guest ("Isolation Options in VMX", guide page 24).

    ``unrestricted`` and ``domain`` apply to the legacy profile only; ESXi 5.1 and later ignore
    them, and so does every other profile.
    """

    profile: Profile = Profile.DEFAULT
    unrestricted: bool = False  #: may reach all of the host, and other unrestricted guests
    domain: str = ""  #: the group of guests and host programs that the guest belongs to


@dataclass(frozen=True, slots=True)
class Grant:
    """Rights of host programs: trusted sockets ("Trusted vSockets", guide page 24), or capture.

    A program matches when it matches each of ``user``, ``group`` and ``executable`` that is set;
    ``user`` or ``group`` is always set.  ``executable`` narrows a grant and does not authenticate:
    a user can run any program that the user may execute, with connections of the user's choice.
    """

    user: int | None
    group: int | None
    executable: str | None  #: an absolute path
    stream: bool  #: ESXi's ``stream_vsocket_trusted``
    datagram: bool  #: ESXi's ``dgram_vsocket_trusted``
    #: domains the program belongs to, instead of the host's; None for the host's
    domains: frozenset[str] | None
    capture: bool = False  #: may capture traffic at the devices of virtual machines


@dataclass(frozen=True, slots=True)
class ContextSettings:
    """Settings of one guest."""

    cid: int | None  #: None: chosen by vsockd
    name: str  #: "": chosen by vsockd
    owner: int | None  #: user id of the virtual machine's owner; None: vsockd's own
    isolation: Isolation
    limits: Limits
    powered: bool
    hybrid: str = ""  #: path of a unix socket that offers the guest's ports as hybrid vsock
    #: programs may bind ports below 1024 without a capability; for guests of the fabric's owner
    reserved_ports: bool = False
    parent: int = 0  #: CID of the guest that has started this one; 0 without one
    reported_cid: int = 0  #: CID that programs get for their own from ``/dev/vsock``; 0: the CID


@dataclass(frozen=True, slots=True)
class Settings:
    """The whole configuration.  The defaults behave as ESXi 5.1 and later."""

    contexts: tuple[ContextSettings, ...] = ()
    grants: tuple[Grant, ...] = ()
    #: the domains that host programs belong to (guide page 24); "" is the default domain
    host_domains: frozenset[str] = frozenset({""})
    limits: Limits = Limits()  #: of guests without a configuration
    host_limits: Limits = Limits()  #: of each host user other than administrators
    audit_rate: int = AUDIT_LINES_PER_SECOND  #: denials logged per second and context
