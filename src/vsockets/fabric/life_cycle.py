"""State changes of a virtual machine, and their effect on its vSockets (guide page 7).

"VMware vSockets lose connection after suspend and resume of a virtual machine", they "do not
survive live migration", and "are dropped when a virtual machine is put into fault tolerance
mode, and no new vSockets connections can be established while a virtual machine is in FT mode".
"Communicating guest virtual machines must be running, not powered off."

    =========  ==========================================================================
    change     from            to          connections  what else
    =========  ==========================================================================
    suspend    running         suspended   dropped      blocks all traffic
    resume     suspended       running
    migrate    running         running     dropped
    reset      not off         the same    dropped
    ft on      running         running     dropped      no new connections
    ft off     running         running                  connections again
    power-off  not off         off         dropped      removes every endpoint, ends FT mode
    power-on   off             running
    =========  ==========================================================================

Bound and listening sockets outlive every change but power-off, as sockets in guest memory do.
Datagrams need no connection: FT mode lets them pass.
"""

from __future__ import annotations

import errno
from enum import Enum

from .model import Context, Refused, State


class Change(Enum):
    """A change of state that an administrator or hypervisor requests."""

    SUSPEND = "suspend"
    RESUME = "resume"
    MIGRATE = "migrate"
    RESET = "reset"
    FT_ON = "ft-on"
    FT_OFF = "ft-off"
    POWER_OFF = "power-off"
    POWER_ON = "power-on"


#: The changes that end every established connection of a context.
DROPS_CONNECTIONS = frozenset(
    {Change.SUSPEND, Change.MIGRATE, Change.RESET, Change.FT_ON, Change.POWER_OFF}
)

_TRANSITIONS = {
    (State.RUNNING, Change.SUSPEND): State.SUSPENDED,
    (State.SUSPENDED, Change.RESUME): State.RUNNING,
    (State.RUNNING, Change.MIGRATE): State.RUNNING,
    (State.RUNNING, Change.RESET): State.RUNNING,
    (State.SUSPENDED, Change.RESET): State.SUSPENDED,
    (State.RUNNING, Change.FT_ON): State.RUNNING,
    (State.RUNNING, Change.FT_OFF): State.RUNNING,
    (State.RUNNING, Change.POWER_OFF): State.OFF,
    (State.SUSPENDED, Change.POWER_OFF): State.OFF,
    (State.OFF, Change.POWER_ON): State.RUNNING,
}


def apply(context: Context, change: Change) -> None:
    """Apply ``change`` to the state of ``context``.

    Raises Refused with EINVAL for the host or hypervisor, and for a change that is not allowed in
    the guest's state.
    """
    if not context.is_guest:
        raise Refused(
            errno.EINVAL,
            f"cannot {change.value} context {context.cid}: it is the {context.name} "
            "(expected a guest)",
        )
    after = _TRANSITIONS.get((context.state, change))
    if after is None:
        raise Refused(
            errno.EINVAL,
            f"cannot {change.value} context {context.cid}: it is {context.state.value}",
        )
    if change in (Change.FT_ON, Change.FT_OFF):
        if context.fault_tolerant is (change is Change.FT_ON):
            mode = "in" if context.fault_tolerant else "not in"
            raise Refused(errno.EINVAL, f"context {context.cid} is {mode} FT mode already")
        context.fault_tolerant = change is Change.FT_ON
    elif after is State.OFF:
        context.fault_tolerant = False
    context.state = after
