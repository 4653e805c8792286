"""``make test-peers``: what a machine's life does to connections, with real guests and played ones.

Each scenario runs with a guest of our virtio device (its host in the fabric, and behind its hybrid
socket), with a guest of Debian's vhost-device-vsock, and with the played hypervisors that stand for
them.  The observations are docs/internals/peers.md; a run that observes something else fails, and
writes the page again.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import vsockets
from vsockets.testing import PlayedMachine, PrivateFabric, wait_until

from .conftest import COMMON, Stage
from .exchanges import has_virtio_device
from .machine import Agent, Machine, MonitorError
from .rust_machine import RustMachine

PAGE = Path(__file__).parents[2] / "docs/internals/peers.md"

#: Seconds without an event after which an end counts as waiting, and the patience of everything
#: else.
SILENCE = 2.0
PATIENCE = 60.0

#: Seconds for OK.
ANSWER = 10.0

PORT = 6300
#: The connections of a scenario by their use.
NAMES = ("reader", "writer", "unread", "unsent")

#: Functions of the guest's programs: what a socket call results in.
_LOOK = """
import errno, select, sys
def name(error): return errno.errorcode.get(error.errno, str(error))
def look(s, wait):
    '''Return what reading gives: data, the end or an error, or that it waits.'''
    if not select.select([s], [], [], wait)[0]: return 'waits'
    try: data = s.recv(100)
    except OSError as error: return name(error)
    return data.decode() if data else 'end of stream'
def both(s, wait):
    first = look(s, wait)
    return first if first in ('waits', 'end of stream') or first[0] == 'E' \
        else first + ', ' + look(s, wait)
def write(s, wait):
    '''Return what a write gives, and the next one if that is another.'''
    found = []
    for byte in b'x', b'y':
        try: s.send(byte); found.append('sent')
        except OSError as error: found.append(name(error))
        if len(found) == 1: select.select([s], [], [], wait)
    return found[0] if found[0] == found[1] else ', then '.join(found)
common = True
"""
_LOCAL: dict[str, Any] = {}
exec(_LOOK, _LOCAL)


class Unsupported(Exception):
    """An operation that the hypervisor refuses; the message is its own."""


class Side(ABC):
    """The host's way to a guest and back."""

    @abstractmethod
    def dial(self, port: int) -> socket.socket:
        """Connect to the guest."""

    @abstractmethod
    def listen(self, port: int) -> Any:
        """Listen for connects of the guest."""


class Kernel(Side):
    """AF_VSOCK of the host: the fabric's."""

    def __init__(self, cid: Callable[[], int], context: Any) -> None:
        self._cid = cid
        self._context = context

    def dial(self, port: int) -> socket.socket:
        return vsockets.create_connection((self._cid(), port), context=self._context)

    def listen(self, port: int) -> Any:
        return vsockets.create_server((vsockets.VMADDR_CID_ANY, port), context=self._context)


class Hybrid(Side):
    """A unix socket with CONNECT and OK."""

    def __init__(self, path: str) -> None:
        self._path = path

    def dial(self, port: int) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(ANSWER)
        try:
            sock.connect(self._path)
            sock.sendall(b"CONNECT %d\n" % port)
            line = b""
            while not line.endswith(b"\n"):
                byte = sock.recv(1)
                if not byte:
                    raise ConnectionResetError(errno.ECONNRESET, "closed instead of OK")
                line += byte
        except BaseException:
            sock.close()
            raise
        return sock

    def listen(self, port: int) -> Any:
        path = Path(f"{self._path}_{port}")
        path.unlink(missing_ok=True)
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(path))
        server.listen()
        return server


class World(ABC):
    """A machine whose life has operations, with one or more sides."""

    guest: Agent
    sides: dict[str, Side]

    #: Called while the machine is paused.
    paused: Callable[[], None]

    @abstractmethod
    def operations(self) -> dict[str, Callable[[], object]]:
        """Return the operations that this world has, by name."""

    def recover(self) -> None:
        """Start the machine again, after an operation that it has not survived."""
        raise AssertionError("the machine has not survived an operation")

    def prepare(self) -> None:
        """Define the functions of the guest's programs after a start."""
        self.guest.run(COMMON)
        self.guest.run(_LOOK)


