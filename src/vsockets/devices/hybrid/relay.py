"""Relay of streams to unix sockets: ``python -m vsockets.devices.hybrid.relay NAME FOLDER USER``.

vsockd starts the relay for a guest that may connect to unix sockets in place of ports of the host:
one for each port, with names that begin with NAME.  FOLDER is the number of a descriptor of their
folder, standard input is the link to vsockd.  The relay receives streams to ports of the host and
splices each to the unix socket of its port, with the credentials of USER (a user id).
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys

from ... import logs
from ..._linux.process import allow_many_descriptors
from ...model.constants import VMADDR_CID_HOST
from ...protocol.hybrid import port_name
from ..client import DeviceClient
from ..loop import DeviceLoop
from ..sandbox import enter_sandbox
from .host_to_guest import Connector, Done, HostToGuest


def main(name: str, place: int, user: int) -> None:
    """Serve until vsockd has closed the link and the last stream has ended."""
    logs.configure("vsock relay: %(message)s", logging.WARNING, "text")
    os.chdir(place)
    os.close(place)
    allow_many_descriptors()
    loop = DeviceLoop()
    link = socket.socket(fileno=os.dup(sys.stdin.fileno()))
    fabric = DeviceClient(loop, link, VMADDR_CID_HOST, datagrams=False)

    def make_connector(port: int, done: Done) -> Connector:
        return Connector(loop, port_name(name, port), None, 0.0, done)

    host_to_guest = HostToGuest(loop, fabric, make_connector)
    fabric.on_connect = host_to_guest.on_connect
    fabric.on_lost = lambda: host_to_guest.close_when_idle(loop.stop)
    enter_sandbox(user, paths=True)
    # An interrupt from a terminal ends vsockd, not the established streams.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with loop.unhindered():
        loop.run()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
