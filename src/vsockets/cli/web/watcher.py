"""Looking at vsockd for as many pages as there are: once for all, and only while one is open."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import Any

from ...control import Control
from ...model.text import all_printable
from ..connect import administrator
from ..limits import WEB_EVENTS_MAX
from ..rates import Rates
from ..socket_owners import Holders
from ..unix_diag import fill_queues
from .snapshot import picture

#: How soon to look again for a vsockd that has gone, in seconds.
_LOOK_AGAIN = 1.0


class Watcher:
    """How things are, and what has happened lately."""

    def __init__(self, interval: float) -> None:
        """Look every ``interval`` seconds."""
        self._interval = interval
        self._control: Control | None = None
        self._rates = Rates()
        self._news = asyncio.Condition()
        self._number = 0  #: of pictures
        self._picture: dict[str, Any] = {}
        self._events: deque[tuple[int, dict[str, Any]]] = deque(maxlen=WEB_EVENTS_MAX)
        self._happened = 0  #: events so far
        self._watchers = 0
        self._wanted = asyncio.Event()  #: set while there are watchers

    # For pages

    async def messages(self, after: int | None) -> AsyncIterator[bytes]:
        """Server-sent events, from now on: ``picture``, and ``happened`` with its number as id.

        ``after`` is the last id that a page which comes back has seen.  A page that reads slowly
        misses pictures, and then events: their ids tell.
        """
        seen, drawn = after or 0, -1
        if seen > self._happened:
            seen = 0  # it has seen another vsock web
        with self._watched():
            while True:
                async with self._news:
                    while self._number == drawn and self._happened == seen:
                        await self._news.wait()
                    events = [event for event in self._events if event[0] > seen]
                    seen = self._happened
                    news = self._picture if self._number != drawn else None
                    drawn = self._number
                for number, event in events:
                    yield _message("happened", event, number)
                if news:
                    yield _message("picture", news)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        self._watchers += 1
        self._wanted.set()
        try:
            yield
        finally:
            self._watchers -= 1
            if not self._watchers:
                self._wanted.clear()
                self._picture = {}  # it will be out of date

    # From vsockd

    async def run(self) -> None:
        """Until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow())
            group.create_task(self._look_now_and_then())

    async def _look_now_and_then(self) -> None:
        while True:
            await self._wanted.wait()
            try:
                seen = await asyncio.to_thread(self._look)
            except OSError as error:
                self._forget()
                seen = {"gone": error.strerror or str(error)}
            async with self._news:
                self._picture = seen
                self._number += 1
                self._news.notify_all()
            await asyncio.sleep(self._interval)

    def _look(self) -> dict[str, Any]:
        if self._control is None:
            self._control = administrator()
        control = self._control
        counts, sockets = control.counts(), control.sockets()
        fill_queues(sockets)
        rates = self._rates.update(counts, time.monotonic())
        find = Holders().find
        return picture(control.status(), counts, control.contexts(), sockets, rates, find)

    def _forget(self) -> None:
        if self._control is not None:
            self._control.close()
        self._control, self._rates = None, Rates()

    async def _follow(self) -> None:
        ended = False
        while True:
            with contextlib.suppress(OSError):
                control = await asyncio.to_thread(administrator)
                with control, await asyncio.to_thread(control.events) as events:
                    if ended:
                        await self._tell(_about_vsockd("vsockd is back"))
                    async for event in events:
                        await self._tell(event)
                ended = True
                await self._tell(_about_vsockd("vsockd has ended"))
            await asyncio.sleep(_LOOK_AGAIN)

    async def _tell(self, event: dict[str, Any]) -> None:
        async with self._news:
            self._happened += 1
            self._events.append((self._happened, event))
            self._news.notify_all()


def _about_vsockd(message: str) -> dict[str, Any]:
    return {"topic": "vsockd", "time": time.time(), "message": message}


def _message(kind: str, data: dict[str, Any], number: int | None = None) -> bytes:
    name = "" if number is None else f"id: {number}\n"
    return f"event: {kind}\n{name}data: {json.dumps(all_printable(data))}\n\n".encode()
