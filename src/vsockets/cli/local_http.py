"""Serve HTTP to this machine only: on loopback, or on a unix socket of the user."""

from __future__ import annotations

import ipaddress
import os
import signal
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

import click

from ..model.locator import Inet, Locator, Unix

if TYPE_CHECKING:
    import asyncio

    from .http_server import Handler


def require_private(where: Locator) -> None:
    """Raise a usage error for an address that other machines can reach."""
    if not is_loopback(where) and (where.datagram or not isinstance(where, Unix)):
        raise click.UsageError(
            f"--listen {where}: not private to this machine (expected unix:PATH or "
            "tcp:127.0.0.1:PORT; for other machines use a proxy that authenticates clients)"
        )


def is_loopback(where: Locator) -> bool:
    """Return whether ``where`` is a numeric loopback address of TCP; names can be reassigned."""
    try:
        return (
            isinstance(where, Inet)
            and not where.datagram
            and ipaddress.ip_address(where.host).is_loopback
        )
    except ValueError:
        return False


def serve(
    where: Locator,
    prepare: Callable[[str], Handler],
    *beside: Callable[[], Coroutine[Any, Any, None]],
) -> None:
    """Serve HTTP at ``where`` until Ctrl-C or SIGTERM; only the user can connect to a unix socket.

    ``prepare`` is called with the address once clients can connect, and returns the handler;
    the coroutines of ``beside`` run as long as the server.
    """
    import asyncio  # imported late: these take as long to load as all the rest

    from ..eventloop.asyncio_server import Listener
    from ..eventloop.service import on_signals
    from .http_server import HttpServer

    async def run() -> None:
        handler = prepare(listener.where)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(HttpServer(listener.sockets[0], handler).serve())]
            tasks += [group.create_task(other()) for other in beside]
            on_signals({signal.SIGTERM: lambda: _cancel(tasks)})

    mask = os.umask(0o077)
    try:
        listener = Listener(where)
    finally:
        os.umask(mask)
    try:
        asyncio.run(run())
    finally:
        listener.close()


def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
