"""Registration of a machine with systemd-machined, by varlink: JSON that ends in NUL, at a socket.

``machinectl list`` shows the machine, and ssh finds its address by its name.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

from ..model.text import printable
from .limits import VM_MACHINED_REPLY_MAX_BYTES, VM_MACHINED_SECONDS

#: The socket of systemd 256 and later, at which root may register machines.
SOCKET = "/run/systemd/machine/io.systemd.Machine"

_NAME_MAX_CHARACTERS = 64


class RegistrationFailed(Exception):
    """A machine that is not registered; the message says why."""


def machine_name(name: str, cid: int) -> str:
    """Return the name for a context's machine, in the characters of host names."""
    found = re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:_NAME_MAX_CHARACTERS].rstrip("-")
    return found or f"vsock-{cid}"


@contextlib.contextmanager
def registered(name: str, cid: int, leader: int) -> Iterator[None]:
    """Register a machine during the with block; the process ``leader`` runs it.

    Raises RegistrationFailed.
    """
    machine = {"name": name, "service": "vsock", "class": "vm", "leader": leader}
    _call("Register", {**machine, "sshAddress": f"vsock/{cid}"})
    try:
        yield
    finally:
        with contextlib.suppress(RegistrationFailed):  # systemd-machined has ended, or knows
            _call("Unregister", {"name": name})


def _call(method: str, parameters: dict[str, Any]) -> None:
    request = {"method": f"io.systemd.Machine.{method}", "parameters": parameters}
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(VM_MACHINED_SECONDS)
            _connect(sock)
            sock.sendall(json.dumps(request).encode() + b"\0")
            received = b""
            while b"\0" not in received and len(received) < VM_MACHINED_REPLY_MAX_BYTES:
                if not (data := sock.recv(4096)):
                    break
                received += data
        reply = json.loads(received.partition(b"\0")[0])
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = getattr(error, "strerror", None) or error
        raise RegistrationFailed(
            f"systemd-machined: {problem} (expected systemd 256 or later, and root)"
        ) from None
    except ValueError:
        raise RegistrationFailed("systemd-machined: malformed reply (expected JSON)") from None
    if "error" in reply:
        raise RegistrationFailed(f"systemd-machined: {method}: {printable(str(reply['error']))}")


def _connect(sock: socket.socket) -> None:
    try:
        sock.connect(SOCKET)
    except FileNotFoundError:
        # systemd 257 starts it by itself for clients on D-Bus alone, and it ends when it is idle.
        start = ["systemctl", "start", "systemd-machined"]
        subprocess.run(start, capture_output=True, check=False, timeout=VM_MACHINED_SECONDS)
        sock.connect(SOCKET)
