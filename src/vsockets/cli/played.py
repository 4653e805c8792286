"""``vsock played``: the life and the faults of played machines, and the process that plays them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..model.address import LARGEST
from ..played.faults import FAULTS, Fault
from ..played.limits import PLAYED_CLONES_MAX
from ..played.personalities import find
from ..toml import Table, shown
from .errors import CliError
from .groups import command, group
from .options import cid_argument, count_option, json_option, path_option, seconds_option
from .output import Column, print_json, print_table

if TYPE_CHECKING:
    from ..played.machine import Hypervisor, Machine
    from .http_server import Handler, Request, Response

#: Environment variables of a command under ``vsock fabric --as``.
API, CID, SOCKET, AGENT = (f"VSOCKETS_PLAYED{name}" for name in ("", "_CID", "_SOCKET", "_AGENT"))

#: Names of the values that operations of the API take.
_VALUES = {
    "restore": ("snapshot", "asleep"),
    "clone": ("count",),
    "change-cid": ("cid",),
    "fault": ("name", "seed", "times", "seconds", "port"),
}

Value = TypeVar("Value")

_COLUMNS = (
    Column("CID", right=True),
    Column("HYPERVISOR"),
    Column("STATE"),
    Column("CONNECTIONS", right=True),
    Column("SOCKET"),
)


@group("played")
def played() -> None:
    """Pause, snapshot, restore and break machines of a played hypervisor.

    For a test suite under vsock fabric --as HYPERVISOR; docs/test-your-agent.md.
    """


@played.command("ls")
@json_option
def ls(as_json: bool) -> None:
    """List the played machines."""
    rows = _ask("GET", "/machines")
    if as_json:
        print_json(rows)
        return
    print_table(
        _COLUMNS,
        [
            (
                str(row["cid"]),
                f"{row['hypervisor']}@{row['version']}",
                row["state"],
                str(row["connections"]),
                row["socket"] or "-",
            )
            for row in rows
        ],
    )


def _operation(name: str, text: str) -> None:
    @played.command(name, help=text)
    @cid_argument
    def call(cid: int) -> None:
        _ask("POST", f"/machines/{cid}/{name}")


for _name, _text in {
    "pause": "Stop a machine: data and connects wait in its device.",
    "resume": "Continue a paused machine.",
    "kill": "End a machine's hypervisor; the file of its unix socket stays.",
    "reboot": "Start a machine's guest again, without any program.",
    "replace": "End a machine and start another one with its CID and unix socket.",
}.items():
    _operation(_name, _text)


@played.command("snapshot")
@cid_argument
def snapshot(cid: int) -> None:
    """Save a machine, and print the snapshot's number."""
    print(_ask("POST", f"/machines/{cid}/snapshot")["snapshot"])


@played.command("restore")
@cid_argument
@count_option("--snapshot", metavar="NUMBER", help="Snapshot to load. Default: the last one.")
@seconds_option("--asleep", default=0.0, help="Time since the snapshot.")
def restore(cid: int, snapshot: int | None, asleep: float) -> None:
    """Replace a machine's hypervisor by one that loads a snapshot."""
    _ask("POST", f"/machines/{cid}/restore", snapshot=snapshot, asleep=asleep)


@played.command("clone")
@cid_argument
@count_option("--count", default=1, metavar="N", help="Number of clones.")
def clone(cid: int, count: int) -> None:
    """Create machines from the last snapshot of one; print CID and unix socket of each."""
    for row in _ask("POST", f"/machines/{cid}/clone", count=count)["machines"]:
        print(row["cid"], row["socket"] or "-")


@played.command("change-cid")
@cid_argument
@count_option("--to", min=3, required=True, metavar="CID", help="The new CID.")
def change_cid(cid: int, to: int) -> None:
    """Boot a machine again with another CID, without any program."""
    _ask("POST", f"/machines/{cid}/change-cid", cid=to)


@played.command("fault")
@cid_argument
@click.option("--name", type=click.Choice(tuple(FAULTS)), required=True, help="The fault.")
@count_option("--seed", min=0, default=0, metavar="N", help="Seed of the fault's random choices.")
@count_option("--times", default=1, metavar="N", help="Number of connections to strike.")
@seconds_option("--seconds", default=0.2, help="Delay of late-ok and slow.")
@count_option("--port", min=0, metavar="PORT", help="Port to strike. Default: all ports.")
def fault(cid: int, name: str, seed: int, times: int, seconds: float, port: int | None) -> None:
    """Have a fault strike the next connections of a machine."""
    values = {"name": name, "seed": seed, "times": times, "seconds": seconds, "port": port}
    _ask("POST", f"/machines/{cid}/fault", **values)


@played.command("log")
def log() -> None:
    """Print the operations and the faults that have struck, oldest first."""
    for line in _ask("GET", "/log"):
        print(line)


@command("serve", hidden=True)
@path_option("--socket", required=True, metavar="PATH", help="Unix socket of the HTTP API.")
def serve(socket: Path) -> None:
    """Play machines in the fabric of VSOCKETS_DIR until standard input ends."""
    from .._linux.process import allow_many_descriptors
    from ..model.locator import Unix
    from ..played.machine import Hypervisor
    from . import http_server

    allow_many_descriptors()  # two for each connection
    hypervisor: Hypervisor | None = None

    def prepare(where: str) -> Handler:
        nonlocal hypervisor
        hypervisor = Hypervisor(Path(os.environ["VSOCKETS_DIR"]))
        print(where, flush=True)
        return Api(hypervisor).answer

    async def until_input_ends() -> None:
        await _end_of_input()
        assert hypervisor is not None
        hypervisor.close()
        os._exit(0)

    http_server.serve(Unix(os.fspath(socket)), prepare, until_input_ends)


