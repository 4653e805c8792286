"""The forwards of a process: start, change and drain them."""

from __future__ import annotations

import asyncio
import contextlib
import socket as stdlib
from collections.abc import Awaitable, Callable, Iterable

from .._linux.process import allow_many_descriptors
from ..attachment import ContextHandle
from ..capture import Recorder
from ..eventloop.asyncio_server import Listener, open_listener
from ..eventloop.service import run_service, wait_first
from ..model.locator import Exec, Inherited, Locator, Stdio
from .byte_reports import ByteReports
from .client import log
from .datagram_forward import DatagramForward
from .dialer import Dialer
from .pump import AsyncioSplicePump, PumpSelector
from .settings import Settings
from .stream_forward import StreamForward

Forward = StreamForward | DatagramForward


class ForwardService:
    """The running forwards of a process, by their source; created in a running asyncio loop."""

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
        self._byte_reports = ByteReports(context)
        self._forwards: dict[Locator, Forward] = {}
        self._draining: set[Forward] = set()  # without a listener, with connections

    @property
    def addresses(self) -> dict[Locator, str]:
        """The listening address of each forward, wildcards resolved, by the forward's source."""
        return {
            source: forward.listener.where
            for source, forward in self._forwards.items()
            if forward.listener is not None and forward.listener.sockets
        }

    @property
    def is_replaceable(self) -> bool:
        """True if another process can take over the listeners: none is for a single connection."""
        return not any(forward.settings.once for forward in self._forwards.values())

    def apply(self, wanted: Iterable[Settings]) -> None:
        """Replace the forwards by ``wanted``; established connections are kept.

        Raises OSError, with nothing changed, when a new forward cannot listen.
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
            self._stop_listening(self._forwards.pop(source))
        self._forwards |= started
        for source, settings in by_source.items():
            self._forwards[source].settings = settings

    async def finished(self) -> None:
        """Wait until every forward has ended; only a forward of a single connection ends.

        Raises the OSError that the last forward failed with.
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
        """Stop listening, and wait at most ``seconds`` for the connections to end."""
        for source in list(self._forwards):
            self._stop_listening(self._forwards.pop(source))
        for forward in list(self._draining):
            forward.stop_listening()
        left = sum(forward.connections for forward in self._draining)
        if left:
            log.warning("draining for %g s: connections left: %d", seconds, left)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                for forward in list(self._draining):
                    await forward.finished()

    def retire(self) -> Awaitable[object]:
        """Stop accepting: another process does.  Return an awaitable of the connections' end."""
        for source in list(self._forwards):
            forward = self._forwards.pop(source)
            forward.retire()
            self._keep_until_finished(forward)
        return asyncio.gather(*(forward.finished() for forward in self._draining))

    def close(self) -> None:
        """Close all forwards and their connections."""
        for forward in [*self._forwards.values(), *self._draining]:
            if forward.connections:
                log.warning("%s: connections closed: %d", forward.settings, forward.connections)
            forward.close()
        self._pump.close()
        self._byte_reports.close()

    def _open(self, settings: Settings) -> Listener:
        listener = open_listener(settings.source, self._context)
        datagram = listener.sockets[0].type == stdlib.SOCK_DGRAM
        if isinstance(settings.source, Inherited) and datagram != settings.target.datagram:
            listener.close()
            raise OSError(0, f"{settings}: cannot join datagrams and a stream")
        return listener

    def _start(self, settings: Settings) -> Forward:
        listener = None if isinstance(settings.source, Stdio | Exec) else self._open(settings)
        if settings.target.datagram:
            assert listener is not None
            try:
                return DatagramForward(
                    settings, listener, self._dialer, self._context, self._open, self._recorder
                )
            except OSError:
                listener.close()
                raise
        return StreamForward(
            *(settings, listener, self._pump, self._byte_reports),
            *(self._dialer, self._open, self._recorder),
        )

    def _stop_listening(self, forward: Forward) -> None:
        forward.stop_listening()
        self._keep_until_finished(forward)

    def _keep_until_finished(self, forward: Forward) -> None:
        if forward.connections:
            self._draining.add(forward)
            waiting = asyncio.ensure_future(forward.finished())
            waiting.add_done_callback(lambda _: self._draining.discard(forward))


def run(
    forwards: list[Settings],
    *,
    drain: float,
    again: Callable[[], list[Settings]] | None = None,
    context: ContextHandle | None = None,
    ready: Callable[[ForwardService], None] = lambda service: None,
    recorder: Recorder | None = None,
) -> None:
    """Serve ``forwards`` until SIGTERM or SIGINT; at SIGHUP replace them by those of ``again()``.

    The first signal closes the listeners and leaves connections ``drain`` seconds to end; a second
    signal closes them.  ``ready`` is called when all forwards listen.  With ``recorder`` the
    traffic is recorded; when recording fails, the service ends with its OSError.

    Raises OSError when a forward cannot listen.
    """
    allow_many_descriptors()
    selector = PumpSelector()

    async def main() -> None:
        service = ForwardService(selector, context, recorder)
        try:
            service.apply(forwards)
            await _serve(service, drain, again or (lambda: forwards), ready, recorder)
        finally:
            service.close()

    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
        runner.run(main())


async def _serve(
    service: ForwardService,
    drain: float,
    again: Callable[[], list[Settings]],
    ready: Callable[[ForwardService], None],
    recorder: Recorder | None,
) -> None:
    loop = asyncio.get_running_loop()
    failed: asyncio.Future[None] = loop.create_future()

    def reload() -> None:
        try:
            service.apply(again())
        except (OSError, ValueError) as error:
            text = error.strerror if isinstance(error, OSError) else None
            log.error("not reloaded: %s", text or error)
        else:
            log.info("reloaded")

    def fail(error: OSError) -> None:
        if not failed.done():
            failed.set_exception(error)

    def on_recorder_failed(error: OSError) -> None:
        # The pump calls this outside of asyncio's callbacks: the loop has to be woken.
        loop.call_soon_threadsafe(fail, error)

    if recorder is not None:
        recorder.failed = on_recorder_failed
    await run_service(
        lambda: ready(service),
        wait_first(service.finished(), failed),
        drain=lambda: service.drain(drain),
        reload=reload,
        retire=service.retire if service.is_replaceable and recorder is None else None,
    )
