"""``vsock forward``: streams and datagrams from one address to another."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from ..bridges.forward.configuration import ConfigurationError, load
from ..bridges.forward.rules import HostRule, PeerRule
from ..bridges.forward.service import Service, run
from ..bridges.forward.settings import Settings
from ..constants import VMADDR_PORT_ANY
from ..limits import FORWARD_CONNECT_TIMEOUT, FORWARD_CONNECTIONS
from ..locator import Locator, parse_locator
from .advice import CONNECT, Failure, failure
from .output import notice
from .reach import own_context


def _parser(parse: Any) -> Any:
    def read(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return read


_locator = _parser(parse_locator)


def forward(
    source: Annotated[
        Any, typer.Argument(parser=_locator, metavar="FROM", help="Where clients come to.")
    ] = None,
    target: Annotated[
        Any, typer.Argument(parser=_locator, metavar="TO", help="Where each one is taken.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="Many forwards; SIGHUP reads it again."),
    ] = None,
    allow: Annotated[
        list[Any] | None,
        typer.Option(
            parser=_parser(PeerRule.parse),
            metavar="CID[:PORT[-PORT]]",
            help="Only vSockets clients from there; can be repeated.",
        ),
    ] = None,
    allow_host: Annotated[
        list[Any] | None,
        typer.Option(
            parser=_parser(HostRule.parse),
            metavar="HOST[:PORT]",
            help="Where a proxy's clients may go: *.example.org:443, 10.0.0.0/8; repeatable.",
        ),
    ] = None,
    idle: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0.0, help="End what was silent for so long."),
    ] = None,
    connect_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.0, help="For one attempt to reach TO.")
    ] = FORWARD_CONNECT_TIMEOUT,
    wait: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=0.0, help="Try so long when TO is not there yet."),
    ] = 0.0,
    max_connections: Annotated[
        int, typer.Option(metavar="N", min=1, help="At the same time; later ones wait.")
    ] = FORWARD_CONNECTIONS,
    drain: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0.0,
            help="After SIGTERM: how long connections may take to end by themselves.",
        ),
    ] = 30.0,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Tell of every connection.")
    ] = False,
) -> None:
    """Forward whoever comes to FROM to TO, until SIGTERM or Ctrl-C.

    FROM and TO are addresses: vsock:CID:PORT, vsock-dgram:CID:PORT, vsock-mux:PATH:PORT,
    tcp:HOST:PORT, udp:HOST:PORT, unix:PATH, unix-dgram:PATH, exec:COMMAND, stdio:.  FROM may
    also be fd:N or fd:NAME (systemd's sockets), TO http-proxy: or socks5:.  An empty CID or
    HOST listens on all of our own.
    """
    if config is not None:
        if source is not None:
            raise typer.BadParameter("--config replaces FROM and TO")
        file = config
        forwards = _load(file)  # so that the first mistake ends it

        def read() -> list[Settings]:
            return load(file)
    else:
        if source is None or target is None:
            raise typer.BadParameter("expected FROM and TO, or --config FILE")
        try:
            settings = Settings(
                source,
                target,
                allow=tuple(allow or ()),
                hosts=tuple(allow_host or ()),
                idle=idle,
                connect_timeout=connect_timeout,
                wait=wait,
                max_connections=max_connections,
            )
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None
        forwards = [settings]

        def read() -> list[Settings]:
            return forwards

    _log_to_standard_error(verbose)

    def ready(service: Service) -> None:
        for place, where in service.doors.items():
            if verbose or _is_free_choice(place):
                scheme = str(place).partition(":")[0]
                notice(f"listening on {scheme}:{where}")

    try:
        run(read, drain=drain, context=own_context(), ready=ready)
    except OSError as error:
        if config is None and forwards[0].once and error.errno in CONNECT:
            raise failure(f"connect to {forwards[0].target}", error, CONNECT) from None
        raise Failure(error.strerror or str(error)) from None


def _load(path: Path) -> list[Settings]:
    try:
        return load(path)
    except ConfigurationError as error:
        raise Failure(str(error)) from None


def _is_free_choice(place: Locator) -> bool:
    return getattr(place, "port", None) in (0, VMADDR_PORT_ANY)


class _Notices(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        notice(self.format(record))


def _log_to_standard_error(verbose: bool) -> None:
    log = logging.getLogger("vsockets.forward")
    log.addHandler(_Notices())
    log.setLevel(logging.INFO if verbose else logging.WARNING)
