"""Name resolution that does not block the asyncio loop.

Each connection looks up its target's name again, so that a target that moves is found.
``getaddrinfo`` blocks until name servers answer, so it runs in threads.  Their number is bounded,
in total and for each party, and simultaneous lookups of one name for one party share a thread.
The threads are daemons, so that a silent name server does not delay the program's end.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Hashable
from typing import Any
from weakref import WeakValueDictionary

from .limits import FORWARD_LOOKUPS_MAX, FORWARD_PARTY_LOOKUPS_MAX

#: Family and address of a host, the latter as connect() expects it.
Found = tuple[int, tuple[Any, ...]]


class Resolver:
    """A resolver for the running asyncio loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._threads = asyncio.Semaphore(FORWARD_LOOKUPS_MAX)
        #: the threads of each party with lookups in progress
        self._shares: WeakValueDictionary[Hashable, asyncio.Semaphore] = WeakValueDictionary()
        self._lookups: dict[Hashable, asyncio.Task[list[Found]]] = {}

    async def resolve(self, host: str, port: int, kind: int, party: Hashable = None) -> list[Found]:
        """Return the addresses of ``host`` with ``port``, at least one.

        ``kind`` is the socket type.  ``party`` identifies the client for which the name is looked
        up: the lookups of one party do not delay those of another.

        Raises OSError (socket.gaierror).
        """
        with contextlib.suppress(OSError):  # a literal address needs no name server
            return _resolve(host, port, kind, socket.AI_NUMERICHOST)
        key = host, port, kind, party
        task = self._lookups.get(key)
        if task is None:
            task = self._lookups[key] = self._loop.create_task(self._look_up(*key))
            task.add_done_callback(lambda done: self._forget(key, done))
        # shield(): a cancelled caller leaves the lookup to the others.
        return await asyncio.shield(task)

    async def _look_up(self, host: str, port: int, kind: int, party: Hashable) -> list[Found]:
        share = self._shares.get(party)
        if share is None:
            share = self._shares[party] = asyncio.Semaphore(FORWARD_PARTY_LOOKUPS_MAX)
        async with share, self._threads:
            answer: asyncio.Future[list[Found]] = self._loop.create_future()

            def look_up() -> None:
                try:
                    found = _resolve(host, port, kind, 0)
                except Exception as error:
                    self._answer(answer.set_exception, error)
                else:
                    self._answer(answer.set_result, found)

            threading.Thread(target=look_up, name=f"resolve {host}", daemon=True).start()
            return await answer

    def _answer(self, call: Any, value: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(call, value)

    def _forget(self, key: Hashable, done: asyncio.Task[list[Found]]) -> None:
        del self._lookups[key]
        if not done.cancelled():
            done.exception()  # retrieved here, in case all callers were cancelled


def _resolve(host: str, port: int, kind: int, flags: int) -> list[Found]:
    try:
        found = socket.getaddrinfo(host, port, type=kind, flags=flags)
    except UnicodeError as error:  # the idna codec's, for a label that is empty or too long
        raise OSError(f"{host!r}: invalid host name: {error}") from None
    return [(family, address) for family, _, _, _, address in found]
