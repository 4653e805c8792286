"""The command ``vsock web``."""

from __future__ import annotations

import contextlib
import html
import tempfile
import threading
import webbrowser
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..groups import command
from ..live_view import interval_option
from ..options import address_option, is_loopback
from ..output import notice

if TYPE_CHECKING:
    from ..http_server import Handler


@command("web")
@address_option(
    "--listen",
    default="tcp:127.0.0.1:0",
    help="Loopback address and port to serve at, tcp:127.0.0.1:PORT; port 0 takes a free one.",
)
@click.option("--open", "open_browser", is_flag=True, help="Open the page in the default browser.")
@interval_option(1.0)
def web(listen: Any, open_browser: bool, interval: float) -> None:
    """Show contexts, streams, rates and denials in a browser.  Ends on Ctrl-C.

    The page can suspend and resume guests and close streams.  A link works once; after its use
    another is printed, for another browser.
    """
    if not is_loopback(listen):
        raise click.UsageError(f"--listen {listen}: expected tcp:127.0.0.1:PORT")
    from ..http_server import serve
    from .site import Access, Site
    from .watcher import Watcher

    watcher = Watcher(interval)

    def prepare(where: str) -> Handler:
        access = Access(where)

        page = contextlib.ExitStack()  # removed when its link was used
        ending.callback(page.close)

        def entered() -> None:
            page.close()
            print_link()

        def print_link() -> None:
            notice(f"open {access.link}")

        print_link()
        if open_browser:
            address = page.enter_context(_redirecting_page(access.link))
            # Some browsers return only when they end, and need this server meanwhile.
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        return Site(access, watcher, entered).answer

    with contextlib.ExitStack() as ending:
        serve(listen, prepare, watcher.run)


@contextlib.contextmanager
def _redirecting_page(link: str) -> Iterator[str]:
    """Yield the address of a file, readable by its owner only, that redirects to ``link``.

    A browser gets an address as an argument, and every user can read a process's arguments.
    """
    with tempfile.TemporaryDirectory(prefix="vsock-web-") as folder:
        file = Path(folder, "open.html")
        file.touch(0o600)
        file.write_text(_REDIRECTION.format(link=html.escape(link)))
        yield file.as_uri()


_REDIRECTION = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="referrer" content="no-referrer">
<meta http-equiv="refresh" content="0; url={link}">
<link rel="icon" href="data:,">
<title>vsock web</title>
<p><a href="{link}">vsock web</a></p>
</html>
"""
