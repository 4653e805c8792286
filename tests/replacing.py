"""A pytest plugin: vsockd is replaced again and again while the tests run.

``make test-replace`` runs tests with it.  Left out are tests that stop vsockd by its first process
id, and one that counts descriptors of its own process, which this plugin uses as well.
"""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

from vsockets.control import Control
from vsockets.testing import PrivateFabric

#: Seconds between two replacements.
_PAUSE = 0.05

_start = PrivateFabric.start


def _replace(folder: Path) -> None:
    with contextlib.suppress(OSError):  # vsockd has ended
        while True:
            time.sleep(_PAUSE)
            with Control(folder) as control:
                control.replace()


def start(fabric: PrivateFabric) -> None:
    """Start vsockd, and a thread that replaces it until it ends."""
    _start(fabric)
    threading.Thread(target=_replace, args=(fabric.folder,), daemon=True).start()


# mypy allows neither to assign a method nor another name for self.
PrivateFabric.start = start  # type: ignore[method-assign, assignment]
