"""``vsock perf``: measure streams and datagrams over several addresses."""

from __future__ import annotations

import contextlib
import errno
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..extras import how_to_install
from ..model.locator import Locator, Vsock, parse_locator
from ..perf.limits import PERF_MESSAGE_MAX_BYTES, PERF_RUN_MAX_SECONDS
from .connect import lasting_context, own_context
from .errors import CONNECT, CliError, cli_error
from .groups import group
from .options import (
    argument,
    configure_log,
    count_option,
    json_option,
    members,
    path_option,
    read_locator,
    seconds_option,
)
from .output import Column, notice, print_json, print_table

if TYPE_CHECKING:
    # Imported late, in functions: these take longer than most commands.
    from ..perf.measures import PerfClient, Result


@group("perf")
def perf() -> None:
    """Measure streams and datagrams over several addresses."""


class Test(StrEnum):
    """Names of tests: the last two are for datagram addresses, the others for streams."""

    SEND = "send"
    RECEIVE = "receive"
    ROUND_TRIP = "round-trip"
    CONNECTS = "connects"
    DATAGRAMS = "datagrams"
    DATAGRAM_ROUND_TRIP = "datagram-round-trip"


def _method(test: Test) -> tuple[Callable[[PerfClient, float, int], Result], bool, bool]:
    """Return the test's method, whether it uses datagrams, and whether it uses small messages."""
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


_NO_SERVER = "no server listens there (start: vsock perf serve)"
_MEANINGS = {
    **CONNECT,
    errno.ECONNRESET: _NO_SERVER,
    errno.ECONNREFUSED: _NO_SERVER,
    errno.ETIMEDOUT: "the server does not reply",
}

#: Addresses compared by default; {} is a temporary folder.
_HERE = (
    *("vsock::any", "unix:{}/stream", "tcp:127.0.0.1:0"),
    *("vsock-dgram::any", "unix-dgram:{}/datagram", "udp:127.0.0.1:0"),
)


_addresses_argument = argument(
    "addresses",
    nargs=-1,
    type=read_locator,
    metavar="[ADDRESS]...",
    help="Address of a vsock perf serve: vsock:, vsock-dgram:, unix:, unix-dgram:, tcp: or udp:.",
)


@perf.command("serve")
@_addresses_argument
def serve(addresses: tuple[Locator, ...]) -> None:
    """Serve measurements on every ADDRESS.  Default: vsock::5201 and vsock-dgram::5201."""
    from ..perf.server import PerfServer

    configure_log()
    wanted = [*addresses] or [parse_locator("vsock::5201"), parse_locator("vsock-dgram::5201")]
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


@perf.command("run")
@_addresses_argument
@click.option("--test", **members(Test), multiple=True, help="Run only this test; repeatable.")
@seconds_option(
    "--time",
    "seconds",
    min=0.01,
    max=PERF_RUN_MAX_SECONDS,
    default=1.0,
    help="Duration of each measurement, in seconds.",
)
@count_option(
    "--rounds",
    default=3,
    metavar="N",
    help="Measurements of each address, in turns; the median is reported.",
)
@count_option(
    "--size",
    max=PERF_MESSAGE_MAX_BYTES,
    default=65_536,
    metavar="BYTES",
    help="Size of one write in throughput tests, in bytes.",
)
@count_option(
    "--message",
    max=65_507,
    default=64,
    metavar="BYTES",
    help="Size of a message in all other tests, in bytes.",
)
@json_option
@path_option(
    "--plot", metavar="FILE", help="Also draw a chart to this .png or .svg file (needs matplotlib)."
)
def run(
    addresses: tuple[Locator, ...],
    test: tuple[Test, ...],
    seconds: float,
    rounds: int,
    size: int,
    message: int,
    as_json: bool,
    plot: Path | None,
) -> None:
    """Measure every ADDRESS with its vsock perf serve, and compare them with the first.

    Without an ADDRESS: vSockets, unix sockets and TCP within this machine.
    """

    with contextlib.ExitStack() as stack:
        locators = list(addresses) or stack.enter_context(_served_here())
        measurements = []
        for one in test or list(Test):
            measure, datagrams, small = _method(one)
            chosen = [locator for locator in locators if locator.datagram == datagrams]
            if chosen:
                measurements.append(
                    _take_turns(measure, chosen, rounds, seconds, message if small else size)
                )
    if not measurements:
        raise click.UsageError("--test: not supported by the socket type of any ADDRESS")
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
    """Run a server in a child process during the with block, and yield its addresses."""
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


# The report


@dataclass(frozen=True, slots=True)
class Measurement:
    """The results of one test over several addresses; the first is the baseline."""

    size: int  #: of one write or message, in bytes
    results: dict[str, Result]

    @property
    def first(self) -> Result:
        """The result that the others are compared with."""
        return next(iter(self.results.values()))

    @property
    def title(self) -> str:
        """The test's name, message size and unit."""
        better = "more" if self.first.more_is_better else "less"
        return f"{self.first.name}, {self.size} bytes, {self.first.unit} ({better} is better)"

    def as_json(self) -> dict[str, Any]:
        """Return the results as a JSON value."""
        return {
            "name": self.first.name,
            "size": self.size,
            "unit": self.first.unit,
            "more_is_better": self.first.more_is_better,
            "results": [
                {
                    "address": address,
                    "value": result.value,
                    "ratio": result.value / self.first.value if self.first.value else None,
                    "details": result.details,
                }
                for address, result in self.results.items()
            ],
        }


def print_report(measurements: Sequence[Measurement]) -> None:
    """Print a table with bars for each measurement."""
    for number, measurement in enumerate(measurements):
        if number:
            print()
        print(measurement.title)
        longest = max(result.value for result in measurement.results.values()) or 1.0
        details = [name for name in measurement.first.details if name != "bytes"]
        columns = [
            Column("ADDRESS", least=10),
            Column(measurement.first.unit.upper(), right=True),
            Column("RATIO", right=True),
            Column("", bar=True),
            *(Column(name.upper(), right=True, spare=at) for at, name in enumerate(details, 1)),
        ]
        print_table(
            columns,
            (
                (
                    address,
                    _number(result.value),
                    f"{result.value / (measurement.first.value or 1.0):.2f}",
                    result.value / longest,
                    *(_number(result.details[name]) for name in details),
                )
                for address, result in measurement.results.items()
            ),
        )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 or value == int(value) else f"{value:,.1f}"


def save_plot(measurements: Sequence[Measurement], file: Path) -> None:
    """Draw the bars to ``file``, in the format of its suffix.

    Raises CliError if matplotlib is missing or the file cannot be written.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise CliError(f"--plot needs matplotlib: {how_to_install('plot')}") from None
    figure = Figure(figsize=(8, 1 + 1.3 * len(measurements)), layout="constrained")
    axes = figure.subplots(len(measurements), 1, squeeze=False)[:, 0]
    for axis, measurement in zip(axes, measurements, strict=True):
        addresses = list(measurement.results)
        values = [result.value for result in measurement.results.values()]
        bars = axis.barh(addresses, values, color=[f"C{i}" for i in range(len(values))])
        axis.bar_label(bars, [_number(value) for value in values], padding=3)
        axis.invert_yaxis()  # the first one is at the top
        axis.margins(x=0.15)
        axis.set_title(measurement.title, loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    try:
        figure.savefig(file)
    except (OSError, ValueError) as error:  # ValueError: unsupported format
        raise CliError(f"{file}: {error}") from None
