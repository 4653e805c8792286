"""Reports and charts of ``vsock perf run``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..extras import how_to_install
from ..perf.measures import Result
from .errors import CliError
from .output import Column, print_table


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
