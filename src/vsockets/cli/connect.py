"""The fabric that a command uses, and connections to its vsockd, started if need be."""

from __future__ import annotations

import contextlib
import errno
import os
import socket as stdlib
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from .. import launcher
from ..attachment import Attachment, ContextHandle, assigned, current
from ..control import Control
from ..eventloop.retry import Backoff
from ..model.constants import VMADDR_CID_HOST
from ..state_folder import default_folder, require_private
from .errors import CONNECT, CliError, cli_error

if TYPE_CHECKING:
    from ..model.locator import Locator

#: Seconds to retry while another process is starting vsockd.
_PATIENCE = 10.0

_Result = TypeVar("_Result")

_chosen = False


def choose(folder: Path) -> None:
    """Use the fabric in ``folder``, as a program of its host, for the rest of this process.

    Without a call, commands use the context that this process belongs to.
    """
    global _chosen
    _chosen = True
    # In the environment, so that child processes use it, too; absolute, because their working
    # directory may differ.
    os.environ["VSOCKETS_DIR"] = os.path.abspath(folder)
    os.environ.pop("VSOCKETS_CONTEXT", None)


def assigned_context() -> Attachment | None:
    """Return the context that is assigned to this process; None without one or with ``--dir``."""
    return None if _chosen else assigned()


def own_context() -> ContextHandle:
    """Return the context that a program started instead of this command would use.

    Raises OSError if ``VSOCKETS_TRANSPORT`` is invalid, PermissionError if another user owns the
    fabric's folder.
    """
    if not _chosen:
        return current()
    folder = default_folder()
    if folder.exists():
        require_private(folder)
    return Attachment(folder / str(VMADDR_CID_HOST), on_demand=True)


def lasting_context(needed: bool = True) -> ContextHandle:
    """Return :func:`own_context` for a program that runs for a long time.

    If vsockd is ``needed`` and may be started, it is started now.  The program does not start it
    again later, because it does not know with which configuration.
    """
    place = own_context()
    if not isinstance(place, Attachment):
        return place
    if needed:
        with contextlib.suppress(OSError):  # the next operation reports it
            _ = place.cid
    return Attachment(place.folder)


def administrator(start: bool = False) -> Control:
    """Return a control connection to vsockd; with ``start``, start vsockd if it does not run.

    Raises OSError: ENODEV if vsockd does not run (or cannot be started), EACCES if this user may
    not administrate it.
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
            # Another vsockd is starting or ending.
            time.sleep(0.01)


def keep_trying(
    attempt: Callable[[], _Result], seconds: float | None, errnos: Collection[int]
) -> _Result:
    """Call ``attempt`` until it succeeds, for at most ``seconds``, and return its result.

    Only an OSError with one of ``errnos`` causes another attempt.  ``seconds`` is None for no
    limit, 0 for a single attempt.

    Raises the OSError of the last attempt.
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


def cid_of_name(name: str) -> int:
    """Return the CID of the only context called ``name``, ignoring case: ssh sends lower case.

    Raises CliError if none or several have it.
    """
    with administrator() as control:
        found = [row["cid"] for row in control.contexts() if row["name"].lower() == name.lower()]
    if len(found) != 1:
        problem = "no context has" if not found else f"contexts {', '.join(map(str, found))} have"
        raise CliError(f"{name}: {problem} this name (see: vsock context ls)")
    return int(found[0])


def connected(target: Locator, timeout: float) -> stdlib.socket:
    """Return a blocking socket that is connected to ``target``, from :func:`own_context`.

    Raises CliError.
    """
    import asyncio  # here, and the dialer, because most commands do without them

    from ..forward.dialer import Dialer

    async def connect() -> stdlib.socket:
        return await Dialer(own_context()).connect(target, timeout=timeout)

    try:
        sock = asyncio.run(connect())
    except OSError as error:
        meanings = CONNECT | {errno.ENODEV: f"vsockd is not running ({error.strerror})"}
        raise cli_error(f"connect to {target}", error, meanings) from None
    sock.setblocking(True)
    return sock
