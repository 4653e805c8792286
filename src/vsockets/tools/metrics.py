"""``vsock metrics``: what vsockd has counted, for Prometheus."""

from __future__ import annotations

import ipaddress
import os
import socket
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Annotated, Any

import typer

from ..limits import METRICS_CLIENT
from ..locator import Inet, Locator, Unix
from .exposition import CONTENT_TYPE, exposition
from .options import read_locator
from .output import notice
from .reach import administrator


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
    _require_ours_alone(listen)
    from ..bridges.doors import Door  # as long in loading as all the rest

    mask = os.umask(0o077)
    try:
        door = Door(listen)
    finally:
        os.umask(mask)
    notice(f"serving /metrics at {str(listen).partition(':')[0]}:{door.where}")
    try:
        _Server(door.sockets[0]).serve_forever()
    finally:
        door.close()


def _read() -> str:
    with administrator() as control:
        return exposition(control.status(), control.counts())


def _require_ours_alone(where: Locator) -> None:
    """A usage error for what other machines could reach."""
    inet = isinstance(where, Inet) and _is_loopback(where.host)
    if where.datagram or not (inet or isinstance(where, Unix)):
        raise typer.BadParameter(
            f"--listen {where}: expected unix:PATH or tcp:127.0.0.1:PORT; who is to read it from "
            "elsewhere needs a proxy that asks who he is"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Server(HTTPServer):
    """One client at a time: an answer takes milliseconds, and a silent client is left soon."""

    def __init__(self, listener: socket.socket) -> None:
        super().__init__(("", 0), _Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listener

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone is nothing to tell of."""


class _Handler(BaseHTTPRequestHandler):
    timeout = METRICS_CLIENT

    def do_GET(self) -> None:
        if self.path.partition("?")[0] != "/metrics":
            self._answer(404, "text/plain", "there is /metrics\n")
            return
        try:
            body = _read()
        except OSError as error:
            self._answer(503, "text/plain", f"{error.strerror or error}\n")
        else:
            self._answer(200, CONTENT_TYPE, body)

    def _answer(self, status: int, kind: str, text: str) -> None:
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Who reads them, and how often, is nothing to tell of."""
