"""``vsock forward``: streams and datagrams from one address to another."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import logs
from ..forward.limits import FORWARD_CONNECT_TIMEOUT_SECONDS, FORWARD_CONNECTIONS_MAX
from ..model.locator import Vsock
from .connect import lasting_context
from .errors import CONNECT, CliError, cli_error
from .options import (
    AllowOption,
    LogFormat,
    LogFormatOption,
    SourceArgument,
    TargetArgument,
    VerboseOption,
    parser_of,
)

if TYPE_CHECKING:
    # What is imported in functions below takes longer than the other commands do.
    from ..capture.recording import Recorder
    from ..forward.service import ForwardService
    from ..forward.settings import Settings

log = logging.getLogger("vsockets.forward")

#: Seconds that connections have to end by themselves after SIGTERM.
_DRAIN = 30.0


@parser_of
def _read_host_rule(text: str) -> Any:
    from ..forward.settings import HostRule

    return HostRule.parse(text)


def forward(
    source: SourceArgument = None,
    target: TargetArgument = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", metavar="FILE", help="Many forwards; SIGHUP reads it again."),
    ] = None,
    allow: AllowOption = None,
    allow_host: Annotated[
        list[Any] | None,
        typer.Option(
            parser=_read_host_rule,
            metavar="HOST[:PORT]",
            help="Where a proxy's clients may go: *.example.org:443, 10.0.0.0/8; can be repeated.",
        ),
    ] = None,
    idle: Annotated[
        float | None,
        typer.Option(metavar="SECONDS", min=0.0, help="End what was silent for so long."),
    ] = None,
    connect_timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.0, help="For one attempt to reach TO.")
    ] = FORWARD_CONNECT_TIMEOUT_SECONDS,
    wait: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=0.0, help="Try so long when TO is not there yet."),
    ] = 0.0,
    max_connections: Annotated[
        int, typer.Option(metavar="N", min=1, help="At the same time; later ones wait.")
    ] = FORWARD_CONNECTIONS_MAX,
    drain: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0.0,
            help="After SIGTERM: how long connections may take to end by themselves.",
        ),
    ] = _DRAIN,
    verbose: VerboseOption = False,
    log_format: LogFormatOption = LogFormat.TEXT,
) -> None:
    """Forward whoever comes to FROM to TO, until SIGTERM or Ctrl-C.

    FROM and TO are addresses: vsock:CID:PORT, vsock-dgram:CID:PORT, vsock-mux:PATH:PORT,
    tcp:HOST:PORT, udp:HOST:PORT, unix:PATH, unix-dgram:PATH, exec:COMMAND, stdio:.  FROM may
    also be fd:N or fd:NAME (systemd's sockets), TO http-proxy: or socks5:.  An empty CID or
    HOST listens on all of our own.
    """
    from ..forward.settings import Settings, load

    if config is not None:
        if source is not None:
            raise typer.BadParameter("--config replaces FROM and TO")
        file = config
        serve(_load(file), drain, verbose, log_format, again=lambda: load(file))
        return
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
    serve([settings], drain, verbose, log_format)


def serve(
    forwards: list[Settings],
    drain: float = _DRAIN,
    verbose: bool = False,
    log_format: LogFormat = LogFormat.TEXT,
    *,
    again: Callable[[], list[Settings]] | None = None,
    recorder: Recorder | None = None,
) -> None:
    """Do it until a signal comes; on SIGHUP do what ``again`` says from then on."""
    from ..forward.service import run

    logs.configure("vsock: %(message)s", logging.INFO if verbose else logs.NOTICE, log_format.value)

    ends = (end for settings in forwards for end in (settings.source, settings.target))
    context = lasting_context(any(isinstance(end, Vsock) for end in ends))

    def ready(service: ForwardService) -> None:
        for place, where in service.addresses.items():
            scheme = str(place).partition(":")[0]
            log.log(logs.NOTICE, "listening on %s:%s", scheme, where)

    try:
        run(
            forwards,
            drain=drain,
            again=again,
            context=context,
            ready=ready,
            recorder=recorder,
        )
    except OSError as error:
        if len(forwards) == 1 and forwards[0].once and error.errno in CONNECT:
            raise cli_error(f"connect to {forwards[0].target}", error, CONNECT) from None
        raise CliError(error.strerror or str(error)) from None


def _load(path: Path) -> list[Settings]:
    from ..forward.settings import load
    from ..toml.tables import ConfigurationError

    try:
        return load(path)
    except ConfigurationError as error:
        raise CliError(str(error)) from None
