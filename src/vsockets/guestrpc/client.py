"""The administrator's requests to the GuestRPC service."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

from ..state_folder import connect_to
from .limits import (
    GUESTRPC_COMMAND_TIMEOUT_SECONDS,
    GUESTRPC_CONTROL_MAX_BYTES,
    GUESTRPC_HOST_VARIABLES_MAX_BYTES,
)

#: The name of the service's control socket, in the fabric's state folder.
CONTROL = "guestinfo"


def to_text(value: bytes) -> str:
    """Return a variable's value as the control protocol has it."""
    return value.decode(errors="surrogateescape")


def to_bytes(text: str) -> bytes:
    """Return a variable's value from the control protocol."""
    return text.encode(errors="surrogateescape")


class RequestFailed(Exception):
    """A request that the service did not carry out; the message says why."""


def request(folder: Path, do: str, **given: Any) -> Any:
    """Return the result of a request to the service of the fabric in ``folder``.

    Raises RequestFailed when the service refuses it, OSError when the service cannot be reached.
    """
    line = json.dumps({"do": do, **given}).encode() + b"\n"
    if len(line) > GUESTRPC_CONTROL_MAX_BYTES:
        most = GUESTRPC_HOST_VARIABLES_MAX_BYTES
        raise RequestFailed(f"too many bytes of variables, expected at most {most}")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(2 * GUESTRPC_COMMAND_TIMEOUT_SECONDS)
        connect_to(sock.connect, os.fspath(folder / CONTROL))
        sock.sendall(line)
        with sock.makefile("rb") as replies:
            line = replies.readline()
    if not line:
        raise ConnectionResetError("the service has closed the connection")
    reply = json.loads(line)
    if "error" in reply:
        raise RequestFailed(reply["error"])
    return reply["result"]
