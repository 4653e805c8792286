"""The command."""

from __future__ import annotations

import contextlib
import html
import tempfile
import threading
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..live_view import IntervalOption
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

        opened = contextlib.ExitStack()  # until the link in it was used
        ending.callback(opened.close)

        def entered() -> None:
            opened.close()
            tell()

        def tell() -> None:
            notice(f"open {access.link}")

        tell()
        if open_browser:
            address = opened.enter_context(_page_that_leads_to(access.link))
            # Some browsers are waited for, and wait for us.
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        return Site(access, watcher, entered).answer

    with contextlib.ExitStack() as ending:
        serve(listen, prepare, watcher.run)


@contextlib.contextmanager
def _page_that_leads_to(link: str) -> Iterator[str]:
    """Yield the address of a file that only its owner can read.

    A browser gets an address as an argument, and everybody sees the arguments of a process.
    """
    with tempfile.TemporaryDirectory(prefix="vsock-web-") as folder:
        file = Path(folder, "open.html")
        file.touch(0o600)
        file.write_text(_LEADING.format(link=html.escape(link)))
        yield file.as_uri()


_LEADING = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="referrer" content="no-referrer">
<meta http-equiv="refresh" content="0; url={link}">
<link rel="icon" href="data:,">
<title>vsock web</title>
<p><a href="{link}">vsock web</a></p>
</html>
"""
