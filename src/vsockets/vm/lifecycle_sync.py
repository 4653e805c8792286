"""Synchronisation of QEMU with its guest's context: the I/O for :mod:`.life_cycle`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterable

from qemu.qmp import EventListener, ExecuteError, QMPClient, QMPError

from ..control import Control, Events
from .life_cycle import LifeCycle, LifeCycleAction

_EVENTS = ("STOP", "RESUME", "RESET", "MIGRATION", "SHUTDOWN")


class LifecycleSync:
    """A receiver of QEMU's and vsockd's events that carries out :class:`LifeCycle`'s requests."""

    def __init__(
        self, qmp: QMPClient, control: Control, cid: int, report: Callable[[str], None]
    ) -> None:
        """Synchronise context ``cid``; ``report`` receives lines for the user."""
        self.end_reason = ""  #: the reason that QEMU's monitor gave for its end
        self._qmp = qmp
        self._control = control
        self._cid = cid
        self._report = report
        self._actions: asyncio.Queue[LifeCycleAction] = asyncio.Queue()

    async def run(self) -> None:
        """Start the guest, unless its context is suspended; then synchronise until cancelled.

        Returns when vsockd or QEMU has ended.
        """
        with (
            self._control.events("context") as events,
            self._qmp.listener(_EVENTS) as listener,
        ):
            (context,) = [row for row in self._control.contexts() if row["cid"] == self._cid]
            runs = context["state"] == "running"
            if not runs:
                self._report(f"context {self._cid} is suspended: the guest waits for its resume")
            self._life = LifeCycle(runs)
            await self._qmp.execute(
                "migrate-set-capabilities",
                {"capabilities": [{"capability": "events", "state": True}]},
            )
            self._enqueue(self._life.start())
            tasks = [
                asyncio.create_task(task)
                for task in (
                    self._receive_qemu_events(listener),
                    self._receive_context_events(events),
                    self._carry_out(),
                )
            ]
            try:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in tasks:
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        await task

    def _enqueue(self, actions: Iterable[LifeCycleAction]) -> None:
        for action in actions:
            self._actions.put_nowait(action)

    async def _receive_qemu_events(self, listener: EventListener) -> None:
        async for event in listener:
            found = event.get("data")
            data = found if isinstance(found, dict) else {}
            if event["event"] == "SHUTDOWN":
                self.end_reason = str(data.get("reason", ""))
            status = str(data.get("status", ""))
            self._enqueue(self._life.on_qemu_event(str(event["event"]), status))

    async def _receive_context_events(self, events: Events) -> None:
        async for event in events:
            if event["cid"] == self._cid:
                actions = self._life.on_context_event(event["change"])
                if LifeCycleAction.QUIT in actions:
                    self._report("the context was powered off: ending the machine")
                self._enqueue(actions)
        self._report("vsockd has ended: the guest keeps running without vSockets")
        await asyncio.Event().wait()

    async def _carry_out(self) -> None:
        while True:
            action = await self._actions.get()
            done = True
            try:
                if action.is_for_qemu:
                    await self._qmp.execute(action.value)
                else:
                    change = getattr(self._control, action.value)
                    await asyncio.to_thread(change, self._cid)
            except ExecuteError as error:
                self._report(f"QEMU: {action.value}: {error}")
                done = False
            except OSError:
                # The context is in this state already, and the event of that change is what is
                # awaited; or vsockd has ended.
                pass
            except QMPError:  # QEMU has ended
                return
            self._life.completed(action, done)
