"""``vsock ls``: list sockets and their processes, as ``ss`` does for TCP."""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import click

from ..control import Control
from .connect import administrator
from .groups import command
from .live_view import View, interval_option, require_terminal, show
from .observation import Owners, bytes_per_second, fill_queues, with_unit
from .options import cid_option, count_option, json_option, read_port, read_user
from .output import Column, make_table, print_json, print_table, user_name

if TYPE_CHECKING:
    from rich.console import RenderableType


#: Types and states of sockets, as vsockd reports them.
_TYPES = ("stream", "seqpacket", "dgram")
_STATES = ("bound", "listening", "connecting", "established", "unconnected")

COLUMNS = (
    Column("TYPE"),
    Column("STATE", least=9),
    Column("RECV-Q", right=True, spare=2),
    Column("SEND-Q", right=True, spare=3),
    Column("BYTES/S", right=True, spare=1),
    Column("LOCAL"),
    Column("PEER"),
    Column("CONTEXT", least=8, from_width=100),
    Column("BUFFER", right=True, from_width=100),
    Column("USER", least=6, spare=4),
    Column("PROCESS", least=9),
)


@command("ls")
@cid_option("--context", multiple=True, help="Only sockets of this context.")
@click.option(
    "--port",
    type=read_port,
    multiple=True,
    metavar="PORT",
    help="Only sockets with this port, at either end.",
)
@click.option(
    "--type",
    "socket_type",
    type=click.Choice(_TYPES),
    multiple=True,
    help="Only sockets of this type.",
)
@click.option(
    "--state", type=click.Choice(_STATES), multiple=True, help="Only sockets in this state."
)
@click.option("-l", "--listening", is_flag=True, help="Same as --state listening.")
@count_option("--pid", min=0, multiple=True, metavar="PID", help="Only sockets of this process.")
@click.option(
    "--user",
    type=read_user,
    multiple=True,
    metavar="USER",
    help="Only sockets of this user: name or uid.",
)
@click.option("--watch", is_flag=True, help="Refresh the table until q or Ctrl-C.")
@interval_option(2.0)
@json_option
def ls(
    context: tuple[int, ...],
    port: tuple[int, ...],
    socket_type: tuple[str, ...],
    state: tuple[str, ...],
    listening: bool,
    pid: tuple[int, ...],
    user: tuple[int, ...],
    watch: bool,
    interval: float,
    as_json: bool,
) -> None:
    """List the fabric's sockets, two for each stream.

    Every filter is repeatable; a socket matches any of its values.  RECV-Q and SEND-Q are the
    bytes that are unread here and at the peer; of a listening socket, the pending connections and
    the backlog.  BYTES/S is for both directions, in streams of virtual machines and of vsock
    forward; the kernel does not count the bytes of others.
    """
    if listening and state not in ((), ("listening",)):
        raise click.UsageError("--listening and another --state exclude each other")
    wanted = Filter(
        context=context,
        type=socket_type,
        state=("listening",) if listening else state,
        pid=pid,
        uid=user,
        port=port,
    )
    if watch and not as_json:
        require_terminal()
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
    print_table(COLUMNS, map(socket_row, sockets))
    guests = [row for row in contexts if row["limits"] and (not context or row["cid"] in context)]
    if guests:
        print()
        _print_limits(guests)


class Filter:
    """A predicate on rows of sockets; a key without values matches every row."""

    def __init__(self, port: Collection[int], **values: Collection[Any]) -> None:
        self._ports = port
        self._values = {key: set(wanted) for key, wanted in values.items() if wanted}

    def __call__(self, row: dict[str, Any]) -> bool:
        """Return whether ``row`` matches."""
        if any(row[key] not in wanted for key, wanted in self._values.items()):
            return False
        peer_port = row["peer"][1] if row["peer"] else None
        return not self._ports or row["port"] in self._ports or peer_port in self._ports


def _sockets(control: Control, wanted: Filter) -> list[dict[str, Any]]:
    names = {row["cid"]: row["name"] for row in control.contexts()}
    sockets = control.sockets()
    fill_queues(sockets)
    owners = Owners()
    for row in sockets:
        row["name"] = names.get(row["context"], "")
        # vsockd knows the process that registered the socket; another may own it now.
        row["registered_by"] = {"pid": row["pid"], "uid": row["uid"]}
        row["pid"], row["uid"], row["command"] = owners.find(row["pid"], row["uid"], row["inode"])
        row["user"] = user_name(row["uid"])
    return [row for row in sockets if wanted(row)]


class _Sockets(View):
    """The view of ``--watch``."""

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
        return Group(title, make_table(COLUMNS, map(socket_row, self._rows), width))


def _print_limits(guests: list[dict[str, Any]]) -> None:
    """Print each guest's usage and limits, and how often a limit was reached."""
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


def socket_row(socket: dict[str, Any]) -> tuple[object, ...]:
    """Return the cells of a socket, one for each of COLUMNS."""
    return (
        socket["type"],
        socket["state"],
        _known(socket["receive_queue"]),
        _known(socket["send_queue"]),
        with_unit(bytes_per_second(socket)),
        f"{socket['cid']}:{socket['port']}",
        "{}:{}".format(*socket["peer"]) if socket["peer"] else "",
        socket["name"],
        socket["buffer"],
        socket["user"],
        f"{socket['pid']} {socket['command'] or ''}".rstrip(),
    )


def _known(number: int | None) -> object:
    return "-" if number is None else number
