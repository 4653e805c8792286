"""``vsock metrics``: what vsockd has counted, for Prometheus."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from .connect import administrator
from .local_http import require_ours_alone, serve
from .options import read_locator
from .output import notice
from .prometheus import CONTENT_TYPE, exposition

if TYPE_CHECKING:
    from .http_server import Handler, Request, Response


def metrics(
    listen: Annotated[
        Any,
        typer.Option(
            parser=read_locator,
            metavar="ADDRESS",
            help="Serve them over HTTP, at /metrics: unix:PATH or tcp:127.0.0.1:PORT.",
        ),
    ] = None,
) -> None:
    """Print what vsockd has counted as Prometheus's text format, or serve it until Ctrl-C."""
    if listen is None:
        print(_read(), end="")
        return
    require_ours_alone(listen)

    def prepare(where: str) -> Handler:
        notice(f"serving /metrics at {str(listen).partition(':')[0]}:{where}")
        return _answer

    serve(listen, prepare)


def _read() -> str:
    with administrator() as control:
        return exposition(control.status(), control.counts())


async def _answer(request: Request) -> Response:
    import asyncio

    from .http_server import Response, text

    if request.path != "/metrics":
        return text(404, "there is /metrics")
    if request.method != "GET":
        return text(405, "there is GET")
    try:
        body = await asyncio.to_thread(_read)
    except OSError as error:
        return text(503, error.strerror or str(error))
    return Response(200, CONTENT_TYPE, body.encode())
