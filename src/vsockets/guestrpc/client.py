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

#: Timeout in seconds of a list of guests, which the service has in memory.
_LIST_SECONDS = 5.0


def to_text(value: bytes) -> str:
    """Return a variable's value as the control protocol has it."""
    return value.decode(errors="surrogateescape")


def to_bytes(text: str) -> bytes:
    """Return a variable's value from the control protocol."""
    return text.encode(errors="surrogateescape")


class RequestFailed(Exception):
    """A request that the service did not carry out; the message says why."""


def request(
    folder: Path, do: str, *, limit: float = 2 * GUESTRPC_COMMAND_TIMEOUT_SECONDS, **given: Any
) -> Any:
    """Return the result of a request to the service of the fabric in ``folder``.

    ``limit`` is the time in seconds that each step may take.

    Raises RequestFailed when the service refuses it, OSError when the service cannot be reached.
    """
    line = json.dumps({"do": do, **given}).encode() + b"\n"
    if len(line) > GUESTRPC_CONTROL_MAX_BYTES:
        most = GUESTRPC_HOST_VARIABLES_MAX_BYTES
        raise RequestFailed(f"too many bytes of variables, expected at most {most}")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(limit)
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


def claims_of_guests(folder: Path) -> dict[int, str]:
    """Return what the VMware Tools of guests claim, by CID; empty unless the service runs."""
    names = "host name", "address", "OS"
    return {
        one["cid"]: ", ".join(
            ("running" if one["running"] else "not running",)
            + tuple(one["claims"][name] for name in names if name in one["claims"])
        )
        for one in _guests(folder)
    }


def tools_run(folder: Path, cid: int) -> bool:
    """Return whether the VMware Tools of a guest run; False unless the service runs."""
    return any(one["cid"] == cid and one["running"] for one in _guests(folder))


def announce_suspend(folder: Path, cid: int) -> str | None:
    """Have the VMware Tools of a guest, if they run, prepare it to be suspended.

    Returns the reason if they have failed to.
    """
    if not tools_run(folder, cid):
        return None
    try:
        request(folder, "send", cid=cid, change="suspend")
    except (OSError, RequestFailed) as error:
        return str(error)
    return None


def _guests(folder: Path) -> list[dict[str, Any]]:
    """Return the guests that are enabled; an empty list unless the service runs."""
    try:
        guests: list[dict[str, Any]] = request(folder, "list", limit=_LIST_SECONDS)
    except (OSError, RequestFailed):
        return []
    return guests