class Real(World):
    """A guest of our virtio device, with two sides."""

    def __init__(self, fabric: PrivateFabric, machine: Machine, path: str) -> None:
        self.machine = self.guest = machine
        self._fabric = fabric
        self._path = path
        self.sides = {
            "virtio device": Kernel(lambda: machine.cid, machine.host),
            "virtio device, hybrid": Hybrid(path),
        }
        self.prepare()

    def operations(self) -> dict[str, Callable[[], object]]:
        return {
            "pause, resume": self._pause,
            "snapshot": self._snapshot,
            "restore": self._replace,
            "reboot": self._reboot,
            "change of the CID": self._change,
            "kill": self.machine.kill_qemu,
        }

    def _pause(self) -> None:
        self.machine.monitor("stop")
        self.paused()
        self.machine.monitor("cont")

    def _snapshot(self) -> None:
        try:
            self.machine.monitor("migrate", uri=f"file:{self._path}.saved")
        except MonitorError as error:
            raise Unsupported(str(error)) from None
        raise AssertionError("QEMU saves the machine: describe it")

    def _replace(self) -> None:
        """Replace the device of the running machine: all that a restore is here."""
        self.machine.kill_device()
        self.machine.start_device()
        self.machine.replug()
        what = "the guest to take the device"
        wait_until(lambda: has_virtio_device(self.machine), what, PATIENCE)

    def _reboot(self) -> None:
        self.machine.monitor("system_reset")
        self.machine.wait_for_boot()
        self.prepare()

    def _change(self) -> None:
        """Kill the machine, and start it with another CID."""
        self.machine.kill()
        self.machine.cid = self._new_cid()
        self.machine.start_device()
        self.machine.boot()
        self.prepare()

    def _new_cid(self) -> int:
        control = self._fabric.control
        control.remove_context(self.machine.cid)
        cid = self.machine.cid + 1
        control.add_context(cid, hybrid=self._path)
        return cid


class Rust(Real):
    """A guest of Debian's vhost-device-vsock."""

    def __init__(self, fabric: PrivateFabric, machine: RustMachine) -> None:
        self.machine = self.guest = machine
        self._fabric = fabric
        self._path = str(machine.uds_path)
        self.sides = {"vhost-device-vsock": Hybrid(self._path)}
        self.prepare()

    def _new_cid(self) -> int:
        return self.machine.cid + 1

    def recover(self) -> None:
        self.machine.kill()
        self.machine.start_device()
        self.machine.boot()
        self.prepare()


class PlayedGuest(Agent):
    """A process that runs the agent in a played machine's guest."""

    def __init__(self, machine: PlayedMachine) -> None:
        super().__init__()
        ours, theirs = socket.socketpair()
        agent = Path(__file__).with_name("agent.py")
        with theirs:
            machine.popen([sys.executable, "-u", "-S", agent], stdin=theirs, stdout=theirs)
        self.serve(ours)
        self.wait_for_boot()


class Played(World):
    """A played machine."""

    def __init__(self, fabric: PrivateFabric, hypervisor: str) -> None:
        self._machine = fabric.played(hypervisor)
        machine = self._machine
        side = Hybrid(machine.socket) if machine.socket else Kernel(self._cid, machine.host)
        self.sides = {f"played {hypervisor}": side}
        self._start()

    def _cid(self) -> int:
        return self._machine.cid

    def _start(self) -> None:
        self.guest = PlayedGuest(self._machine)
        self.prepare()

    def operations(self) -> dict[str, Callable[[], object]]:
        machine = self._machine
        have = machine.describe()["operations"]
        every: dict[str, tuple[str, Callable[[], object]]] = {
            "pause, resume": ("pause", self._pause),
            "snapshot": ("snapshot", machine.snapshot),
            "restore": ("restore", self._restore),
            "reboot": ("reboot", self._reboot),
            "change of the CID": ("change-cid", self._change),
            "kill": ("kill", machine.kill),
        }
        return {name: act for name, (operation, act) in every.items() if operation in have}

    def _pause(self) -> None:
        self._machine.pause()
        self.paused()
        self._machine.resume()

    def _restore(self) -> None:
        self._machine.snapshot()
        self._machine.restore()

    def _reboot(self) -> None:
        self._machine.reboot()
        self._start()

    def _change(self) -> None:
        self._machine.change_cid(self._machine.cid + 1)
        self._start()


OPERATIONS = ("pause, resume", "snapshot", "restore", "reboot", "change of the CID", "kill")
#: Operations after which the guest's programs have ended.
ENDS = ("reboot", "kill", "change of the CID")

