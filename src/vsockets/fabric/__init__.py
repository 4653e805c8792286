"""The hypervisor's decisions as pure computation, without sockets, clocks or processes.

vsockd reports each request and event to ``Fabric`` and carries out what ``Fabric`` returns.
"""

from .fabric import Fabric
from .life_cycle import Change
from .model import (
    LIMIT_RULES,
    Connection,
    Context,
    Contexts,
    Counts,
    Credentials,
    Denied,
    DeviceDatagrams,
    DevicePorts,
    DeviceStreams,
    Endpoint,
    EndpointKind,
    Party,
    Program,
    Refused,
    Rule,
    State,
    Trust,
)
from .policy import CAP_NET_ADMIN, CAP_NET_BIND_SERVICE, trust_of
from .settings import ContextSettings, Grant, Isolation, Limits, Profile, Settings

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
    "DeviceDatagrams",
    "DevicePorts",
    "DeviceStreams",
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
