"""``vsock ls``: who has which socket, as ``ss`` shows it for TCP."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any

import typer

from .context import JsonOption, read_cid
from .holders import Holders
from .output import Column, print_json, print_table, user_name
from .reach import administrator


class SocketType(StrEnum):
    """As the fabric calls them."""

    STREAM = "stream"
    SEQPACKET = "seqpacket"
    DATAGRAM = "dgram"


class State(StrEnum):
    """What can become of a socket."""

    BOUND = "bound"
    LISTENING = "listening"
    ESTABLISHED = "established"
    UNCONNECTED = "unconnected"


def ls(
    context: Annotated[
        int | None,
        typer.Option(parser=read_cid, metavar="CID", help="Only this context's sockets."),
    ] = None,
    listening: Annotated[bool, typer.Option("--listening", help="As --state listening.")] = False,
    socket_type: Annotated[SocketType | None, typer.Option("--type")] = None,
    state: Annotated[State | None, typer.Option()] = None,
    as_json: JsonOption = False,
) -> None:
    """List the sockets of the fabric: a stream has two, one at each end."""
    if listening and state not in (None, State.LISTENING):
        raise typer.BadParameter(f"--listening and --state {state} exclude each other")
    wanted = {
        "context": context,
        "type": socket_type and socket_type.value,
        "state": "listening" if listening else state and state.value,
    }
    with administrator() as control:
        sockets = [
            row
            for row in control.sockets()
            if all(value is None or row[key] == value for key, value in wanted.items())
        ]
        contexts = control.contexts()
    _name_programs(sockets)
    if as_json:
        print_json(sockets)
        return
    columns = [
        Column("TYPE"),
        Column("STATE"),
        Column("LOCAL"),
        Column("PEER"),
        Column("USER", whole=False),
        Column("PROCESS", whole=False),
    ]
    print_table(columns, map(_row, sockets))
    guests = [row for row in contexts if row["limits"] and context in (None, row["cid"])]
    if guests:
        print()
        _print_limits(guests)


def _print_limits(guests: list[dict[str, Any]]) -> None:
    """What guests have of what they may have, and how often they wanted more."""
    names = list(guests[0]["usage"])
    columns = [Column("GUEST"), *(Column(name.replace("_", " ").upper()) for name in names)]
    print_table(
        [*columns, Column("LIMITS MET", right=True)],
        (
            (
                guest["cid"],
                *(f"{guest['usage'][name]} of {guest['limits'][name]}" for name in names),
                sum(guest["denials"].get(name, 0) for name in guest["limits"]),
            )
            for guest in guests
        ),
    )


def _row(socket: dict[str, Any]) -> tuple[str, ...]:
    return (
        socket["type"],
        socket["state"],
        f"{socket['cid']}:{socket['port']}",
        "{}:{}".format(*socket["peer"]) if socket["peer"] else "",
        user_name(socket["uid"]),
        f"{socket['pid']} {socket['command']}".rstrip(),
    )


def _name_programs(sockets: list[dict[str, Any]]) -> None:
    """Put the program that has it in each row; vsockd, and its rules, know who registered it."""
    holders = Holders()
    for row in sockets:
        row["registered_by"] = {"pid": row["pid"], "uid": row["uid"]}
        row["pid"], row["uid"], row["command"] = holders.find(row["pid"], row["uid"], row["inode"])