#: Observations in their order: of the guest's programs, then of the host's.
VIEWS = (
    "in the pause: host connects",
    *("guest: blocked recv()", "guest: send()", "guest: recv() of unread bytes"),
    *("host: recv()", "host: send()", "host: recv() of unread bytes"),
    *("then: host connects", "then: guest connects"),
)

Observations = dict[str, str]


class Scenario:
    """The connections of one side during an operation."""

    def __init__(self, world: World, side: Side, port: int) -> None:
        self._guest = world.guest
        self._world = world
        self._side = side
        self._port = port
        self._in_pause: list[str] = []
        self._dialling: threading.Thread | None = None
        self._server = side.listen(port + 1)
        self._server.settimeout(PATIENCE)
        self._guest.run(
            "import sys; sys.ends = getattr(sys, 'ends', {}); sys.ends[port] = listener(port)",
            port=port,
        )
        accepting = self._guest.start(
            """
            import sys
            for name in names: sys.ends[port, name] = sys.ends[port].accept()[0]
            sys.ends[port, 'unsent'].send(b'guest')
            """,
            port=port,
            names=NAMES,
        )
        self._host = {name: side.dial(port) for name in NAMES}
        self._host["unread"].send(b"host")
        accepting.result()
        self._blocked = self._guest.start(
            """
            import sys
            try: result = sys.ends[port, 'reader'].recv(100).decode() or 'end of stream'
            except OSError as error: result = name(error)
            """,
            port=port,
        )

    def dial_in_pause(self) -> None:
        """Connect while the machine is paused; :meth:`observe` has the result."""

        def dial() -> None:
            self._in_pause.append(self.host_connects()["then: host connects"])

        self._dialling = threading.Thread(target=dial)
        self._dialling.start()
        self._dialling.join(SILENCE / 4)
        if self._dialling.is_alive():
            self._in_pause.append("waits")

    def observe(self, lives: bool) -> Observations:
        """Return what both sides see after the operation; ``lives``: the guest's programs do."""
        found: Observations = {}
        if self._dialling is not None:
            self._dialling.join()
            found["in the pause: host connects"] = ", then ".join(self._in_pause)
        if lives:
            found |= self._of_guest()
        look, both, write = (_LOCAL[name] for name in ("look", "both", "write"))
        found["host: recv()"] = look(self._host["reader"], SILENCE)
        found["host: send()"] = write(self._host["writer"], SILENCE)
        found["host: recv() of unread bytes"] = both(self._host["unsent"], SILENCE)
        return found

    def _of_guest(self) -> Observations:
        try:
            blocked = self._blocked.result(SILENCE)
        except TimeoutError:
            blocked = "waits"
        values = {"port": self._port, "wait": SILENCE}
        run = self._guest.run
        return {
            "guest: blocked recv()": blocked,
            "guest: send()": run(
                "import sys; result = write(sys.ends[port, 'writer'], wait)", **values
            ),
            "guest: recv() of unread bytes": run(
                "import sys; result = both(sys.ends[port, 'unread'], wait)", **values
            ),
        }

    def host_connects(self) -> Observations:
        """Return what a new connect to the listener from before sees."""
        try:
            self._side.dial(self._port).close()
        except OSError as error:
            said = errno.errorcode.get(error.errno or 0, f"no answer in {ANSWER:g} s")
            return {"then: host connects": said}
        return {"then: host connects": "connects"}

    def guest_connects(self) -> Observations:
        """Return what a new connect of the guest sees."""
        result = self._world.guest.run(
            """
            try: connect(port).close(); result = 'connects'
            except OSError as error: result = name(error)
            """,
            port=self._port + 1,
        )
        return {"then: guest connects": result}

    def close(self) -> None:
        """Close the host's sockets."""
        for sock in (*self._host.values(), self._server):
            sock.close()


