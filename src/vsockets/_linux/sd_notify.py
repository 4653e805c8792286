"""Notification of the service manager, as by ``sd_notify(3)``."""

from __future__ import annotations

import logging
import os
import socket


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
