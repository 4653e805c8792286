"""``vsock forward``: forward streams and datagrams from one address to another."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from .. import logs
from ..forward.limits import FORWARD_CONNECT_TIMEOUT_SECONDS, FORWARD_CONNECTIONS_MAX
from ..model.locator import Vsock
from .connect import lasting_context
from .errors import CONNECT, CliError, cli_error
from .groups import command
from .options import (
    allow_option,
    configure_log,
    count_option,
    log_format_option,
    parser_of,
    path_option,
    seconds_option,
    source_argument,
    target_argument,
    verbose_option,
)

if TYPE_CHECKING:
    # Imported late, in functions: these take longer than most commands.
    from ..capture import Recorder
    from ..forward.service import ForwardService
    from ..forward.settings import Settings

log = logging.getLogger("vsockets.forward")

#: Seconds that open connections have to finish after SIGTERM.
_DRAIN = 30.0


@parser_of
def _read_host_rule(text: str) -> Any:
    from ..forward.settings import HostRule

    return HostRule.parse(text)


@command("forward")
@source_argument
@target_argument
@path_option(
    "--config",
    metavar="FILE",
    help="Read any number of forwards from this file; SIGHUP reads it again.",
)
@allow_option
@click.option(
    "--allow-host",
    type=_read_host_rule,
    multiple=True,
    metavar="HOST[:PORT]",
    help="Destination that clients of a proxy may connect to: *.example.org:443, 10.0.0.0/8; "
    "repeatable.",
)
@seconds_option(
    "--idle",
    help="Close a connection that was silent in both directions for this long. Default: never.",
)
@seconds_option(
    "--connect-timeout",
    default=FORWARD_CONNECT_TIMEOUT_SECONDS,
    help="Timeout of one attempt to connect to TO, in seconds.",
)
@seconds_option(
    "--wait", default=0.0, help="Retry this long when TO does not accept connections, in seconds."
)
@count_option(
    "--max-connections",
    default=FORWARD_CONNECTIONS_MAX,
    metavar="N",
    help="Concurrent connections; later clients wait.",
)
@seconds_option(
    "--drain",
    default=_DRAIN,
    help="Time that open connections have to finish after SIGTERM, in seconds.",
)
@verbose_option
@log_format_option
def forward(
    source: Any,
    target: Any,
    config: Path | None,
    allow: tuple[Any, ...],
    allow_host: tuple[Any, ...],
    idle: float | None,
    connect_timeout: float,
    wait: float,
    max_connections: int,
    drain: float,
    verbose: bool,
    log_format: str,
) -> None:
    """Forward each client of FROM to TO, until SIGTERM or Ctrl-C.

    FROM and TO are addresses: vsock:CID:PORT, vsock-dgram:CID:PORT, vsock-mux:PATH:PORT,
    tcp:HOST:PORT, udp:HOST:PORT, unix:PATH, unix-dgram:PATH, exec:COMMAND, stdio:.  FROM may
    also be fd:N or fd:NAME (systemd's sockets), TO http-proxy: or socks5:.  An empty CID or
    HOST listens on every local address.
    """
    from ..forward.settings import Settings, load

    if config is not None:
        if source is not None:
            raise click.UsageError("--config: not allowed with FROM and TO")
        file = config
        serve(_load(file), drain, verbose, log_format, reload=lambda: load(file))
        return
    if source is None or target is None:
        raise click.UsageError("FROM and TO: missing (expected both, or --config FILE)")
    try:
        settings = Settings(
            source,
            target,
            allow=allow,
            hosts=allow_host,
            idle=idle,
            connect_timeout=connect_timeout,
            wait=wait,
            max_connections=max_connections,
        )
    except ValueError as error:
        raise click.UsageError(f"FROM and TO: {error}") from None
    serve([settings], drain, verbose, log_format)


def serve(
    forwards: list[Settings],
    drain: float = _DRAIN,
    verbose: bool = False,
    log_format: str = "text",
    *,
    reload: Callable[[], list[Settings]] | None = None,
    recorder: Recorder | None = None,
) -> None:
    """Run ``forwards`` until SIGTERM or SIGINT; on SIGHUP replace them by ``reload()``."""
    from ..forward.service import run

    configure_log(verbose, log_format)

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
            again=reload,
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
    from ..toml import ConfigurationError

    try:
        return load(path)
    except ConfigurationError as error:
        raise CliError(str(error)) from None
