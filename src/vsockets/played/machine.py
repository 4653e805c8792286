"""Played machines: a VMM's vSockets device, between a guest of the fabric and its host.

A machine with hybrid vsock is in the middle of each connection, as the VMM's device is.  It has the
unix socket and accepts CONNECT lines; the guest's connects to ports of the host arrive over a link
to vsockd (:meth:`vsockets.control.Control.attach_played_host`).  A machine with the kernel's
AF_VSOCK is in the middle of none: programs connect directly, and the machine changes the state of
the guest's context only.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..control import Control
from ..model.constants import VMADDR_CID_HOST
from .device import Device
from .faults import Fault, Faults
from .limits import PLAYED_ASLEEP_SECONDS_MAX, PLAYED_LOG_LINES_MAX
from .personalities import FIRST_HOST_PORT, NITRO_PARENT_CID, Effect, Personality, Transport
from .vmclock import VMClock


class PlayedError(Exception):
    """An operation that the VMM or the machine's state does not allow."""


@dataclass
class Snapshot:
    """The state of a machine's device at the time of a snapshot."""

    number: int
    port: int  #: the last port of a host end


class Machine:
    """A played machine: its guest, its device, and its life."""

    def __init__(
        self,
        *,
        personality: Personality,
        control: Control,
        cid: int,
        path: Path | None,
        log: Callable[[str], None],
        holders: dict[int, int],
        generations: Iterator[int],
    ) -> None:
        """Play a machine for the guest ``cid``, at the unix socket ``path`` if it is hybrid."""
        self.personality = personality
        self.cid = cid
        self.state = "running"
        self._control = control
        self._write = log
        self.faults = Faults(self.note)
        self._snapshots: dict[int, Snapshot] = {}
        self._paused_after = 0  # the number of snapshots before the pause
        self._generations = generations
        self.asleep = 0.0  #: seconds by which the guest's clock is behind the host's
        self.device: Device | None = None
        self.vmclock: VMClock | None = None
        if personality.transport is Transport.HYBRID:
            assert path is not None
            self.device = Device(
                personality=personality,
                control=control,
                cid=cid,
                path=path,
                faults=self.faults,
                holders=holders,
            )
            try:
                self.device.open()
                if personality.vmclock:
                    self.vmclock = VMClock(Path(f"{path}.vmclock"))
            except BaseException:
                self.device.close()
                raise

    def note(self, line: str) -> None:
        """Write a line about the machine to the log."""
        self._write(f"machine {self.cid} ({self.personality.name}): {line}")

    def describe(self) -> dict[str, Any]:
        """Return the machine's state for the API."""
        personality, device = self.personality, self.device
        path = None if device is None else os.fspath(device.path)
        agent = None
        if path is not None and personality.agent_port:
            agent = f"{personality.scheme}://{path}:{personality.agent_port}"
        return {
            "cid": self.cid,
            "hypervisor": personality.name,
            "version": personality.version,
            "state": self.state,
            "socket": path,
            "agent": agent,
            "host_cid": personality.host_cid,
            "connections": 0 if device is None else len(device.connections),
            "snapshots": list(self._snapshots),
            "asleep": self.asleep,
            "vmclock": None if self.vmclock is None else os.fspath(self.vmclock.path),
            "operations": sorted(personality.operations),
            "faults": [
                {"name": one.name, "seed": one.seed, "times": one.times, "port": one.port}
                for one in self.faults.armed
            ],
        }

    def require(self, operation: str, *states: str) -> None:
        """Raise PlayedError unless the VMM has ``operation`` and the state is one of ``states``."""
        name = self.personality.name
        if operation not in self.personality.operations:
            raise PlayedError(f"{name} has no {operation} with an effect on vSockets")
        if states and self.state not in states:
            expected = " or ".join(states)
            raise PlayedError(
                f"cannot {operation} machine {self.cid}: it is {self.state} (expected {expected})"
            )

    def arm(self, fault: Fault) -> None:
        """Have ``fault`` strike the next connections.

        Raises PlayedError if no device is in the middle of the connections.
        """
        if self.device is None:
            raise PlayedError(f"{self.personality.name}: faults need a machine with hybrid vsock")
        self.faults.armed.append(fault)

    # Life

    def pause(self) -> None:
        """Stop the machine's processors: data and connects wait in the device."""
        self.require("pause", "running")
        assert self.device is not None
        self._paused_after = len(self._snapshots)
        self.device.running.clear()
        self._set("paused")

    def resume(self) -> None:
        """Continue after a pause."""
        self.require("resume", "paused")
        assert self.device is not None
        self._set("running")
        if self.personality.deaf_after_pause and len(self._snapshots) == self._paused_after:
            self.device.hears.clear()
            self.note("no byte of the host reaches the guest any longer")
        self.device.running.set()

    def snapshot(self) -> int:
        """Save the machine; return the snapshot's number.

        Where the VMM resets the guest's transport with a snapshot, the source notices, too.
        """
        self.require("snapshot", "running", "paused")
        number = len(self._snapshots) + 1
        device = self.device
        self._snapshots[number] = Snapshot(number, 0 if device is None else device.port)
        effect = self.personality.snapshot
        if device is not None and effect is not Effect.KEPT:
            for connection in list(device.connections):
                connection.reset_guest(effect)
        self.note(f"snapshot {number}: connections of the source: {effect.value}")
        return number

    def restore(self, number: int | None = None, asleep: float = 0.0) -> None:
        """Replace the VMM's process by one that loads a snapshot, by default the last one.

        The guest's memory is not rolled back: its programs go on, with their listeners; only their
        connections are hit.  Unless the VMM advances the guest's clock, that is ``asleep`` seconds
        behind the host's afterwards, in addition to earlier ones.

        Raises ValueError if ``asleep`` is negative or more than a hundred years.
        """
        self.require("restore")
        if not 0 <= asleep <= PLAYED_ASLEEP_SECONDS_MAX:
            highest = f"{PLAYED_ASLEEP_SECONDS_MAX:.0f}"
            raise ValueError(f"invalid seconds: {asleep} (expected 0 to {highest})")
        if not self._snapshots:
            raise PlayedError(f"machine {self.cid} has no snapshot (expected one before restore)")
        number = max(self._snapshots) if number is None else number
        if number not in self._snapshots:
            raise PlayedError(f"machine {self.cid} has no snapshot {number}")
        self._restart(self._snapshots[number])
        effect = self.personality.restore
        self.note(f"restored from snapshot {number}: the guest's connections: {effect.value}")
        if asleep and not self.personality.advances_clock:
            self.asleep += asleep
            self.note(f"the guest's clock is {self.asleep:g} s behind")
        self.begin_generation()

    def begin_generation(self) -> None:
        """Report to the guest's programs that their machine is a restored one."""
        if self.vmclock is not None:
            self.vmclock.disrupt(next(self._generations))

    def _restart(self, snapshot: Snapshot) -> None:
        device, effect = self.device, self.personality.restore
        if device is None:
            if self.state == "killed":
                self._control.resume(self.cid)
            self._control.migrate(self.cid)
        else:
            device.stop()
            for connection in list(device.connections):
                connection.cut_guest(effect)
            device.remove_file()
            remembers = self.personality.remembers_ports
            device.port = snapshot.port if remembers else FIRST_HOST_PORT - 1
            self._open(device)
        self._set("running")

    def kill(self) -> None:
        """End the VMM's process: the host's ends close, and the unix socket's file stays."""
        self.require("kill", "running", "paused")
        device = self.device
        if device is None:
            self._control.suspend(self.cid)
        else:
            device.stop()
            for connection in list(device.connections):
                connection.cut_guest(Effect.SILENT)
        self._set("killed")

    def reboot(self) -> None:
        """Start the guest again: its programs lose every socket, listeners included."""
        self.require("reboot")
        self._start_again()
        self._set("running")

    def replace(self) -> None:
        """End the machine and start another one, with the same CID and unix socket."""
        self.require("replace")
        self._snapshots.clear()
        self.faults.armed.clear()
        self._start_again()
        self.state = "running"
        self.note("replaced by another machine with the same CID")

    def _start_again(self) -> None:
        device = self.device
        if device is not None:
            device.stop()
            for connection in list(device.connections):
                connection.end()
            device.remove_file()
            device.port = FIRST_HOST_PORT - 1
        self.asleep = 0.0
        self._control.power_off(self.cid)
        self._control.power_on(self.cid)
        if device is not None:
            self._open(device)

    def _open(self, device: Device) -> None:
        """Start the VMM's process.  If its unix socket cannot be created, the process has ended."""
        device.running.set()
        device.hears.set()
        try:
            device.open()
        except OSError:
            self._set("killed")
            raise

    def close(self) -> None:
        """End the machine."""
        if self.device is not None:
            self.device.close()
        if self.vmclock is not None:
            self.vmclock.close()

    def _set(self, state: str) -> None:
        self.state = state
        self.note(state)