played.add_command(serve)


async def _end_of_input() -> None:
    import asyncio

    loop = asyncio.get_running_loop()
    ended = loop.create_future()

    def read() -> None:
        if not os.read(0, 4096) and not ended.done():
            ended.set_result(None)

    loop.add_reader(0, read)
    await ended


class Api:
    """The HTTP API: a JSON object in, a JSON value out, one line of text for an error."""

    def __init__(self, hypervisor: Hypervisor) -> None:
        self._hypervisor = hypervisor
        self._operations: dict[str, Callable[[Machine, Table], object]] = {
            "pause": lambda machine, values: machine.pause(),
            "resume": lambda machine, values: machine.resume(),
            "kill": lambda machine, values: machine.kill(),
            "reboot": lambda machine, values: machine.reboot(),
            "replace": lambda machine, values: machine.replace(),
            "snapshot": lambda machine, values: {"snapshot": machine.snapshot()},
            "restore": lambda machine, values: machine.restore(
                values.integer("snapshot", 1), values.number("asleep") or 0.0
            ),
            "clone": self._clone,
            "change-cid": lambda machine, values: hypervisor.change_cid(
                machine.cid, _required(values, "cid", values.integer("cid", 3, LARGEST - 1))
            ).describe(),
            "fault": lambda machine, values: machine.arm(_fault(values)),
        }

    async def answer(self, request: Request) -> Response:
        """Return the response to a request."""
        from ..played.machine import PlayedError
        from .http_server import Response, text

        try:
            found = self._call(
                request.method, request.path.strip("/").split("/"), _object(request.body)
            )
        except LookupError as error:
            return text(404, str(error.args[0]))
        except PlayedError as error:
            return text(409, str(error))
        except ValueError as error:
            return text(400, str(error))
        except OSError as error:
            where = "" if error.filename is None else f"{error.filename}: "
            return text(409, f"{where}{error.strerror or error}")
        return Response(200, "application/json", json.dumps(found).encode() + b"\n")

    def _call(self, method: str, path: list[str], values: Table) -> object:
        hypervisor = self._hypervisor
        match method, path:
            case "GET", ["log"]:
                return hypervisor.log
            case "GET", ["machines"]:
                return [machine.describe() for machine in hypervisor.machines.values()]
            case "POST", ["machines"]:
                values.require_known("hypervisor", "cid", "socket")
                where = values.text("socket")
                if where is not None and (not where or "\0" in where):
                    raise values.error(f"{shown(where)} is no path", "socket")
                place = None if where is None else Path(where)
                name = _required(values, "hypervisor", values.text("hypervisor"))
                cid = values.integer("cid", 3, LARGEST - 1)
                return hypervisor.add(find(name), cid, place).describe()
            case "GET", ["machines", machine_cid]:
                return self._machine(machine_cid).describe()
            case "POST", ["machines", machine_cid, operation] if operation in self._operations:
                machine = self._machine(machine_cid)
                values.require_known(*_VALUES.get(operation, ()))
                return self._operations[operation](machine, values) or machine.describe()
        raise LookupError(
            "not found (expected GET /log, GET or POST /machines, GET /machines/CID or POST "
            f"/machines/CID/OPERATION: {', '.join(self._operations)})"
        )

    def _machine(self, cid: str) -> Machine:
        found = self._hypervisor.machines.get(int(cid) if cid.isdecimal() else -1)
        if found is None:
            raise LookupError(f"no played machine has CID {cid}")
        return found

    def _clone(self, machine: Machine, values: Table) -> object:
        count = values.integer("count", 1, PLAYED_CLONES_MAX)
        clones = self._hypervisor.clone(machine.cid, 1 if count is None else count)
        return {"machines": [one.describe() for one in clones]}


def _object(body: bytes) -> Table:
    """Return the JSON object of a request's body; it is empty if the body is.

    Raises ValueError if the body is something else.
    """
    try:
        values = json.loads(body or b"{}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"invalid body: {error} (expected a JSON object)") from None
    if not isinstance(values, dict):
        raise ValueError("invalid body (expected a JSON object)")
    return Table(None, {}, (), values)


def _required(values: Table, key: str, value: Value | None) -> Value:
    if value is None:
        raise values.error("missing", key)
    return value


def _fault(values: Table) -> Fault:
    """Return the fault of a request; a value that is missing or null has its default.

    Raises ValueError if a value is invalid.
    """
    given: dict[str, Any] = {
        "name": _required(values, "name", values.choice("name", FAULTS)),
        "seed": values.integer("seed", 0),
        "times": values.integer("times", 1),
        "seconds": values.number("seconds"),
        "port": values.integer("port", 0, LARGEST),
    }
    return Fault(**{key: value for key, value in given.items() if value is not None})


def _ask(method: str, target: str, **values: Any) -> Any:
    from ..testing.played import PlayedFailed, request

    api = os.environ.get(API)
    if api is None:
        raise CliError(
            f"{API} is not set: no hypervisor is played here (expected a command under "
            "vsock fabric --as HYPERVISOR -- COMMAND)"
        )
    try:
        return request(api, method, target, **values)
    except PlayedFailed as error:
        raise CliError(str(error)) from None
    except OSError as error:
        raise CliError(
            f"{api}: {error.strerror or error}: the process that plays machines has ended or does "
            "not answer (expected that of vsock fabric --as HYPERVISOR)"
        ) from None
