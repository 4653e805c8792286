"""Start of vsockd in the background."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

from .control import Control
from .state_folder import LOG

#: Seconds to wait until vsockd serves; usually it takes a tenth of a second.
_START_TIMEOUT_SECONDS = 20.0


def start(folder: Path, on_demand: bool = True, restarts: int | None = None) -> bool:
    """Start vsockd in the background, and return when vsockd accepts requests.

    ``restarts`` is how often a minute vsockd is started again after it was killed (None: vsockd's
    default).  Returns False if a vsockd already runs in ``folder``.

    Raises OSError with vsockd's message if vsockd cannot start, and with ``on_demand`` also if the
    last vsockd in ``folder`` was started explicitly, by ``vsock up`` or as a service.
    """
    # vsockd is in no context, and its start is not reported to this process's service manager.
    without = ("VSOCKETS_CONTEXT", "NOTIFY_SOCKET")
    environment = {name: value for name, value in os.environ.items() if name not in without}
    package_root = str(Path(__file__).parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (package_root, os.environ.get("PYTHONPATH")))
    )
    command = [sys.executable, "-m", "vsockets.daemon", "--background", "--dir", os.fspath(folder)]
    if on_demand:
        command.append("--on-demand")
    if restarts is not None:
        command += ["--restarts", str(restarts)]
    finished = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=_START_TIMEOUT_SECONDS,
        check=False,
    )
    if finished.returncode == os.EX_TEMPFAIL:
        _wait_until_served(folder)
        return False
    if finished.returncode:
        complaint = finished.stderr.strip().removeprefix("vsockd: ") or f"see {folder / LOG}"
        complaint = complaint.removeprefix("cannot start in ")
        complaint = complaint.replace(f"{folder}: {folder}: ", f"{folder}: ")
        raise OSError(errno.ENODEV, f"cannot start vsockd: {complaint}")
    return True


def _wait_until_served(folder: Path) -> None:
    """Wait, until a timeout, for a vsockd started by another process to accept requests."""
    deadline = time.monotonic() + _START_TIMEOUT_SECONDS
    while time.monotonic() < deadline:
        try:
            Control(folder).close()
        except PermissionError:
            return  # vsockd serves, but refuses this user
        except OSError:
            time.sleep(0.01)
        else:
            return