def observe(world: World) -> dict[str, dict[str, Observations]]:
    """Return the observations by side and operation."""
    seen: dict[str, dict[str, Observations]] = {name: {} for name in world.sides}
    port = PORT
    for name, operation in world.operations().items():
        scenarios = {}
        for side, way in world.sides.items():
            scenarios[side] = Scenario(world, way, port)
            port += 2
        refused = ""

        def dial_all(scenarios: dict[str, Scenario] = scenarios) -> None:
            for scenario in scenarios.values():
                scenario.dial_in_pause()

        world.paused = dial_all
        try:
            operation()
        except Unsupported as error:
            refused = str(error)
        for side, scenario in scenarios.items():
            lives = name not in ENDS
            if refused:
                found = {VIEWS[1]: f"refused: {refused}"}
            else:
                found = scenario.observe(lives) | scenario.host_connects()
                if name != "kill":
                    found |= scenario.guest_connects()
            seen[side][name] = found
            scenario.close()
            print(f"{side}: {name}: {found}", flush=True)
            if lives and not refused and found["then: host connects"] != "connects":
                world.recover()
    return seen


_HEAD = """\
# Played machines beside real ones

`make test-peers` does to machines what [test-your-agent.md](../test-your-agent.md) plays, and
writes down what the programs on both sides see. The guest of our virtio device is {newest}, with
the host's programs in the fabric and behind the hybrid socket that `vsock context add --hybrid`
makes. The guest of Debian's vhost-device-vsock is {stable}: that back end does not accept every
packet of newer ones. QEMU emulates both. A run that sees something else fails, and writes this page
again; it takes {minutes} minutes.

- There are four connections from the host to the guest: in one the guest's program is blocked in
  `recv()`, in one both sides write afterwards (twice, if the second write fails with another
  error), in one the guest has four unread bytes, in one the host has five.
- **pause, resume**: `stop` and `cont` of QEMU's monitor.
- **snapshot**: migration to a file.
- **restore**: QEMU restores no machine with such a device. Instead, its process is killed and
  another device is plugged in, which resets the guest's transport as a restore does.
- **reboot**: `system_reset`. **kill**: of QEMU. **change of the CID**: the machine is killed, and
  starts again with another one.
- *then*: connects after the operation, to the listener from before.

"waits" is silence for {silence:g} seconds.

"""


def page(seen: dict[str, dict[str, Observations]], versions: tuple[str, str], took: float) -> str:
    """Return the page with all observations."""
    newest, stable = (f"Linux {re.split('[+]|-cloud', version)[0]}" for version in versions)
    text = _HEAD.format(
        newest=newest, stable=stable, minutes=max(1, round(took / 60)), silence=SILENCE
    )
    worlds = list(seen)
    for operation in OPERATIONS:
        text += f"## {operation[0].upper()}{operation[1:]}\n\n"
        text += f"| | {' | '.join(worlds)} |\n|---{'|---' * len(worlds)}|\n"
        for view in VIEWS:
            cells = [seen[world].get(operation, {}).get(view, "") for world in worlds]
            if any(cells):
                text += f"| {view} | {' | '.join(cells)} |\n"
        text += "\n"
    return text.rstrip("\n") + "\n"


def main() -> int:
    """Return the exit status: 0 if the page is as before."""
    began = time.monotonic()
    os.environ["VSOCKETS_REQUIRE_VM"] = "1"  # a missing download is an error, not a skip
    seen: dict[str, dict[str, Observations]] = {}
    with (
        tempfile.TemporaryDirectory(prefix="peers-", dir="/tmp") as name,
        PrivateFabric() as fabric,
    ):
        folder = Path(name)
        stage = Stage(folder)
        path = str(folder / "hybrid")
        cid = fabric.control.add_context(hybrid=path)["cid"]
        with stage.machine(fabric, "newest", cid=cid, device="virtio") as machine:
            newest = machine.run("import os; result = os.uname().release")
            seen |= observe(Real(fabric, machine, path))
        with stage.machine(fabric, "stable", device="virtio", kind=RustMachine) as rust:
            assert isinstance(rust, RustMachine)
            stable = rust.run("import os; result = os.uname().release")
            of_rust = observe(Rust(fabric, rust))
    with PrivateFabric() as fabric:
        seen |= observe(Played(fabric, "qemu")) | of_rust | observe(Played(fabric, "firecracker"))
    before = PAGE.read_text() if PAGE.exists() else ""
    PAGE.write_text(page(seen, (newest, stable), time.monotonic() - began))

    def tables(text: str) -> str:
        return text.partition("\n## ")[2]

    if tables(before) != tables(PAGE.read_text()):
        print(f"peers: the observations differ from {PAGE.name}; see git diff")
        return 1
    print("peers: as before")
    return 0


if __name__ == "__main__":
    sys.exit(main())
