"""The parts of a supervisor that handlers of system calls use."""

from __future__ import annotations

from typing import NamedTuple

from .arch import Architecture
from .interception import Interceptor
from .port_holders import PortHolders
from .process import Processes
from .sockets import Routes, Sockets
from .vsockd_client import VsockdClient


class Services(NamedTuple):
    """Parts of a supervisor, for the handlers of system calls; made once."""

    architecture: Architecture
    interceptor: Interceptor
    processes: Processes
    sockets: Sockets
    vsockd: VsockdClient
    ports: PortHolders
    routes: Routes
    marker: int  #: a descriptor that marks the end of a record, see ``calls.datagrams``
