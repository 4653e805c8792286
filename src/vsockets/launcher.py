"""Starting a vsockd for whoever needs one."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from pathlib import Path

from .control import Control
from .state_folder import LOG

#: How long a vsockd may take to come up, in seconds; it takes a tenth of one.
_PATIENCE = 20.0


def start(folder: Path, on_demand: bool = True) -> bool:
    """Start vsockd in the background; it serves when this returns.

    Returns False when there is one in ``folder`` already.  Raises OSError when it cannot
    start, with what it had to say; ``on_demand`` also where it was started otherwise before.
    """
    # The new vsockd is nobody's guest, and no service that somebody waits for.
    without = ("VSOCKETS_CONTEXT", "NOTIFY_SOCKET")
    environment = {name: value for name, value in os.environ.items() if name not in without}
    package_root = str(Path(__file__).parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(
        filter(None, (package_root, os.environ.get("PYTHONPATH")))
    )
    command = [sys.executable, "-m", "vsockets.daemon", "--background", "--dir", os.fspath(folder)]
    if on_demand:
        command.append("--on-demand")
    finished = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=_PATIENCE,
        check=False,
    )
    if finished.returncode == os.EX_TEMPFAIL:
        _wait_until_served(folder)
        return False
    if finished.returncode:
        complaint = finished.stderr.strip() or f"see {folder / LOG}"
        raise OSError(errno.ENODEV, f"cannot start vsockd: {complaint}")
    return True


def _wait_until_served(folder: Path) -> None:
    """Return when somebody else's vsockd, which may be starting still, serves; or gives up."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        try:
            Control(folder).close()
        except PermissionError:
            return  # it serves, and not us
        except OSError:
            time.sleep(0.01)
        else:
            return