class Hypervisor:
    """All played machines of one fabric."""

    def __init__(self, folder: Path) -> None:
        """Play machines in the fabric whose state folder is ``folder``."""
        self._control = Control(folder)
        self._folder = folder
        self.machines: dict[int, Machine] = {}
        self.log: list[str] = []  #: what has happened, oldest first
        self._holders: dict[int, int] = {}
        self._generations = itertools.count(1)  # of restored machines and of clones

    def _note(self, line: str) -> None:
        self.log.append(line)
        del self.log[:-PLAYED_LOG_LINES_MAX]

    def find(self, cid: int) -> Machine:
        """Return the machine with the CID ``cid``.

        Raises PlayedError if it does not exist.
        """
        machine = self.machines.get(cid)
        if machine is None:
            raise PlayedError(f"no played machine has CID {cid}")
        return machine

    def add(
        self, personality: Personality, cid: int | None = None, path: Path | None = None
    ) -> Machine:
        """Add a guest and play a machine for it, by default with an unused CID and path.

        Raises OSError if the guest or the unix socket cannot be created, PlayedError if a value
        does not apply to the VMM.
        """
        hybrid = personality.transport is Transport.HYBRID
        if path is not None and not hybrid:
            raise PlayedError(f"{personality.name} has no unix socket (expected no path)")
        cid = self._add_guest(personality, cid)
        try:
            if hybrid and path is None:
                path = self._unused_path(cid)
                path.parent.mkdir(mode=0o700, exist_ok=True)
            machine = self._machine(personality, cid, path)
        except BaseException:
            self._control.remove_context(cid)
            raise
        self.machines[cid] = machine
        return machine

    def _unused_path(self, cid: int) -> Path:
        """Return a path that no machine has: one that has another CID now has kept its own."""
        devices = [machine.device for machine in self.machines.values()]
        used = {device.path for device in devices if device is not None}
        names = (f"machine-{cid}{suffix}" for suffix in ("", *map("-{}".format, range(len(used)))))
        paths = (self._folder.parent / name / "v.sock" for name in names)
        return next(path for path in paths if path not in used)

    def _add_guest(self, personality: Personality, cid: int | None) -> int:
        used = {row["cid"] for row in self._control.contexts()}
        if personality.host_cid == NITRO_PARENT_CID and NITRO_PARENT_CID not in used:
            self._control.add_context(NITRO_PARENT_CID, "parent", reserved_ports=True)
        parent = personality.host_cid if personality.host_cid != VMADDR_CID_HOST else None
        if cid is None:
            cid = next(one for one in range(personality.guest_cid, 1 << 31) if one not in used)
        elif parent is not None and cid <= parent:
            raise PlayedError(f"CID {cid} is the parent's or reserved (expected 4 or more)")
        name = f"{personality.name}-{cid}"
        self._control.add_context(
            *(cid, name),
            reserved_ports=True,
            parent=parent,
            reported_cid=personality.reported_cid,
        )
        return cid

    def clone(self, cid: int, count: int) -> list[Machine]:
        """Return ``count`` new machines from the snapshot of a machine, each with its own path.

        Their guests have no program yet: memory is not copied.
        """
        source = self.find(cid)
        source.require("clone")
        if not source.describe()["snapshots"]:
            raise PlayedError(f"machine {cid} has no snapshot (expected one before clone)")
        clones: list[Machine] = []
        try:
            for _ in range(count):
                clones.append(self.add(source.personality))
                clones[-1].begin_generation()
        except BaseException:
            for clone in clones:
                self.remove(clone.cid)
            raise
        source.note(f"cloned: machines {', '.join(str(clone.cid) for clone in clones)}")
        return clones

    def change_cid(self, cid: int, new: int) -> Machine:
        """Boot a machine again with the CID ``new``; its guest's programs have to be started again.

        Raises OSError if the CID is in use, or if the unix socket cannot be created again: then the
        machine has ended.
        """
        machine = self.find(cid)
        machine.require("change-cid")
        path = None if machine.device is None else machine.device.path
        changed = self._add_guest(machine.personality, new)
        self.remove(cid)
        try:
            self.machines[changed] = self._machine(machine.personality, changed, path)
        except BaseException:
            self._control.remove_context(changed)
            raise
        self.machines[changed].note(f"was machine {cid}")
        return self.machines[changed]

    def _machine(self, personality: Personality, cid: int, path: Path | None) -> Machine:
        return Machine(
            personality=personality,
            control=self._control,
            cid=cid,
            path=path,
            log=self._note,
            holders=self._holders,
            generations=self._generations,
        )

    def remove(self, cid: int) -> None:
        """End a machine and remove its guest."""
        machine = self.find(cid)
        machine.close()
        del self.machines[cid]
        with contextlib.suppress(OSError):  # off already
            self._control.power_off(cid)
        self._control.remove_context(cid)

    def close(self) -> None:
        """End all machines; their guests stay until the fabric ends."""
        for machine in self.machines.values():
            machine.close()
        self._control.close()
