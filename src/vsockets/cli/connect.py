"""Finding the fabric a command works on, and starting it when that is called for."""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

from .. import launcher
from ..attachment import Attachment, ContextHandle, current
from ..control import Control
from ..eventloop.retry import Backoff
from ..model.constants import VMADDR_CID_HOST
from ..state_folder import default_folder, require_private

#: How long to go on trying to reach a vsockd that somebody else is just starting, in seconds.
_PATIENCE = 10.0

_Result = TypeVar("_Result")

_chosen = False


def choose(folder: Path) -> None:
    """Work on the fabric in ``folder``, as its host, whatever context we were started in."""
    global _chosen
    _chosen = True
    # In the environment, so that it holds for what the command starts, too; absolute, as
    # that may have another working directory.
    os.environ["VSOCKETS_DIR"] = os.path.abspath(folder)
    os.environ.pop("VSOCKETS_CONTEXT", None)


def own_context() -> ContextHandle:
    """The context this command is in: what a program started the same way would be in.

    Raises OSError or PermissionError (somebody else's folder).
    """
    if not _chosen:
        return current()
    folder = default_folder()
    if folder.exists():
        require_private(folder)
    return Attachment(folder / str(VMADDR_CID_HOST), on_demand=True)


def lasting_context(needed: bool = True) -> ContextHandle:
    """As :func:`own_context`, for a program that goes on for long.

    If vsockd is ``needed`` and may be started, that is done now.  After it has ended it is for
    others to start it: they know its configuration.
    """
    place = own_context()
    if not isinstance(place, Attachment):
        return place
    if needed:
        with contextlib.suppress(OSError):  # what is tried next says it
            _ = place.cid
    return Attachment(place.folder)


def administrator(start: bool = False) -> Control:
    """A connection to vsockd as its administrator; with ``start`` a missing vsockd is started.

    Raises OSError: ENODEV when none runs (or none can be started), EACCES when it is not ours
    to administrate.
    """
    folder = default_folder()
    if folder.exists():
        require_private(folder)
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return Control(folder)
        except PermissionError as error:
            why = f"{folder}: only vsockd's own user and root may administrate it"
            raise OSError(error.errno, why) from None
        except OSError as error:
            if error.errno != errno.ENODEV or not start or time.monotonic() > deadline:
                raise
        if not launcher.start(folder):
            # There is one, which does not serve yet, or no longer.
            time.sleep(0.01)


def keep_trying(
    attempt: Callable[[], _Result], seconds: float | None, errnos: Collection[int]
) -> _Result:
    """Call ``attempt`` again while it raises an OSError of ``errnos``, for ``seconds`` at most.

    None means for ever, 0 only once.  Raises the last OSError.
    """
    backoff = Backoff()
    while True:
        try:
            return attempt()
        except OSError as error:
            late = seconds is not None and not backoff.permits(seconds)
            if error.errno not in errnos or late:
                raise
        time.sleep(backoff.next_pause())
