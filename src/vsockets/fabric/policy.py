"""Access policy: the guide's chapter 5, "Security of the VMCI Device".

Four checks come from the guide, the last two are additions; each is a function here:

1. :func:`require_path`: may these two contexts communicate, in their present states?
2. :func:`require_trust`: may this isolated guest and this program of the host communicate?
3. :func:`require_service`: may this program be a service of the hypervisor?
4. :func:`require_reserved_port`: may this program bind a port below 1024?
5. :func:`require_capture`: may this program capture traffic at a virtual machine's device?
6. :func:`require_own_guest`: may this guest's programs have reserved ports without a privilege?

Processes of one context may communicate with any profile (guide page 8, "interprocess
communications on a guest"), and every guest may use the hypervisor's services ("This allows use
of VMware Tools without any problems even for an isolated virtual machine").

To a guest, a forbidden destination answers like an absent one, so that the guest cannot discover
what else runs on the host.  A program of the host may know, and gets EACCES.
"""

from __future__ import annotations

import errno

from ..model.constants import VMADDR_CID_HOST, VMADDR_CID_HYPERVISOR
from .model import Context, Credentials, Denied, EndpointKind, Program, Refused, Rule, State, Trust
from .settings import Profile, Settings

CAP_NET_BIND_SERVICE = 10
CAP_NET_ADMIN = 12

# Module alias of an enum member: hot path.
_RUNNING = State.RUNNING


def require_path(source: Context, destination: Context, connecting: bool) -> None:
    """Raise Denied unless ``source`` may reach ``destination`` in their present states.

    ``connecting`` is True for a new connection, False for a datagram.
    """
    if source is not destination and source.is_guest and destination.is_guest:
        _require_neighbours(source, destination)
    if source.state is not _RUNNING:
        raise Denied(errno.ENETDOWN, Rule.SUSPENDED, f"context {source.cid} is suspended")
    if destination.state is not _RUNNING:
        raise Denied(errno.EHOSTUNREACH, Rule.SUSPENDED, f"context {destination.cid} is suspended")
    if connecting and source.fault_tolerant:
        raise Denied(errno.ENETDOWN, Rule.FAULT_TOLERANCE, f"context {source.cid} is in FT mode")
    if connecting and destination.fault_tolerant:
        reason = f"context {destination.cid} is in FT mode"
        raise Denied(errno.EHOSTUNREACH, Rule.FAULT_TOLERANCE, reason)


def _require_neighbours(source: Context, destination: Context) -> None:
    """Raise Denied unless one guest is the other's parent, or ESX 4.0 to 5.0 would allow it.

    "A virtual machine could communicate with [...] other virtual machines with vmci0.unrestricted
    set TRUE", "only with [...] other virtual machines in the same domain".
    """
    if source.parent == destination.cid or destination.parent == source.cid:
        return
    here, there = source.isolation, destination.isolation
    if not here.profile is there.profile is Profile.LEGACY:
        rule, reason = Rule.GUEST_TO_GUEST, "guest to guest: only host to guest is allowed"
    elif here.domain != there.domain:
        rule, reason = Rule.DOMAIN, f"domain {here.domain!r} does not see {there.domain!r}"
    elif not (here.unrestricted and there.unrestricted):
        rule, reason = Rule.RESTRICTED, "guest to guest: both must be unrestricted"
    else:
        return
    raise Denied(errno.EHOSTUNREACH, rule, reason)


def trust_of(program: Program, kind: EndpointKind, settings: Settings) -> Trust:
    """Return the trust of an endpoint that ``program`` creates now (guide page 24).

    "The vSockets API permits some host applications to create trusted vSockets, which may be used
    for communication with isolated guest virtual machines."  In the guide's order these are: on
    Linux a process with CAP_NET_ADMIN; on ESXi one with the privilege ``stream_vsocket_trusted``
    or ``dgram_vsocket_trusted``, which here is granted in the configuration; on Workstation 8 one
    with the user id of the virtual machine.

    The trust of an endpoint is determined when it is created, and fixed from then on.
    """
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


def require_trust(guest: Context, trust: Trust, kind: EndpointKind, from_guest: bool) -> None:
    """Raise Denied unless ``guest`` may communicate with a host endpoint that has ``trust``.

    A restricted guest, and a legacy guest that is not unrestricted, may communicate with trusted
    endpoints only, whichever side connects; a legacy guest only with those in its domain.
    """
    isolation = guest.isolation
    legacy = isolation.profile is Profile.LEGACY
    if legacy and isolation.domain not in trust.domains:
        rule, reason = Rule.DOMAIN, f"the host's endpoint is not in domain {isolation.domain!r}"
    elif not (legacy and isolation.unrestricted) and not trust.for_context(guest):
        rule, reason = Rule.RESTRICTED, f"context {guest.cid} is limited to trusted endpoints"
    else:
        return
    if not from_guest:
        code = errno.EACCES
    elif kind is EndpointKind.DATAGRAM:
        code = errno.ECONNREFUSED
    else:
        code = errno.ECONNRESET
    raise Denied(code, rule, reason)


def require_service(context: Context, program: Credentials) -> None:
    """Raise Denied unless ``program`` may have endpoints in ``context``.

    "The VMCI facility implicitly authenticates any hypervisor service as being part of the
    trusted code base": therefore only the fabric's owner and root may provide such services.
    """
    if context.cid == VMADDR_CID_HYPERVISOR and program.uid not in (context.owner, 0):
        raise Denied(
            errno.EACCES,
            Rule.HYPERVISOR_SERVICE,
            f"services of the hypervisor are reserved for user {context.owner}",
        )


def require_reserved_port(context: Context, program: Program, port: int, privileged: bool) -> None:
    """Raise Denied unless ``program`` may bind ``port``, which is below 1024, in ``context``.

    "A process must have capability CAP_NET_BIND_SERVICE so it can bind to a port within the
    reserved < 1024 port range"; in a guest with ``reserved_ports`` every program may.  Without
    ``privileged``, the request was forwarded by a process whose own capabilities do not count.
    """
    if context.reserved_ports or (privileged and program.has_capability(CAP_NET_BIND_SERVICE)):
        return
    reason = f"port {port} is reserved (expected CAP_NET_BIND_SERVICE)"
    raise Denied(errno.EACCES, Rule.RESERVED_PORT, reason)


def require_own_guest(guest_owner: int, fabric_owner: int) -> None:
    """Raise Refused when ``reserved_ports`` is requested for a guest of another user.

    A port below 1024 assures peers that a privileged program of the guest provides the service.
    The fabric's owner may give that assurance only for guests of the same user.
    """
    if guest_owner != fabric_owner:
        raise Refused(
            errno.EPERM,
            f"reserved ports: the guest belongs to user {guest_owner} "
            f"(expected the fabric's owner, user {fabric_owner})",
        )


def require_capture(asker: Context, program: Program, settings: Settings) -> None:
    """Raise Denied unless ``program``, in the context ``asker``, may capture at a device.

    Traffic of guests may contain any host user's secrets, so only the fabric's owner, root, and
    host programs with a grant in the configuration may capture it.
    """
    if asker.cid == VMADDR_CID_HOST:
        if program.credentials.uid in (asker.owner, 0):
            return
        if any(grant.capture and program.matches(grant) for grant in settings.grants):
            return
    reason = "capturing at a device is reserved for the fabric's owner and programs with a grant"
    raise Denied(errno.EACCES, Rule.CAPTURE, reason)
