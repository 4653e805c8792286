"""Serving HTTP to this machine alone: on loopback, or a unix socket of the user's own."""

from __future__ import annotations

import ipaddress
import os
import signal
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any

import typer

from ..model.locator import Inet, Locator, Unix

if TYPE_CHECKING:
    import asyncio

    from .http_server import Handler


def require_ours_alone(where: Locator) -> None:
    """A usage error for what other machines could reach."""
    if not is_loopback(where) and (where.datagram or not isinstance(where, Unix)):
        raise typer.BadParameter(
            f"--listen {where}: expected unix:PATH or tcp:127.0.0.1:PORT; who is to read it from "
            "elsewhere needs a proxy that asks who he is"
        )


def is_loopback(where: Locator) -> bool:
    """Whether it is TCP, at a loopback address; a name may mean another one tomorrow."""
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
    """Answer at ``where`` until Ctrl-C or SIGTERM; a unix socket is its owner's alone.

    ``prepare`` is told the address when it can be connected to, and returns what answers there;
    ``beside`` runs as long.
    """
    import asyncio  # these take as long to load as all the rest

    from ..eventloop.asyncio_server import Listener
    from ..eventloop.service import on_signals
    from .http_server import HttpServer

    async def run() -> None:
        handler = prepare(door.where)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(HttpServer(door.sockets[0], handler).serve())]
            tasks += [group.create_task(other()) for other in beside]
            on_signals({signal.SIGTERM: lambda: _cancel(tasks)})

    mask = os.umask(0o077)
    try:
        door = Listener(where)
    finally:
        os.umask(mask)
    try:
        asyncio.run(run())
    finally:
        door.close()


def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
