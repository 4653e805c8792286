"""The command."""

from __future__ import annotations

import webbrowser
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..live import IntervalOption
from ..local_http import is_loopback, serve
from ..options import read_locator
from ..output import notice

if TYPE_CHECKING:
    from ..http_server import Handler


def web(
    listen: Annotated[
        Any,
        typer.Option(
            parser=read_locator,
            metavar="ADDRESS",
            help="A loopback address and a port, tcp:127.0.0.1:PORT; port 0 is any.",
        ),
    ] = "tcp:127.0.0.1:0",
    open_browser: Annotated[
        bool, typer.Option("--open", help="Open it in the default browser, too.")
    ] = False,
    interval: IntervalOption = 1.0,
) -> None:
    """Show contexts, streams, rates and denials in the browser, until Ctrl-C.

    On the page guests can be suspended and resumed, and streams ended.  A link works once; when it
    was used, another is printed, for another browser.
    """
    if not is_loopback(listen):
        raise typer.BadParameter(f"--listen {listen}: expected tcp:127.0.0.1:PORT")
    from .access import Access
    from .site import Site
    from .watcher import Watcher

    watcher = Watcher(interval)

    def prepare(where: str) -> Handler:
        access = Access(where)

        def tell() -> None:
            notice(f"open {access.link}")

        tell()
        if open_browser:
            webbrowser.open(access.link)
        return Site(access, watcher, tell).answer

    serve(listen, prepare, watcher.run)
