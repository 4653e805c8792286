"""This process: its limit of descriptors, and its service manager.

The proxies of guests import this module, and a guest's Python may lack ctypes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import resource
import socket


def allow_many_descriptors() -> None:
    """Raise the soft limit of descriptors to the hard limit.

    For programs that hold descriptors for every client connection.  The usual soft limit of 1024
    exists for programs that call select().
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # a hard limit above fs.nr_open
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def notify_ready() -> None:
    """Notify the service manager, if any, that this process is ready to serve clients.

    NOTIFY_SOCKET is removed from the environment, so that no child process notifies it as well.
    """
    address = os.environ.pop("NOTIFY_SOCKET", "")
    if not address:
        return
    if address[0] == "@":
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        try:
            manager.sendto(b"READY=1", address)
        except OSError as error:
            logging.warning("cannot notify the service manager: %s", error)
