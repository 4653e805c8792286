"""``vsock perf``: what streams and datagrams do, over several addresses side by side."""

from __future__ import annotations

import contextlib
import errno
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .. import logs
from ..model.locator import Locator, Vsock, parse_locator
from ..perf.limits import PERF_MESSAGE_MAX_BYTES, PERF_RUN_MAX_SECONDS
from .connect import lasting_context, own_context
from .errors import CONNECT, CliError, cli_error
from .options import JsonOption, LogFormat
from .output import notice, print_json

if TYPE_CHECKING:
    # What is imported in functions below takes longer than the other commands do.
    from ..perf.measures import PerfClient, Result
    from .perf_report import Measurement

app = typer.Typer(help="Measure streams and datagrams, side by side.", rich_markup_mode=None)


class Test(StrEnum):
    """What can be measured; the last two are for datagram addresses."""

    SEND = "send"
    RECEIVE = "receive"
    ROUND_TRIP = "round-trip"
    CONNECTS = "connects"
    DATAGRAMS = "datagrams"
    DATAGRAM_ROUND_TRIP = "datagram-round-trip"


def _method(test: Test) -> tuple[Callable[[PerfClient, float, int], Result], bool, bool]:
    """How it is done, whether with datagrams, and whether its messages are the small ones."""
    from ..perf.measures import PerfClient

    methods: dict[Test, tuple[Callable[[PerfClient, float, int], Result], bool, bool]] = {
        Test.SEND: (PerfClient.send, False, False),
        Test.RECEIVE: (PerfClient.receive, False, False),
        Test.ROUND_TRIP: (PerfClient.round_trip, False, True),
        Test.CONNECTS: (PerfClient.connects, False, True),
        Test.DATAGRAMS: (PerfClient.datagrams, True, True),
        Test.DATAGRAM_ROUND_TRIP: (PerfClient.datagram_round_trip, True, True),
    }
    return methods[test]


_NOBODY = "nobody listens there, or no longer; start vsock perf serve there"
_MEANINGS = {
    **CONNECT,
    errno.ECONNRESET: _NOBODY,
    errno.ECONNREFUSED: _NOBODY,
    errno.ETIMEDOUT: "the server does not answer",
}

#: What is compared when nobody says what; {} is a temporary folder.
_HERE = (
    *("vsock::any", "unix:{}/stream", "tcp:127.0.0.1:0"),
    *("vsock-dgram::any", "unix-dgram:{}/datagram", "udp:127.0.0.1:0"),
)


def _locator(text: str) -> Locator:
    try:
        return parse_locator(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


Addresses = Annotated[
    list[Any] | None, typer.Argument(parser=_locator, metavar="[ADDRESS]...", show_default=False)
]


@app.command("serve")
def serve(addresses: Addresses = None) -> None:
    """Serve measurements on every ADDRESS, by default vsock::5201 and vsock-dgram::5201."""
    from ..perf.server import PerfServer

    logs.configure("vsock: %(message)s", logs.NOTICE, LogFormat.TEXT.value)
    wanted = addresses or [_locator("vsock::5201"), _locator("vsock-dgram::5201")]
    try:
        server = PerfServer(wanted, lasting_context(any(isinstance(one, Vsock) for one in wanted)))
    except OSError as error:
        raise CliError(f"cannot listen: {error.strerror}") from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for locator, listener in zip(wanted, server.listeners, strict=True):
            notice(f"listening on {str(locator).partition(':')[0]}:{listener.where}")
        while True:
            signal.pause()
    finally:
        server.close()


@app.command("run")
def run(
    addresses: Addresses = None,
    test: Annotated[list[Test] | None, typer.Option(help="Only this; can be repeated.")] = None,
    seconds: Annotated[
        float,
        typer.Option(
            "--time", metavar="SECONDS", min=0.01, max=PERF_RUN_MAX_SECONDS, help="Of each one."
        ),
    ] = 1.0,
    rounds: Annotated[
        int, typer.Option(metavar="N", min=1, help="The addresses take turns; the median counts.")
    ] = 3,
    size: Annotated[
        int,
        typer.Option(
            metavar="BYTES", min=1, max=PERF_MESSAGE_MAX_BYTES, help="Of one write, for throughput."
        ),
    ] = 65_536,
    message: Annotated[
        int,
        typer.Option(metavar="BYTES", min=1, max=65_507, help="Of a message, for everything else."),
    ] = 64,
    as_json: JsonOption = False,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also draw it, as .png or .svg (needs matplotlib)."),
    ] = None,
) -> None:
    """Measure every ADDRESS, at which vsock perf serve runs, and compare them with the first.

    Without an ADDRESS: vSockets, unix sockets and TCP within this machine.
    """
    from .perf_report import print_report, save_plot

    with contextlib.ExitStack() as stack:
        locators = addresses or stack.enter_context(_served_here())
        measurements = []
        for one in test or list(Test):
            measure, datagrams, small = _method(one)
            chosen = [locator for locator in locators if locator.datagram == datagrams]
            if chosen:
                measurements.append(
                    _take_turns(measure, chosen, rounds, seconds, message if small else size)
                )
    if not measurements:
        raise typer.BadParameter("no --test is about such an ADDRESS")
    if as_json:
        print_json([measurement.as_json() for measurement in measurements])
    else:
        print_report(measurements)
    if plot is not None:
        save_plot(measurements, plot)


def _take_turns(
    measure: Callable[[PerfClient, float, int], Result],
    locators: list[Locator],
    rounds: int,
    seconds: float,
    size: int,
) -> Measurement:
    from ..perf.measures import PerfClient
    from ..perf.protocol import PerfProtocolError
    from .perf_report import Measurement

    context = own_context()
    results: dict[str, list[Result]] = {str(locator): [] for locator in locators}
    for _ in range(rounds):
        for locator in locators:
            try:
                result = measure(PerfClient(locator, context), seconds, size)
            except OSError as error:
                raise cli_error(f"measure {locator}", error, _MEANINGS) from None
            except PerfProtocolError as error:
                raise CliError(f"measure {locator}: {error}") from None
            results[str(locator)].append(result)
    return Measurement(
        size,
        {
            address: sorted(series, key=lambda result: result.value)[(len(series) - 1) // 2]
            for address, series in results.items()
        },
    )


@contextlib.contextmanager
def _served_here() -> Iterator[list[Locator]]:
    """A server in a process of its own; where it listens."""
    with tempfile.TemporaryDirectory(prefix="vsock-", dir="/tmp") as folder:
        process = subprocess.Popen(
            [sys.executable, "-m", "vsockets.cli", "perf", "serve"]
            + [address.format(folder) for address in _HERE],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        try:
            lines = [process.stderr.readline().strip() for _ in _HERE]
            if not lines[-1]:
                raise CliError(lines[0].removeprefix("vsock: ") or "the server did not start")
            yield [parse_locator(line.rpartition(" ")[2]) for line in lines]
        finally:
            process.terminate()
            process.wait()
            process.stderr.close()
