"""Telling systemd, or who else started us as it does, that we serve: ``sd_notify(3)``."""

from __future__ import annotations

import logging
import os
import socket


def notify_ready() -> None:
    """Say so, once, if anybody wants to know.  Programs that we start are not to say it for us."""
    address = os.environ.pop("NOTIFY_SOCKET", "")
    if not address:
        return
    if address[0] == "@":
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        try:
            manager.sendto(b"READY=1", address)
        except OSError as error:
            logging.warning("the service manager does not listen: %s", error)
