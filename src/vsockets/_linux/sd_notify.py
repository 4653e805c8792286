"""Notification of the service manager, as by ``sd_notify(3)``."""

from __future__ import annotations

import logging
import os
import socket


def notify_ready() -> None:
    """Notify the service manager, if any, that this process serves.

    The environment variable is removed, so that no child process can notify it.
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
