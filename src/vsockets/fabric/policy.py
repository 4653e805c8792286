"""Who may talk to whom: the guide's chapter 5, "Security of the VMCI Device".

Four questions decide, each a function here, and two more that the guide does not ask:

1. :func:`require_path`: may these two contexts have to do with each other, in their state?
2. :func:`require_trust`: may this guest and this program of the host, if the guest is isolated?
3. :func:`require_service`: may this program be a service of the hypervisor?
4. :func:`require_reserved_port`: may this program have a port below 1024?
5. :func:`require_capture`: may this program see what passes a virtual machine's device?
6. :func:`require_own_guest`: may this guest's programs have reserved ports without a privilege?

Processes of one context may talk with each other whatever its profile (guide page 8,
"interprocess communications on a guest"), and every guest with the hypervisor's services ("This
allows use of VMware Tools without any problems even for an isolated virtual machine").

What a guest may not reach answers as if it were not there, so that it cannot find out who else
is on the host.  A program of the host may know, and gets EACCES.
"""

from __future__ import annotations

import errno

from ..model.constants import VMADDR_CID_HOST, VMADDR_CID_HYPERVISOR
from .context import Context
from .endpoint import Credentials, EndpointKind
from .errors import Denied, Refused, Rule
from .life_cycle import State
from .settings import Profile, Settings
from .trust import CAP_NET_BIND_SERVICE, Program, Trust

# A name of our own: looking a member up in its enum costs as much as a short function.
_RUNNING = State.RUNNING


def require_path(source: Context, destination: Context, connecting: bool) -> None:
    """Raise Denied unless ``source`` may reach ``destination``, now.

    ``connecting`` tells a new connection from a datagram.
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
    """Between guests: the rules of ESX 4.0 to 5.0, if both live by them, else never.

    "A virtual machine could communicate with [...] other virtual machines with
    vmci0.unrestricted set TRUE", "only with [...] other virtual machines in the same domain".
    """
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


def require_trust(guest: Context, trust: Trust, kind: EndpointKind, from_guest: bool) -> None:
    """Raise Denied unless ``guest`` may talk with the host's endpoint that has ``trust``.

    A restricted guest, and one of the legacy profile that is not unrestricted, meets trusted
    endpoints only, whoever starts; one of the legacy profile meets only those in its domain.
    """
    isolation = guest.isolation
    legacy = isolation.profile is Profile.LEGACY
    if legacy and isolation.domain not in trust.domains:
        rule, reason = Rule.DOMAIN, f"the host's endpoint is not in domain {isolation.domain!r}"
    elif not (legacy and isolation.unrestricted) and not trust.toward(guest):
        rule, reason = Rule.RESTRICTED, f"context {guest.cid} is for trusted endpoints only"
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
    trusted code base": so those are the fabric's owner's, and root's, alone.
    """
    if context.cid == VMADDR_CID_HYPERVISOR and program.uid not in (context.owner, 0):
        raise Denied(
            errno.EACCES,
            Rule.HYPERVISOR_SERVICE,
            f"services of the hypervisor belong to user {context.owner}",
        )


def require_reserved_port(context: Context, program: Program, port: int, privileged: bool) -> None:
    """Raise Denied unless ``program`` may bind ``port``, one below 1024, in ``context``.

    "A process must have capability CAP_NET_BIND_SERVICE so it can bind to a port within the
    reserved < 1024 port range"; in a guest with ``reserved_ports`` every program may.  Without
    ``privileged`` the program asks by way of another one, whose capabilities do not count.
    """
    if context.reserved_ports or (privileged and program.has_capability(CAP_NET_BIND_SERVICE)):
        return
    reason = f"port {port} is reserved: CAP_NET_BIND_SERVICE is needed"
    raise Denied(errno.EACCES, Rule.RESERVED_PORT, reason)


def require_own_guest(guest_owner: int, fabric_owner: int) -> None:
    """Refuse ``reserved_ports`` to a guest of another user than the fabric's owner.

    A port below 1024 tells peers that a privileged program of the guest serves there.  The
    fabric's owner may say so of his own guest, and of no other user's.
    """
    if guest_owner != fabric_owner:
        raise Refused(
            errno.EPERM,
            f"reserved ports: the guest belongs to user {guest_owner}, "
            f"expected the fabric's owner, user {fabric_owner}",
        )


def require_capture(asker: Context, program: Program, settings: Settings) -> None:
    """Raise Denied unless ``program``, in the context ``asker``, may see what passes a device.

    What guests say, and what is said to them, may be anybody's secret on the host: so it is for
    the fabric's owner and root, and for programs of the host that the configuration names.
    """
    if asker.cid == VMADDR_CID_HOST:
        if program.credentials.uid in (asker.owner, 0):
            return
        if any(grant.capture and program.matches(grant) for grant in settings.grants):
            return
    reason = "to capture what passes a device needs a grant, or to be the fabric's owner"
    raise Denied(errno.EACCES, Rule.CAPTURE, reason)
