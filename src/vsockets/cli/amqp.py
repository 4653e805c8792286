"""``vsock amqp``: RabbitMQ for guests, by three proxies."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import logs
from ..amqp.routing import AUTHORITY
from ..extras import how_to_install
from ..model.constants import VMADDR_CID_HOST
from ..model.locator import Inet, Locator, Unix, Vsock
from .connect import lasting_context
from .errors import CliError
from .options import LogFormat, LogFormatOption, VerboseOption, parser_of, read_locator

if TYPE_CHECKING:
    # What is imported in functions below takes longer than the other commands do.
    from ..amqp.service import Proxy

#: AMQP's port: of TCP, and so of vSockets.
PORT = 5672

app = typer.Typer(help="RabbitMQ for guests, by three proxies.", no_args_is_help=True)

_AuthorityOption = Annotated[
    str, typer.Option(metavar="HOST:PORT", help="What CONNECT asks for; a stock proxy's target.")
]


@parser_of
def _read_rule(text: str) -> Any:
    from ..amqp.routing import VirtualHostRule

    return VirtualHostRule.parse(text)


@app.command("guest-proxy")
def guest_proxy(
    listen: Annotated[
        Any, typer.Option(parser=read_locator, metavar="ADDRESS", help="tcp: or unix:")
    ] = f"tcp:127.0.0.1:{PORT}",
    host: Annotated[
        Any, typer.Option(parser=read_locator, metavar="ADDRESS", help="The host proxy.")
    ] = f"vsock:{VMADDR_CID_HOST}:{PORT}",
    verbose: VerboseOption = False,
    log_format: LogFormatOption = LogFormat.TEXT,
) -> None:
    """In a guest: take AMQP clients to the host proxy, each by a stream of its own."""
    from ..amqp.guest_proxy import GuestProxy

    _expect(listen, "--listen", Inet, Unix)
    _expect(host, "--host", Vsock)
    context = lasting_context()
    _serve(listen, lambda: GuestProxy(listen, host, context), verbose, log_format)


@app.command("host-proxy")
def host_proxy(
    proxy: Annotated[
        Any, typer.Option(parser=read_locator, metavar="ADDRESS", help="tcp: of the AMQP proxy.")
    ],
    listen: Annotated[
        Any, typer.Option(parser=read_locator, metavar="ADDRESS", help="vsock: for guest proxies.")
    ] = f"vsock::{PORT}",
    allow_vhost: Annotated[
        list[Any] | None,
        typer.Option(
            parser=_read_rule,
            metavar="CID=VHOST,…",
            help="Virtual hosts a guest may use, * for all; can be repeated.  Without: all, all.",
        ),
    ] = None,
    authority: _AuthorityOption = AUTHORITY,
    tls_ca: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Use TLS; who vouches for the far end, PEM."),
    ] = None,
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Our own certificate, PEM.")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Its key, if that is another file.")
    ] = None,
    tls_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="The far end's name, if not its HOST.")
    ] = None,
    verbose: VerboseOption = False,
    log_format: LogFormatOption = LogFormat.TEXT,
) -> None:
    """On the host: take all guests' sessions to the AMQP proxy, over one TCP connection."""
    require("h2")
    from ..amqp.host_proxy import HostProxy
    from ..amqp.uplink import client_context

    _expect(listen, "--listen", Vsock)
    _expect_target(proxy, "--proxy")
    if tls_ca is None and (tls_cert or tls_key or tls_name):
        raise typer.BadParameter("TLS needs --tls-ca")
    if tls_ca is not None and isinstance(proxy, Unix) and tls_name is None:
        raise typer.BadParameter(f"{proxy} has no name to check: give --tls-name")
    tls = client_context(tls_ca, tls_cert, tls_key) if tls_ca is not None else None
    context = lasting_context()
    _serve(
        listen,
        lambda: HostProxy(
            listen,
            proxy,
            rules=allow_vhost or (),
            authority=authority,
            tls=tls,
            tls_name=tls_name,
            context=context,
        ),
        verbose,
        log_format,
    )


@app.command("proxy")
def amqp_proxy(
    node: Annotated[
        list[Any],
        typer.Option(
            parser=read_locator, metavar="ADDRESS", help="tcp: of a broker; can be repeated."
        ),
    ],
    listen: Annotated[
        Any, typer.Option(parser=read_locator, metavar="ADDRESS", help="tcp: for host proxies.")
    ] = "tcp:127.0.0.1:5670",
    authority: _AuthorityOption = AUTHORITY,
    tls_cert: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Use TLS; our certificate, PEM.")
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Its key, if that is another file.")
    ] = None,
    tls_ca: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Only clients with a certificate of its, PEM."),
    ] = None,
    verbose: VerboseOption = False,
    log_format: LogFormatOption = LogFormat.TEXT,
) -> None:
    """Beside the brokers: split a host's sessions into connections to healthy nodes."""
    require("h2")
    from ..amqp.amqp_proxy import AmqpProxy, server_context

    _expect(listen, "--listen", Inet, Unix)
    for one in node:
        _expect_target(one, "--node")
    if tls_cert is None and (tls_key or tls_ca):
        raise typer.BadParameter("TLS needs --tls-cert")
    tls = server_context(tls_cert, tls_key, tls_ca) if tls_cert is not None else None
    proxy = partial(AmqpProxy, listen, node, authority=authority, tls=tls)
    _serve(listen, proxy, verbose, log_format)


def _expect(locator: Locator, option: str, *kinds: type) -> None:
    if not isinstance(locator, kinds) or locator.datagram:
        schemes = {Inet: "tcp:", Unix: "unix:", Vsock: "vsock:"}
        expected = " or ".join(schemes[kind] for kind in kinds)
        raise typer.BadParameter(f"{option} {locator}: expected {expected}")


def _expect_target(locator: Locator, option: str) -> None:
    _expect(locator, option, Inet, Unix)
    if isinstance(locator, Inet) and not (locator.host and locator.port):
        raise typer.BadParameter(f"{option} {locator}: expected a host and a port")


def require(*libraries: str) -> None:
    """Raises CliError when one of them is not there, with what to install."""
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            raise CliError(f"{library} is missing: {how_to_install('amqp')}")


def _serve(
    listen: Locator, make: Callable[[], Proxy], verbose: bool, log_format: LogFormat
) -> None:
    from ..amqp.service import run

    logs.configure("vsock: %(message)s", logging.INFO if verbose else logs.NOTICE, log_format.value)
    try:
        run(make, listen)
    except OSError as error:
        raise CliError(error.strerror or str(error)) from None
