"""``vsock amqp``: RabbitMQ for guests, through three proxies."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..amqp.routing import AUTHORITY
from ..extras import how_to_install
from ..model.constants import VMADDR_CID_HOST
from ..model.locator import Inet, Locator, Unix, Vsock
from .connect import lasting_context
from .errors import CliError
from .groups import group
from .options import (
    Decorator,
    address_option,
    configure_log,
    log_format_option,
    parser_of,
    path_option,
    verbose_option,
)

if TYPE_CHECKING:
    from ssl import SSLContext

    # Imported late, in functions: these take longer than most commands.
    from ..amqp.service import Proxy

#: AMQP's port of TCP, used for vSockets, too.
PORT = 5672


@group("amqp")
def amqp() -> None:
    """Give guests access to RabbitMQ through three proxies."""


@parser_of
def _read_rule(text: str) -> Any:
    from ..amqp.routing import VirtualHostRule

    return VirtualHostRule.parse(text)


def _file_option(name: str, help: str) -> Decorator[Any]:
    return path_option(name, metavar="FILE", help=help)


_authority_option = click.option(
    "--authority",
    default=AUTHORITY,
    metavar="HOST:PORT",
    help="Target that CONNECT requests name; for a stock HTTP proxy, the address it connects to.",
)
_tls_key_option = _file_option("--tls-key", "Private key (PEM), if it is not in that file.")


@amqp.command("guest-proxy")
@address_option(
    "--listen",
    help="Address that AMQP clients connect to, tcp: or unix:.",
    default=f"tcp:127.0.0.1:{PORT}",
)
@address_option(
    "--host", help="Address of the host proxy, vsock:.", default=f"vsock:{VMADDR_CID_HOST}:{PORT}"
)
@verbose_option
@log_format_option
def guest_proxy(listen: Any, host: Any, verbose: bool, log_format: str) -> None:
    """Run in a guest: connect each AMQP client to the host proxy by a stream."""
    from ..amqp.guest_proxy import GuestProxy

    _expect(listen, "--listen", Inet, Unix)
    _expect(host, "--host", Vsock)
    context = lasting_context()
    _serve(listen, lambda: GuestProxy(listen, host, context), verbose, log_format)


@amqp.command("host-proxy")
@address_option("--proxy", help="Address of the AMQP proxy, tcp: or unix:.", required=True)
@address_option(
    "--listen", help="Address that guest proxies connect to, vsock:.", default=f"vsock::{PORT}"
)
@click.option(
    "--allow-vhost",
    type=_read_rule,
    multiple=True,
    metavar="CID=VHOST,…",
    help="Virtual hosts that a guest may use, * for all; repeatable. "
    "Default: every guest may use every virtual host.",
)
@_authority_option
@_file_option("--tls-ca", "Use TLS, and accept a proxy certificate signed by this CA (PEM).")
@_file_option("--tls-cert", "Certificate to present to the AMQP proxy (PEM).")
@_tls_key_option
@click.option(
    "--tls-name",
    metavar="NAME",
    help="Name in the AMQP proxy's certificate. Default: the host of --proxy.",
)
@verbose_option
@log_format_option
def host_proxy(
    proxy: Any,
    listen: Any,
    allow_vhost: tuple[Any, ...],
    authority: str,
    tls_ca: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_name: str | None,
    verbose: bool,
    log_format: str,
) -> None:
    """Run on the host: carry all guests' connections to the AMQP proxy over one TCP connection."""
    require("h2")
    from ..amqp.host_proxy import HostProxy, client_context

    _expect(listen, "--listen", Vsock)
    _expect_target(proxy, "--proxy")
    if tls_ca is None and (tls_cert or tls_key or tls_name):
        raise click.UsageError("--tls-cert, --tls-key, --tls-name: TLS needs --tls-ca")
    if tls_ca is not None and isinstance(proxy, Unix) and tls_name is None:
        raise click.UsageError(
            f"--proxy {proxy}: a unix socket has no host name to verify (expected --tls-name)"
        )
    tls = _tls(client_context, tls_ca, tls_cert, tls_key) if tls_ca is not None else None
    context = lasting_context()
    _serve(
        listen,
        lambda: HostProxy(
            listen,
            proxy,
            rules=allow_vhost,
            authority=authority,
            tls=tls,
            tls_name=tls_name,
            context=context,
        ),
        verbose,
        log_format,
    )


@amqp.command("proxy")
@address_option(
    "--node", help="Address of a broker, tcp: or unix:; repeatable.", multiple=True, required=True
)
@address_option(
    "--listen",
    help="Address that host proxies connect to, tcp: or unix:.",
    default="tcp:127.0.0.1:5670",
)
@_authority_option
@_file_option("--tls-cert", "Use TLS, with this certificate (PEM).")
@_tls_key_option
@_file_option("--tls-ca", "Require client certificates signed by this CA (PEM).")
@verbose_option
@log_format_option
def amqp_proxy(
    node: tuple[Any, ...],
    listen: Any,
    authority: str,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_ca: Path | None,
    verbose: bool,
    log_format: str,
) -> None:
    """Run beside the brokers: connect each session of a host proxy to a healthy broker."""
    require("h2")
    from ..amqp.amqp_proxy import AmqpProxy, server_context

    _expect(listen, "--listen", Inet, Unix)
    for one in node:
        _expect_target(one, "--node")
    if tls_cert is None and (tls_key or tls_ca):
        raise click.UsageError("--tls-key, --tls-ca: TLS needs --tls-cert")
    tls = _tls(server_context, tls_cert, tls_key, tls_ca) if tls_cert is not None else None
    proxy = partial(AmqpProxy, listen, list(node), authority=authority, tls=tls)
    _serve(listen, proxy, verbose, log_format)


def _expect(locator: Locator, option: str, *kinds: type) -> None:
    if not isinstance(locator, kinds) or locator.datagram:
        schemes = {Inet: "tcp:", Unix: "unix:", Vsock: "vsock:"}
        expected = " or ".join(schemes[kind] for kind in kinds)
        raise click.UsageError(f"{option} {locator}: expected {expected}")


def _expect_target(locator: Locator, option: str) -> None:
    _expect(locator, option, Inet, Unix)
    if isinstance(locator, Inet) and not (locator.host and locator.port):
        raise click.UsageError(f"{option} {locator}: expected a host and a port")


def _tls(make: Callable[..., SSLContext], *files: Path | None) -> SSLContext:
    """Return the TLS settings that ``make`` returns for ``files``; errors name the files.

    Raises CliError if a file is not PEM of the expected kind, OSError if it cannot be read.
    """
    from ssl import SSLError

    given = [file for file in files if file is not None]
    for file in given:
        with file.open("rb"):  # ssl's own error has no file name
            pass
    try:
        return make(*files)
    except SSLError as error:
        names = ", ".join(map(str, given))
        reason = str(error).rpartition(" (")[0]
        raise CliError(f"invalid TLS file among {names}: {reason} (expected PEM)") from None


def require(*libraries: str) -> None:
    """Raise CliError if one of the ``libraries`` is missing, with the command that installs it."""
    for library in libraries:
        if importlib.util.find_spec(library) is None:
            raise CliError(f"the Python package {library} is missing: {how_to_install('amqp')}")


def _serve(listen: Locator, make: Callable[[], Proxy], verbose: bool, log_format: str) -> None:
    from ..amqp.service import run

    configure_log(verbose, log_format)
    run(make, listen)
