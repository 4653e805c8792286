"""Arguments and options that several commands have, and how they are read."""

from __future__ import annotations

import pwd
from enum import StrEnum
from typing import Annotated, Any

import typer

from ..model.address import parse_cid
from ..model.locator import parse_locator


def parser_of(parse: Any) -> Any:
    """``parse`` for the command line: its ValueError is a usage error."""

    def read(text: str) -> Any:
        try:
            return parse(text)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from None

    return read


read_cid = parser_of(parse_cid)
read_locator = parser_of(parse_locator)


@parser_of
def read_user(text: str) -> int:
    """The id of a user given by name or number."""
    if text.isdecimal():
        return int(text)
    try:
        return pwd.getpwnam(text).pw_uid
    except KeyError:
        raise ValueError(f"there is no user {text!r}") from None


@parser_of
def _read_peer_rule(text: str) -> Any:
    # What is imported here takes longer than most commands do.
    from ..forward.settings import PeerRule

    return PeerRule.parse(text)


CidArgument = Annotated[int, typer.Argument(parser=read_cid, metavar="CID")]
JsonOption = Annotated[bool, typer.Option("--json", help="For programs.")]
ReservedPortsOption = Annotated[
    bool,
    typer.Option(
        "--reserved-ports",
        help="Let programs of the guest bind ports below 1024 without a privilege, as root of a "
        "virtual machine does. For guests of vsockd's own user.",
    ),
]
VerboseOption = Annotated[bool, typer.Option("-v", "--verbose", help="Tell of every connection.")]


class LogFormat(StrEnum):
    """How a program that goes on for long says what happens."""

    TEXT = "text"
    JSON = "json"


LogFormatOption = Annotated[
    LogFormat, typer.Option(help="What is logged to standard error; json: an object a line.")
]

# Of forwarders.
SourceArgument = Annotated[
    Any, typer.Argument(parser=read_locator, metavar="FROM", help="Where clients come to.")
]
TargetArgument = Annotated[
    Any, typer.Argument(parser=read_locator, metavar="TO", help="Where each one is taken.")
]
AllowOption = Annotated[
    list[Any] | None,
    typer.Option(
        parser=_read_peer_rule,
        metavar="CID[:PORT[-PORT]]",
        help="Only vSockets clients from there; can be repeated.",
    ),
]
