"""The hypervisor's decisions, with no socket, clock or process in them.

``Fabric`` is told what happened and answers what to do; vsockd does it.
"""

from .context import Context, Contexts
from .counts import Counts
from .endpoint import Connection, Credentials, DevicePorts, Endpoint, EndpointKind
from .errors import LIMIT_RULES, Denied, Refused, Rule
from .fabric import Fabric
from .life_cycle import Change, State
from .party import Party
from .settings import ContextSettings, Grant, Isolation, Limits, Profile, Settings
from .trust import CAP_NET_ADMIN, CAP_NET_BIND_SERVICE, Program, Trust, trust_of

__all__ = [
    "CAP_NET_ADMIN",
    "CAP_NET_BIND_SERVICE",
    "LIMIT_RULES",
    "Change",
    "Connection",
    "Context",
    "ContextSettings",
    "Contexts",
    "Counts",
    "Credentials",
    "Denied",
    "DevicePorts",
    "Endpoint",
    "EndpointKind",
    "Fabric",
    "Grant",
    "Isolation",
    "Limits",
    "Party",
    "Profile",
    "Program",
    "Refused",
    "Rule",
    "Settings",
    "State",
    "Trust",
    "trust_of",
]
