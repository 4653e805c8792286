"""Arguments and options that several commands share, and parsers of their values."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import click

from ..model.address import FIRST_GUEST_CID, LAST_GUEST_CID, parse_cid, parse_port
from ..model.constants import VMADDR_CID_HOST
from ..model.home import home_folder
from ..model.locator import Inet, Locator, Unix, parse_locator
from .groups import Argument

_Function = TypeVar("_Function", bound=Callable[..., Any])
Decorator = Callable[[_Function], _Function]


def parser_of(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Return ``parse`` as a click type: its ValueErrors become usage errors with the same text."""

    def read(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None

    return read


read_cid = parser_of(parse_cid)
read_port = parser_of(parse_port)
read_locator = parser_of(parse_locator)


@parser_of
def read_user(text: str) -> int:
    """Return the uid of a user given by name or number."""
    import pwd

    if text.isdecimal():
        return int(text)
    try:
        return pwd.getpwnam(text).pw_uid
    except KeyError:
        raise ValueError(f"no such user: {text!r} (expected a name or a number)") from None


def parse_guest(text: str) -> int:
    """Return the CID of a guest in ``text``.

    Raises ValueError if ``text`` is not a number in the range of guests' CIDs.
    """
    with contextlib.suppress(ValueError):
        cid = parse_cid(text)
        if FIRST_GUEST_CID <= cid <= LAST_GUEST_CID:
            return cid
    raise ValueError(f"{text!r}: expected a guest's CID, {FIRST_GUEST_CID} to {LAST_GUEST_CID}")


def _parse_place(text: str) -> int:
    if text.lower() in ("host", str(VMADDR_CID_HOST)):
        return VMADDR_CID_HOST
    try:
        return parse_guest(text)
    except ValueError as error:
        raise ValueError(f"{error}, or host") from None


read_guest = parser_of(parse_guest)


@parser_of
def _read_peer_rule(text: str) -> Any:
    # Imported late: it takes longer than most commands.
    from ..forward.settings import PeerRule

    return PeerRule.parse(text)


def members(kind: type[Enum]) -> dict[str, Any]:
    """Return arguments of click.option() for a parameter whose values are members of ``kind``.

    The result has the keys ``type`` and ``callback``.  Users write a member's value.
    """

    def convert(context: click.Context, parameter: click.Parameter, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(kind, value))
        return None if value is None else kind(value)

    return {"type": click.Choice([member.value for member in kind]), "callback": convert}


def argument(name: str, **attributes: Any) -> Decorator[Any]:
    """Declare a positional argument; the attribute ``help`` describes it."""
    return click.argument(name, cls=Argument, **attributes)


def _number(kind: type[float], name: str, least: float, most: float | None) -> Callable[[Any], Any]:
    limits = f"from {least:g}" + ("" if most is None else f" to {most:g}")

    @parser_of
    def read(text: Any) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = kind(least) - 1
        if not least <= value <= (value if most is None else most):
            raise ValueError(f"{text!r}: expected a {name} {limits}")
        return value

    return read


def seconds_option(
    *names: str, min: float = 0.0, max: float | None = None, **attributes: Any
) -> Decorator[Any]:
    """Declare an option whose value is a time in seconds, a float."""
    return click.option(
        *names, type=_number(float, "number of seconds", min, max), metavar="SECONDS", **attributes
    )


def count_option(
    *names: str, min: int = 1, max: int | None = None, **attributes: Any
) -> Decorator[Any]:
    """Declare an option whose value is a whole number."""
    return click.option(*names, type=_number(int, "whole number", min, max), **attributes)


def cid_option(name: str, **attributes: Any) -> Decorator[Any]:
    """Declare an option whose value is a CID."""
    return click.option(name, type=read_cid, metavar="CID", **attributes)


def guest_option(name: str, **attributes: Any) -> Decorator[Any]:
    """Declare an option whose value is the CID of a guest."""
    return click.option(name, type=read_guest, metavar="CID", **attributes)


def place_option(name: str, **attributes: Any) -> Decorator[Any]:
    """Declare an option whose value is the CID of the host or of a guest."""
    return click.option(name, type=parser_of(_parse_place), metavar="CID", **attributes)


def address_option(name: str, **attributes: Any) -> Decorator[Any]:
    """Declare an option whose value is an address (:mod:`vsockets.model.locator`)."""
    return click.option(name, type=read_locator, metavar="ADDRESS", **attributes)


def path_option(*names: str, **attributes: Any) -> Decorator[Any]:
    """Declare an option whose value is the path of a file or folder, which need not exist."""
    return click.option(*names, type=click.Path(path_type=Path), **attributes)


def path_argument(name: str, **attributes: Any) -> Decorator[Any]:
    """Declare a positional argument that is a path, as in :func:`path_option`."""
    return argument(name, type=click.Path(path_type=Path), **attributes)


def state_file(name: str) -> Path:
    """Return the default path of a service's state file, in this user's home folder."""
    folder = os.environ.get("XDG_STATE_HOME") or home_folder() / ".local" / "state"
    return Path(folder, "vsock", name)


def configure_log(verbose: bool = False, log_format: str = "text", name: str = "vsock") -> None:
    """Log notices to standard error, with ``verbose`` also every connection."""
    import logging

    from .. import logs

    logs.configure(f"{name}: %(message)s", logging.INFO if verbose else logs.NOTICE, log_format)


cid_argument = argument("cid", type=read_cid, metavar="CID")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
verbose_option = click.option("-v", "--verbose", is_flag=True, help="Log every connection.")
log_format_option = click.option(
    "--log-format",
    type=click.Choice(("text", "json")),
    default="text",
    help="Format of the log on standard error; json: one object per line.",
)
reserved_ports_option = click.option(
    "--reserved-ports",
    is_flag=True,
    help="Let programs of the guest bind ports below 1024 without a privilege, as root of a "
    "virtual machine does. Only for guests owned by vsockd's user.",
)

# Options of forwarders.
source_argument = argument(
    "source",
    type=read_locator,
    required=False,
    metavar="[FROM]",
    help="Address that clients connect to.",
)
target_argument = argument(
    "target",
    type=read_locator,
    required=False,
    metavar="[TO]",
    help="Address that each client is connected to.",
)
allow_option = click.option(
    "--allow",
    type=_read_peer_rule,
    multiple=True,
    metavar="CID[:PORT[-PORT]]",
    help="Accept vSockets clients from this CID (and ports) only; repeatable. "
    "Default: accept every client.",
)


# Addresses to serve this machine only


def require_private(where: Locator) -> None:
    """Raise a usage error for an address that other machines can reach."""
    if not is_loopback(where) and (where.datagram or not isinstance(where, Unix)):
        raise click.UsageError(
            f"--listen {where}: not private to this machine (expected unix:PATH or "
            "tcp:127.0.0.1:PORT; for other machines use a proxy that authenticates clients)"
        )


def is_loopback(where: Locator) -> bool:
    """Return whether ``where`` is TCP on a numeric loopback address.

    A name, such as localhost, may be given another address.
    """
    import ipaddress  # imported here: most commands do not need it

    try:
        return (
            isinstance(where, Inet)
            and not where.datagram
            and ipaddress.ip_address(where.host).is_loopback
        )
    except ValueError:
        return False
