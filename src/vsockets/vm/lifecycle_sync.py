"""A QEMU and its guest's context, each following what becomes of the other."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable

from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError

from ..control import Control, Events
from .life_cycle import Act, LifeCycle

_HEARD = ("STOP", "RESUME", "RESET", "MIGRATION", "SHUTDOWN")


class LifecycleSync:
    """Does what :class:`LifeCycle` decides."""

    def __init__(
        self, qmp: QMPClient, control: Control, cid: int, tell: Callable[[str], None]
    ) -> None:
        """``tell`` gets lines for people."""
        self.end = ""  #: why QEMU ends, in its monitor's words
        self._qmp = qmp
        self._control = control
        self._cid = cid
        self._tell = tell
        self._acts: asyncio.Queue[Act] = asyncio.Queue()

    async def run(self) -> None:
        """Start the guest, unless its context is suspended; then follow until cancelled.

        Returns when vsockd or QEMU has ended.
        """
        with (
            self._control.events("context") as events,
            self._qmp.listener(_HEARD) as listener,
        ):
            (context,) = [one for one in self._control.contexts() if one["cid"] == self._cid]
            runs = context["state"] == "running"
            if not runs:
                self._tell(f"context {self._cid} is suspended, and the machine waits for it")
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
                    self._tell("its context was powered off, and so is the machine")
                self._do(acts)
        self._tell("vsockd has ended: the guest goes on, and reaches nobody")
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
                # Somebody else was quicker, and the event of that is the one we wait for; or
                # vsockd has gone.
                pass
            except QMPError:  # QEMU has ended
                return
            self._life.did(act, done)
