"""A small HTTP server for pages and numbers of this machine's own: asyncio and h11.

One request a connection, which keeps it simple: no pipelining, no state between requests.  A
client may be hostile: its whole request has a time limit and a size, however it trickles, and so
has every piece of an answer.  There are only so many clients at a time, and when another one comes
the oldest is cut off, so that nobody keeps others out.  Clients that the handler knows, by a
session, have places of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import http
import socket
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import h11

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
    """What a client asks for."""

    method: str
    path: str  #: without the query
    query: Mapping[str, str]
    headers: Mapping[str, str]  #: names in small letters; the last of several with one name
    body: bytes = b""
    #: for the handler to call when it knows the client: others do not take its place then
    keep: Callable[[], None] = field(default=lambda: None, compare=False)


@dataclass(frozen=True)
class Response:
    """What it gets.  A body that is an iterator goes on until it ends, or the client leaves."""

    status: int
    content_type: str
    body: bytes | AsyncIterator[bytes]
    headers: Sequence[tuple[str, str]] = field(default=())


def text(status: int, words: str) -> Response:
    """A line of text."""
    return Response(status, "text/plain; charset=utf-8", f"{words}\n".encode())


Handler = Callable[[Request], Awaitable[Response]]


class HttpServer:
    """Answers each request on ``listener`` with what ``handler`` makes of it."""

    def __init__(self, listener: socket.socket, handler: Handler) -> None:
        self._listener = listener
        self._handler = handler
        # In the order in which they came.
        self._clients: dict[asyncio.StreamWriter, None] = {}
        self._known: dict[asyncio.StreamWriter, None] = {}

    async def serve(self) -> None:
        """Until it is cancelled."""
        server = await asyncio.start_server(
            self._admit, sock=self._listener, backlog=HTTP_ACCEPTS_PER_TURN_MAX
        )
        self._listener.listen(HTTP_BACKLOG_MAX)  # asyncio's word is for both
        try:
            await asyncio.Event().wait()  # serve_forever() would wait for the last client to leave
        finally:
            server.close()

    async def _admit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        _add(writer, self._clients, HTTP_CLIENTS_MAX)
        try:
            await self._serve(reader, writer)
        except (OSError, h11.ProtocolError):
            pass  # it has gone, reads nothing, or sent what makes an answer impossible
        finally:
            self._clients.pop(writer, None)
            self._known.pop(writer, None)
            with contextlib.suppress(OSError):
                writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=HTTP_HEAD_MAX_BYTES)
        response = await self._answer(connection, reader, lambda: self._keep(writer))
        refused = connection.their_state is not h11.DONE
        await _send(connection, writer, response)
        if refused:  # a socket closed with something unread would take the answer with it
            writer.write_eof()
            async with asyncio.timeout(HTTP_LINGER_SECONDS):
                while await reader.read(HTTP_HEAD_MAX_BYTES):
                    pass

    def _keep(self, writer: asyncio.StreamWriter) -> None:
        if self._clients.pop(writer, writer) is None:  # else it has been cut off
            _add(writer, self._known, HTTP_SESSION_CLIENTS_MAX)

    async def _answer(
        self, connection: h11.Connection, reader: asyncio.StreamReader, keep: Callable[[], None]
    ) -> Response:
        try:
            async with asyncio.timeout(HTTP_REQUEST_TIMEOUT_SECONDS):
                request = replace(await _receive(connection, reader), keep=keep)
        except TimeoutError:
            return text(408, f"a request is sent within {HTTP_REQUEST_TIMEOUT_SECONDS:.0f} s")
        except h11.RemoteProtocolError as error:
            return text(error.error_status_hint, str(error))
        return await self._handler(request)


def _add(
    writer: asyncio.StreamWriter, clients: dict[asyncio.StreamWriter, None], most: int
) -> None:
    """Give a client a place, that of the oldest if there is no other."""
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
                        f"a body has {HTTP_BODY_MAX_BYTES} bytes at most", 413
                    )
            case h11.EndOfMessage() if head is not None:
                return _request(head, body)
            case _:  # the end, before there was a request
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
    """OSError (a TimeoutError is one) when the client has gone or does not read."""
    writer.write(data or b"")
    async with asyncio.timeout(HTTP_WRITE_TIMEOUT_SECONDS):
        await writer.drain()
