"""Names to addresses, without holding up the loop.

Every connection looks its target's name up again, so a target that moves is found.
``getaddrinfo`` blocks, for as long as name servers please, so it runs in threads: a bounded number
of them, of which each party has a share, and one for all of a party that ask for the same name at
the same time.  They are daemons, so that a name server that does not answer cannot hold up the
program's end either.
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

#: Family and address, as connect() takes it.
Found = tuple[int, tuple[Any, ...]]


class Resolver:
    """Looks names up, in the running asyncio loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._threads = asyncio.Semaphore(FORWARD_LOOKUPS_MAX)
        #: threads of each party that looks names up now
        self._shares: WeakValueDictionary[Hashable, asyncio.Semaphore] = WeakValueDictionary()
        self._lookups: dict[Hashable, asyncio.Task[list[Found]]] = {}

    async def resolve(self, host: str, port: int, kind: int, party: Hashable = None) -> list[Found]:
        """Return the addresses of ``host``, at least one.

        ``party`` is the client for which it is looked up: no party waits for another's names.
        Raises OSError (socket.gaierror).
        """
        with contextlib.suppress(OSError):  # an address needs no name server
            return _resolve(host, port, kind, socket.AI_NUMERICHOST)
        key = host, port, kind, party
        task = self._lookups.get(key)
        if task is None:
            task = self._lookups[key] = self._loop.create_task(self._look_up(*key))
            task.add_done_callback(lambda done: self._forget(key, done))
        # A caller that gives up leaves the lookup to the others.
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
        with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
            self._loop.call_soon_threadsafe(call, value)

    def _forget(self, key: Hashable, done: asyncio.Task[list[Found]]) -> None:
        del self._lookups[key]
        if not done.cancelled():
            done.exception()  # all callers may have given up


def _resolve(host: str, port: int, kind: int, flags: int) -> list[Found]:
    try:
        found = socket.getaddrinfo(host, port, type=kind, flags=flags)
    except UnicodeError as error:  # of the idna codec: a label that is empty or too long
        raise OSError(f"{host!r}: invalid host name: {error}") from None
    return [(family, address) for family, _, _, _, address in found]
