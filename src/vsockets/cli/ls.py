"""``vsock ls``: who has which socket, as ``ss`` shows it for TCP."""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..control import Control
from ..model.address import parse_port
from .connect import administrator
from .live_view import IntervalOption, View, require_terminal, show
from .options import JsonOption, parser_of, read_cid, read_user
from .output import Column, make_table, print_json, print_table, user_name
from .socket_owners import Holders
from .unix_diag import fill_queues

if TYPE_CHECKING:
    from rich.console import RenderableType


class SocketType(StrEnum):
    """As the fabric calls them."""

    STREAM = "stream"
    SEQPACKET = "seqpacket"
    DATAGRAM = "dgram"


class State(StrEnum):
    """What can become of a socket."""

    BOUND = "bound"
    LISTENING = "listening"
    CONNECTING = "connecting"
    ESTABLISHED = "established"
    UNCONNECTED = "unconnected"


_COLUMNS = (
    Column("TYPE"),
    Column("STATE", least=9),
    Column("RECV-Q", right=True, spare=1),
    Column("SEND-Q", right=True, spare=2),
    Column("LOCAL"),
    Column("PEER"),
    Column("CONTEXT", least=8, from_width=100),
    Column("BUFFER", right=True, from_width=100),
    Column("USER", least=6, spare=3),
    Column("PROCESS", least=7),
)


def ls(
    context: Annotated[
        list[Any] | None,
        typer.Option(parser=read_cid, metavar="CID", help="Only this context's sockets."),
    ] = None,
    port: Annotated[
        list[Any] | None,
        typer.Option(
            parser=parser_of(parse_port), metavar="PORT", help="Only with this port, at either end."
        ),
    ] = None,
    socket_type: Annotated[
        list[SocketType] | None, typer.Option("--type", help="Only sockets of this type.")
    ] = None,
    state: Annotated[list[State] | None, typer.Option(help="Only in this state.")] = None,
    listening: Annotated[
        bool, typer.Option("-l", "--listening", help="As --state listening.")
    ] = False,
    pid: Annotated[
        list[int] | None, typer.Option(metavar="PID", min=0, help="Only this process's.")
    ] = None,
    user: Annotated[
        list[Any] | None,
        typer.Option(parser=read_user, metavar="USER", help="Only this user's: name or number."),
    ] = None,
    watch: Annotated[
        bool, typer.Option("--watch", help="Go on showing them, until q or Ctrl-C.")
    ] = False,
    interval: IntervalOption = 2.0,
    as_json: JsonOption = False,
) -> None:
    """List the sockets of the fabric: a stream has two, one at each end.

    Every filter can be repeated: any of its values will do.  RECV-Q and SEND-Q are the bytes that
    wait to be read here, and at the far end; of a listening socket the connections that wait, and
    how many may.
    """
    if listening and state not in (None, [], [State.LISTENING]):
        raise typer.BadParameter("--listening and another --state exclude each other")
    wanted = Filter(
        context=context,
        type=socket_type,
        state=[State.LISTENING] if listening else state,
        pid=pid,
        uid=user,
        port=port,
    )
    if watch and not as_json:
        require_terminal("--watch")
    with administrator() as control:
        if watch and as_json:
            while True:
                print(json.dumps(_sockets(control, wanted)), flush=True)
                time.sleep(interval)
        if watch:
            show(_Sockets(control, wanted), interval)
            return
        sockets = _sockets(control, wanted)
        contexts = control.contexts()
    if as_json:
        print_json(sockets)
        return
    print_table(_COLUMNS, map(_row, sockets))
    guests = [row for row in contexts if row["limits"] and (not context or row["cid"] in context)]
    if guests:
        print()
        _print_limits(guests)


class Filter:
    """Which sockets; a key with no values is any."""

    def __init__(self, port: Collection[int] | None, **values: Collection[Any] | None) -> None:
        self._ports = port
        self._values = {key: set(wanted) for key, wanted in values.items() if wanted}

    def __call__(self, row: dict[str, Any]) -> bool:
        if any(row[key] not in wanted for key, wanted in self._values.items()):
            return False
        peer_port = row["peer"][1] if row["peer"] else None
        return not self._ports or row["port"] in self._ports or peer_port in self._ports


def _sockets(control: Control, wanted: Filter) -> list[dict[str, Any]]:
    names = {row["cid"]: row["name"] for row in control.contexts()}
    sockets = control.sockets()
    fill_queues(sockets)
    holders = Holders()
    for row in sockets:
        row["name"] = names.get(row["context"], "")
        # Who has it now; vsockd, and its rules, know who registered it.
        row["registered_by"] = {"pid": row["pid"], "uid": row["uid"]}
        row["pid"], row["uid"], row["command"] = holders.find(row["pid"], row["uid"], row["inode"])
        row["user"] = user_name(row["uid"])
    return [row for row in sockets if wanted(row)]


class _Sockets(View):
    """The table that stays."""

    def __init__(self, control: Control, wanted: Filter) -> None:
        self._control = control
        self._wanted = wanted
        self._rows: list[dict[str, Any]] = []

    def update(self) -> None:
        self._rows = _sockets(self._control, self._wanted)

    def draw(self, width: int, height: int) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        title = Text(f"{len(self._rows)} sockets, {time.strftime('%H:%M:%S')}  (q: quit)")
        return Group(title, make_table(_COLUMNS, map(_row, self._rows), width))


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


def _row(socket: dict[str, Any]) -> tuple[object, ...]:
    return (
        socket["type"],
        socket["state"],
        _known(socket["receive_queue"]),
        _known(socket["send_queue"]),
        f"{socket['cid']}:{socket['port']}",
        "{}:{}".format(*socket["peer"]) if socket["peer"] else "",
        socket["name"],
        socket["buffer"],
        socket["user"],
        f"{socket['pid']} {socket['command'] or ''}".rstrip(),
    )


def _known(number: int | None) -> object:
    return "-" if number is None else number
