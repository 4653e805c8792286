"""Any number of forwards in one process: started, changed, and brought to an orderly end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket as stdlib
from collections.abc import Callable, Iterable

from .._linux.rlimit import allow_many_descriptors
from ..attachment import ContextHandle
from ..capture.recorder import Recorder
from ..eventloop.listeners import Listener, open_listener
from ..eventloop.tasks import on_signals, wait_first
from ..model.locator import Exec, Inherited, Locator, Stdio
from .datagram_forward import DatagramForward
from .dialer import Dialer
from .pump import AsyncioSplicePump, PumpSelector
from .settings import Settings
from .stream_forward import StreamForward
from .throttled_log import log

Forward = StreamForward | DatagramForward


class Service:
    """Forwards, by where their clients come to; made in a running loop by :func:`run`."""

    def __init__(
        self,
        selector: PumpSelector,
        context: ContextHandle | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self._context = context
        self._recorder = recorder
        self._pump = AsyncioSplicePump(selector)
        self._dialer = Dialer(context)
        self._forwards: dict[Locator, Forward] = {}
        self._leaving: set[Forward] = set()  # doors closed, connections left

    @property
    def doors(self) -> dict[Locator, str]:
        """Where each forward listens, wildcards filled in."""
        return {
            source: forward.door.where
            for source, forward in self._forwards.items()
            if forward.door is not None and forward.door.sockets
        }

    def apply(self, wanted: Iterable[Settings]) -> None:
        """Do what ``wanted`` says from now on; connections that stand are not touched.

        Either all of it or, when it raises OSError, nothing.
        """
        by_source = {settings.source: settings for settings in wanted}
        started: dict[Locator, Forward] = {}
        try:
            for source, settings in by_source.items():
                if source not in self._forwards:
                    started[source] = self._start(settings)
        except OSError:
            for forward in started.values():
                forward.close()
            raise
        for source in self._forwards.keys() - by_source.keys():
            self._close_door(self._forwards.pop(source))
        self._forwards |= started
        for source, settings in by_source.items():
            self._forwards[source].settings = settings

    async def finished(self) -> None:
        """Return when every forward has come to its end: never, unless all serve but once.

        Raises the OSError for which the last one did not serve.
        """
        while self._forwards:
            source, forward = next(iter(self._forwards.items()))
            await forward.finished()
            if self._forwards.get(source) is forward:
                del self._forwards[source]
                if forward.failure is not None:
                    if not self._forwards:
                        raise forward.failure
                    log.error("%s: %s", forward.settings, forward.failure.strerror)

    async def drain(self, seconds: float) -> None:
        """Close the doors, and wait for the connections to end by themselves, but not longer."""
        for source in list(self._forwards):
            self._close_door(self._forwards.pop(source))
        left = sum(forward.connections for forward in self._leaving)
        if left:
            log.warning("connections that may end within %g s: %d", seconds, left)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                for forward in list(self._leaving):
                    await forward.finished()

    def close(self) -> None:
        """End everything now."""
        for forward in [*self._forwards.values(), *self._leaving]:
            if forward.connections:
                log.warning("%s: connections cut: %d", forward.settings, forward.connections)
            forward.close()
        self._pump.close()

    def _open(self, settings: Settings) -> Listener:
        door = open_listener(settings.source, self._context)
        datagram = door.sockets[0].type == stdlib.SOCK_DGRAM
        if isinstance(settings.source, Inherited) and datagram != settings.target.datagram:
            door.close()
            raise OSError(0, f"{settings}: one has datagrams, the other a stream")
        return door

    def _start(self, settings: Settings) -> Forward:
        door = None if isinstance(settings.source, Stdio | Exec) else self._open(settings)
        if settings.target.datagram:
            assert door is not None
            try:
                return DatagramForward(
                    settings, door, self._dialer, self._context, self._open, self._recorder
                )
            except OSError:
                door.close()
                raise
        return StreamForward(settings, door, self._pump, self._dialer, self._open, self._recorder)

    def _close_door(self, forward: Forward) -> None:
        forward.close_door()
        if forward.connections:
            self._leaving.add(forward)
            waiting = asyncio.ensure_future(forward.finished())
            waiting.add_done_callback(lambda _: self._leaving.discard(forward))


def run(
    forwards: list[Settings],
    *,
    drain: float,
    again: Callable[[], list[Settings]] | None = None,
    context: ContextHandle | None = None,
    ready: Callable[[Service], None] = lambda service: None,
    recorder: Recorder | None = None,
) -> None:
    """Serve ``forwards`` until SIGTERM or SIGINT; on SIGHUP what ``again`` says from then on.

    After the first signal the doors are closed and connections have ``drain`` seconds to end;
    the second one ends them.  ``ready`` is called when everybody listens.  With ``recorder``
    what passes is recorded, until it cannot be: then everything ends, with its OSError.

    Raises OSError when that cannot be.
    """
    allow_many_descriptors()
    selector = PumpSelector()

    async def main() -> None:
        service = Service(selector, context, recorder)
        try:
            service.apply(forwards)
            await _serve(service, drain, again or (lambda: forwards), ready, recorder)
        finally:
            service.close()

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        runner.run(main())


async def _serve(
    service: Service,
    drain: float,
    again: Callable[[], list[Settings]],
    ready: Callable[[Service], None],
    recorder: Recorder | None,
) -> None:
    loop = asyncio.get_running_loop()
    stopped, cut = asyncio.Event(), asyncio.Event()
    broken: asyncio.Future[None] = loop.create_future()

    def stop() -> None:
        (cut if stopped.is_set() else stopped).set()

    def reload() -> None:
        try:
            service.apply(again())
        except (OSError, ValueError) as error:
            text = error.strerror if isinstance(error, OSError) else None
            log.error("nothing was changed: %s", text or error)
        else:
            log.info("read again")

    def fail(error: OSError) -> None:
        if not broken.done():
            broken.set_exception(error)

    def cannot_record(error: OSError) -> None:
        # The pump calls this from outside of the loop's callbacks, which are to be woken up.
        loop.call_soon_threadsafe(fail, error)

    if recorder is not None:
        recorder.broken = cannot_record
    on_signals({signal.SIGHUP: reload, signal.SIGTERM: stop, signal.SIGINT: stop})
    ready(service)
    await wait_first(service.finished(), stopped.wait(), broken)
    if stopped.is_set():
        await wait_first(service.drain(drain), cut.wait())
