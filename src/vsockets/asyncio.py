"""asyncio streams over vSockets."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from .api import create_server
from .attachment import ContextHandle, current, explain
from .model.constants import VMADDR_CID_ANY, VMADDR_PORT_ANY
from .socket import socket

if TYPE_CHECKING:
    import asyncio

    Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None] | None]


async def open_connection(
    cid: int, port: int, *, context: ContextHandle | None = None, **options: Any
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Return the reader and the writer of a stream connected to ``(cid, port)``.

    ``options`` are those of ``asyncio.open_connection``.

    Raises what :meth:`vsockets.socket.connect` raises.
    """
    import asyncio  # imported here: it takes longer to import than all of vsockets

    sock = socket(context=context)
    try:
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(sock, (cid, port))
        except OSError as failure:
            explain(failure, context or current())
            raise
        return await asyncio.open_connection(sock=sock, **options)
    except BaseException:
        sock.close()
        raise


async def start_server(
    handler: Handler,
    cid: int = VMADDR_CID_ANY,
    port: int = VMADDR_PORT_ANY,
    *,
    backlog: int = 100,
    context: ContextHandle | None = None,
    **options: Any,
) -> asyncio.Server:
    """Call ``handler`` with the reader and the writer of each stream to ``(cid, port)``.

    ``options`` are those of ``asyncio.start_server``.
    """
    import asyncio

    sock = create_server((cid, port), backlog=backlog, context=context)
    try:
        sock.setblocking(False)
        return await asyncio.start_server(handler, sock=sock, backlog=backlog, **options)
    except BaseException:
        sock.close()
        raise
