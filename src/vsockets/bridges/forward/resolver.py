"""Names to addresses, without holding up the loop.

Every connection looks its target's name up anew, so a target that moves is found.  ``getaddrinfo``
blocks, for as long as name servers please, so it runs in threads: a bounded number of them, one
for all who ask for the same name at the same time.  They are daemons, so that a name server that
does not answer cannot hold up the program's end either.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from typing import Any

from ...limits import FORWARD_LOOKUPS

#: Family and address, as connect() takes it.
Found = tuple[int, tuple[Any, ...]]


class Resolver:
    """Looks names up, in the running asyncio loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._threads = asyncio.Semaphore(FORWARD_LOOKUPS)
        self._lookups: dict[tuple[str, int, int], asyncio.Task[list[Found]]] = {}

    async def resolve(self, host: str, port: int, kind: int) -> list[Found]:
        """The addresses of ``host``, at least one.  Raises OSError (socket.gaierror)."""
        with contextlib.suppress(OSError):  # an address needs no name server
            return _resolve(host, port, kind, socket.AI_NUMERICHOST)
        key = host, port, kind
        task = self._lookups.get(key)
        if task is None:
            task = self._lookups[key] = self._loop.create_task(self._look_up(*key))
            task.add_done_callback(lambda done: self._forget(key, done))
        # Whoever gives up leaves the lookup to the others.
        return await asyncio.shield(task)

    async def _look_up(self, host: str, port: int, kind: int) -> list[Found]:
        async with self._threads:
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

    def _forget(self, key: tuple[str, int, int], done: asyncio.Task[list[Found]]) -> None:
        del self._lookups[key]
        if not done.cancelled():
            done.exception()  # everybody who asked may have given up


def _resolve(host: str, port: int, kind: int, flags: int) -> list[Found]:
    try:
        found = socket.getaddrinfo(host, port, type=kind, flags=flags)
    except UnicodeError as error:  # of the idna codec: a label that is empty or too long
        raise OSError(f"{host!r} is no host's name: {error}") from None
    return [(family, address) for family, _, _, _, address in found]
