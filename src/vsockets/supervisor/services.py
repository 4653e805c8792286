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
    """What a handler of system calls works with, made once for each supervisor."""

    architecture: Architecture
    interceptor: Interceptor
    processes: Processes
    sockets: Sockets
    vsockd: VsockdClient
    ports: PortHolders
    routes: Routes
    marker: int  #: a descriptor that marks the end of a record, see ``calls.seqpacket_eor``
