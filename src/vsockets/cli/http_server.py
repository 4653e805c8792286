"""A small HTTP server for local pages and metrics, on asyncio and h11.

Each connection carries one request, so that there is neither pipelining nor state between requests.
Clients may be hostile: there is a limit for the time and for the size of a whole request, and for
the time to send each piece of a response.  The number of connections is limited; a new one aborts
the oldest, so that no client locks others out.  Clients with a session are counted separately from
those without.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import os
import signal
import socket
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import h11

from ..eventloop.asyncio_server import Listener
from ..eventloop.service import on_signals
from ..model.locator import Locator
from .limits import (
    HTTP_ACCEPTS_PER_TURN_MAX,
    HTTP_BACKLOG_MAX,
    HTTP_BODY_MAX_BYTES,
    HTTP_CLIENTS_MAX,
    HTTP_HEAD_MAX_BYTES,
    HTTP_LINGER_SECONDS,
    HTTP_REQUEST_TIMEOUT_SECONDS,
    HTTP_SESSION_CLIENTS_MAX,
    HTTP_WRITE_TIMEOUT_SECONDS,
)


@dataclass(frozen=True)
class Request:
    """A request of a client."""

    method: str
    path: str  #: without the query
    query: Mapping[str, str]
    headers: Mapping[str, str]  #: names in lower case; the last of several with the same name
    body: bytes = b""
    #: called by the handler if the client has a session: clients without cannot displace it then
    keep: Callable[[], None] = field(default=lambda: None, compare=False)


@dataclass(frozen=True)
class Response:
    """A response.  A body that is an iterator is sent until it ends or the client disconnects."""

    status: int
    content_type: str
    body: bytes | AsyncIterator[bytes]
    headers: Sequence[tuple[str, str]] = field(default=())


def text(status: int, line: str) -> Response:
    """Return a response of one line of text."""
    return Response(status, "text/plain; charset=utf-8", f"{line}\n".encode())


Handler = Callable[[Request], Awaitable[Response]]


class HttpServer:
    """A server that passes each request on ``listener`` to ``handler`` and sends its response."""

    def __init__(self, listener: socket.socket, handler: Handler) -> None:
        self._listener = listener
        self._handler = handler
        # Without and with a session, each in order of arrival.
        self._clients: dict[asyncio.StreamWriter, None] = {}
        self._with_session: dict[asyncio.StreamWriter, None] = {}

    async def serve(self) -> None:
        """Serve clients until this coroutine is cancelled."""
        server = await asyncio.start_server(
            self._admit, sock=self._listener, backlog=HTTP_ACCEPTS_PER_TURN_MAX
        )
        self._listener.listen(
            HTTP_BACKLOG_MAX
        )  # asyncio has set its accepts per turn as the backlog
        try:
            await asyncio.Event().wait()  # serve_forever() would wait for the last client
        finally:
            server.close()

    async def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _add(writer, self._clients, HTTP_CLIENTS_MAX)
        try:
            await self._serve(reader, writer)
        except (OSError, h11.ProtocolError):
            pass  # the client has disconnected, reads nothing, or sent an invalid request
        finally:
            self._clients.pop(writer, None)
            self._with_session.pop(writer, None)
            with contextlib.suppress(OSError):
                writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=HTTP_HEAD_MAX_BYTES)
        response = await self._answer(connection, reader, lambda: self._keep(writer))
        rejected = connection.their_state is not h11.DONE
        await _send(connection, writer, response)
        if rejected:  # closing a socket with unread data discards the response
            writer.write_eof()
            async with asyncio.timeout(HTTP_LINGER_SECONDS):
                while await reader.read(HTTP_HEAD_MAX_BYTES):
                    pass

    def _keep(self, writer: asyncio.StreamWriter) -> None:
        if self._clients.pop(writer, writer) is None:  # else the client has been aborted
            _add(writer, self._with_session, HTTP_SESSION_CLIENTS_MAX)

    async def _answer(
        self, connection: h11.Connection, reader: asyncio.StreamReader, keep: Callable[[], None]
    ) -> Response:
        try:
            async with asyncio.timeout(HTTP_REQUEST_TIMEOUT_SECONDS):
                request = replace(await _receive(connection, reader), keep=keep)
        except TimeoutError:
            return text(408, f"request timeout (limit: {HTTP_REQUEST_TIMEOUT_SECONDS:.0f} s)")
        except h11.RemoteProtocolError as error:
            return text(error.error_status_hint, str(error))
        return await self._handler(request)


def _add(
    writer: asyncio.StreamWriter, clients: dict[asyncio.StreamWriter, None], most: int
) -> None:
    """Add a client; abort the oldest if there are more than ``most``."""
    clients[writer] = None
    if len(clients) > most:
        oldest = next(iter(clients))
        del clients[oldest]
        oldest.transport.abort()


async def _receive(connection: h11.Connection, reader: asyncio.StreamReader) -> Request:
    head: h11.Request | None = None
    body = b""
    while True:
        match connection.next_event():
            case h11.NEED_DATA:
                connection.receive_data(await reader.read(HTTP_HEAD_MAX_BYTES))
            case h11.Request() as head:
                pass
            case h11.Data(data=data):
                body += data
                if len(body) > HTTP_BODY_MAX_BYTES:
                    raise h11.RemoteProtocolError(
                        f"request body too large (limit: {HTTP_BODY_MAX_BYTES} bytes)", 413
                    )
            case h11.EndOfMessage() if head is not None:
                return _request(head, body)
            case _:  # the client closed before the end of its request
                raise ConnectionResetError


def _request(head: h11.Request, body: bytes) -> Request:
    path, _, query = head.target.decode("ascii").partition("?")
    return Request(
        head.method.decode("ascii"),
        path,
        dict(urllib.parse.parse_qsl(query)),
        {name.decode("ascii"): value.decode("latin-1") for name, value in head.headers},
        body,
    )


async def _send(
    connection: h11.Connection, writer: asyncio.StreamWriter, response: Response
) -> None:
    body = response.body
    headers = [("Content-Type", response.content_type), ("Connection", "close"), *response.headers]
    if isinstance(body, bytes):
        headers.append(("Content-Length", str(len(body))))
    reason = http.HTTPStatus(response.status).phrase.encode()
    head = h11.Response(status_code=response.status, headers=headers, reason=reason)
    await _write(writer, connection.send(head))
    if isinstance(body, bytes):
        await _write(writer, connection.send(h11.Data(data=body)))
    else:
        async with contextlib.aclosing(body):  # type: ignore[type-var]
            async for piece in body:
                await _write(writer, connection.send(h11.Data(data=piece)))
    await _write(writer, connection.send(h11.EndOfMessage()))


async def _write(writer: asyncio.StreamWriter, data: bytes | None) -> None:
    """Write ``data`` and wait until the client has taken it.

    Raises OSError if the client has disconnected, TimeoutError if the client does not read.
    """
    writer.write(data or b"")
    async with asyncio.timeout(HTTP_WRITE_TIMEOUT_SECONDS):
        await writer.drain()


def serve(
    where: Locator,
    prepare: Callable[[str], Handler],
    *beside: Callable[[], Coroutine[Any, Any, None]],
) -> None:
    """Serve HTTP at ``where`` until Ctrl-C or SIGTERM; a unix socket admits this user only.

    ``prepare`` is called with the address once clients can connect, and returns the handler;
    the coroutines of ``beside`` run as long as the server.
    """

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
