"""The hypervisor's decisions, with no socket, clock or process in them.

``Fabric`` is told what happened and answers what to do; vsockd does it.
"""

from .context import Context, Contexts
from .endpoint import Connection, Credentials, Endpoint, Kind
from .errors import Refused
from .fabric import Fabric

__all__ = [
    "Connection",
    "Context",
    "Contexts",
    "Credentials",
    "Endpoint",
    "Fabric",
    "Kind",
    "Refused",
]
