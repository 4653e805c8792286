"""Keeps QEMU and its guest's context in the same state."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable

from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError

from ..control import Control, Events
from .life_cycle import Act, LifeCycle

_HEARD = ("STOP", "RESUME", "RESET", "MIGRATION", "SHUTDOWN")


class LifecycleSync:
    """The I/O of :class:`LifeCycle`: receives events and carries out requests."""

    def __init__(
        self, qmp: QMPClient, control: Control, cid: int, tell: Callable[[str], None]
    ) -> None:
        """Synchronise context ``cid``; ``tell`` receives lines for the user."""
        self.end = ""  #: the reason that QEMU's monitor gave for its end
        self._qmp = qmp
        self._control = control
        self._cid = cid
        self._tell = tell
        self._acts: asyncio.Queue[Act] = asyncio.Queue()

    async def run(self) -> None:
        """Start the guest, unless its context is suspended; then synchronise until cancelled.

        Returns when vsockd or QEMU has ended.
        """
        with (
            self._control.events("context") as events,
            self._qmp.listener(_HEARD) as listener,
        ):
            (context,) = [one for one in self._control.contexts() if one["cid"] == self._cid]
            runs = context["state"] == "running"
            if not runs:
                self._tell(f"context {self._cid} is suspended: the guest waits for its resume")
            self._life = LifeCycle(runs)
            await self._qmp.execute(
                "migrate-set-capabilities",
                {"capabilities": [{"capability": "events", "state": True}]},
            )
            self._do(self._life.begin())
            tasks = [
                asyncio.create_task(task)
                for task in (self._hear_qemu(listener), self._hear_vsockd(events), self._act())
            ]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await task

    def _do(self, acts: Iterable[Act]) -> None:
        for act in acts:
            self._acts.put_nowait(act)

    async def _hear_qemu(self, listener: EventListener) -> None:
        async for event in listener:
            found = event.get("data")
            data = found if isinstance(found, dict) else {}
            if event["event"] == "SHUTDOWN":
                self.end = str(data.get("reason", ""))
            status = str(data.get("status", ""))
            self._do(self._life.qemu_says(str(event["event"]), status))

    async def _hear_vsockd(self, events: Events) -> None:
        async for event in events:
            if event["cid"] == self._cid:
                acts = self._life.vsockd_says(event["change"])
                if Act.QUIT in acts:
                    self._tell("the context was powered off: ending the machine")
                self._do(acts)
        self._tell("vsockd has ended: the guest keeps running without vSockets")
        await asyncio.Event().wait()

    async def _act(self) -> None:
        while True:
            act = await self._acts.get()
            done = True
            try:
                if act.is_qemus:
                    await self._qmp.execute(act.value)
                else:
                    change = getattr(self._control, act.value)
                    await asyncio.to_thread(change, self._cid)
            except ExecuteError as error:
                self._tell(f"QEMU: {act.value}: {error}")
                done = False
            except OSError:
                # The context is in this state already, and the event of that change is what is
                # awaited; or vsockd has ended.
                pass
            except QMPError:  # QEMU has ended
                return
            self._life.did(act, done)
