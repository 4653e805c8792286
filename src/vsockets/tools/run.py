"""``vsock run``: programs as part of a context.

For Python programs, unmodified: a ``sitecustomize`` module on their ``PYTHONPATH`` puts vSockets
in the place of the standard library's AF_VSOCK, before their first line runs.  (An interpreter
started with -I, -E or -S does not look there.)  Programs in other languages find the context in
``VSOCKETS_CONTEXT`` if they know it.
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from ..constants import VMADDR_CID_HOST
from ..control import Control
from .context import read_cid
from .execute import become
from .reach import administrator

#: The folder of the ``sitecustomize`` module, and of nothing else.
SITE = Path(__file__).parent / "site"

#: Shell scripts number their own descriptors from 3 up, shells theirs below 64.
_OUT_OF_THE_WAY = 100


def run(
    program: Annotated[
        list[str], typer.Argument(metavar="PROGRAM [ARGUMENT]...", help="What to run.")
    ],
    cid: Annotated[
        int | None,
        typer.Option(
            parser=read_cid,
            metavar="CID",
            help="The context; host is one. A guest that does not exist is made.",
        ),
    ] = None,
    name: Annotated[str, typer.Option(help="What to call a guest that is made.")] = "",
) -> None:
    """Run an unmodified Python program as part of a context.

    By default that is a new guest, which goes when the program and all its children have
    ended.  Starts vsockd if need be.
    """
    control = administrator(start=True)
    context = _context(control, cid, name)
    if context["leased"]:
        _keep_lease(control)
    become(program, environment(context["folder"]))


def environment(folder: str | Path) -> dict[str, str]:
    """The environment of a program in the context with this folder."""
    paths = [str(SITE), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {
        **os.environ,
        "VSOCKETS_CONTEXT": os.fspath(folder),
        "VSOCKETS_TRANSPORT": "fabric",
        # In this order, each once; an empty entry would be the working directory.
        "PYTHONPATH": os.pathsep.join(dict.fromkeys(filter(None, paths))),
    }


def _context(control: Control, cid: int | None, name: str) -> dict[str, Any]:
    """The context to run in; ``leased`` says whether the lease is on ``control``."""
    while True:
        try:
            if cid != VMADDR_CID_HOST:
                return control.add_context(cid, name, lease=True)
        except OSError as error:
            if error.errno != errno.EEXIST:
                raise
        for context in control.contexts():
            if context["cid"] == cid:
                return {**context, "leased": False}
        # It existed, and was removed between the two questions.


def _keep_lease(control: Control) -> None:
    """Let the program inherit the connection that the lease lives on.

    So it lives as long as any process of the program does, and we can become the program:
    its exit status, its signals and its terminal pass through nobody.  The alternative, to stay
    as its parent, would end the lease under a program that goes on in the background, and have
    to imitate all of that.  A program that closes descriptors it does not know gives its lease
    back early.
    """
    try:
        fcntl.fcntl(control.fileno(), fcntl.F_DUPFD, _OUT_OF_THE_WAY)  # inheritable, unlike ours
    except OSError:  # no such number for this process
        os.set_inheritable(control.fileno(), True)
