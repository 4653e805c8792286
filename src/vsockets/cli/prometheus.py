"""What vsockd has counted as Prometheus reads it: the text exposition format, version 0.0.4."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..model.text import printable
from .limits import METRICS_CONTEXTS_MAX

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

#: What there is of each context: its key in a row of :meth:`vsockets.control.Control.counts`,
#: the metric, its type and what it says.
_OF_CONTEXTS = (
    ("sockets", "vsock_sockets", "gauge", "Ports that sockets of the context hold."),
    ("streams", "vsock_streams", "gauge", "Streams with an end in the context."),
    ("connects", "vsock_connects_total", "counter", "Streams begun in the context."),
    ("accepts", "vsock_accepts_total", "counter", "Streams begun to the context."),
    ("refusals", "vsock_refusals_total", "counter", "Requests that got an errno, denials too."),
)

#: Of vsockd: its key in :meth:`vsockets.control.Control.status`, and so on.
_OF_VSOCKD = (
    ("uptime", "vsockd_uptime_seconds", "gauge", "Since vsockd was started."),
    ("contexts", "vsockd_contexts", "gauge", "Contexts there are, the host among them."),
    ("streams", "vsockd_streams", "gauge", "Streams there are."),
    ("listeners", "vsockd_listeners", "gauge", "Listening sockets."),
    ("datagram_sockets", "vsockd_datagram_sockets", "gauge", "Datagram sockets."),
    ("descriptors", "vsockd_descriptors", "gauge", "Descriptors that vsockd has open."),
)

_Labels = Mapping[str, object]


def exposition(status: Mapping[str, Any], counts: Mapping[str, Any]) -> str:
    """The metrics.

    No guest can make time series by coming and going: contexts that last as long as a lease are
    one together, ``context="leased"``, which counts also those that have ended; of the others the
    first METRICS_CONTEXTS_MAX have metrics of their own, and ``vsock_contexts_left_out`` says how
    many have not.
    """
    lines: list[str] = []
    for key, name, kind, text in _OF_VSOCKD:
        lines += _family(name, kind, text, [({}, status[key])])
    lasting = [row for row in counts["contexts"] if not row["leased"]]
    shown = [
        ({"context": row["cid"], "name": row["name"]}, row)
        for row in lasting[:METRICS_CONTEXTS_MAX]
    ]
    leased = [row for row in counts["contexts"] if row["leased"]]
    shown.append(({"context": "leased", "name": ""}, _together([*leased, counts["departed"]])))
    for key, name, kind, text in _OF_CONTEXTS:
        lines += _family(name, kind, text, [(labels, row.get(key, 0)) for labels, row in shown])
    denials = [
        ({**labels, "rule": rule}, number)
        for labels, row in shown
        for rule, number in row["denials"].items()
    ]
    lines += _family("vsock_denials_total", "counter", "What a rule was against.", denials)
    left_out = len(lasting) - len(lasting[:METRICS_CONTEXTS_MAX])
    text = "Contexts without metrics of their own."
    lines += _family("vsock_contexts_left_out", "gauge", text, [({}, left_out)])
    return "".join(f"{line}\n" for line in lines)


def _together(rows: list[dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {"denials": {}}
    for row in rows:
        for key, *_ in _OF_CONTEXTS:
            total[key] = total.get(key, 0) + row.get(key, 0)
        for rule, number in row["denials"].items():
            total["denials"][rule] = total["denials"].get(rule, 0) + number
    return total


def _family(
    name: str, kind: str, text: str, samples: Iterable[tuple[_Labels, object]]
) -> Iterator[str]:
    yield f"# HELP {name} {text}"
    yield f"# TYPE {name} {kind}"
    for labels, value in samples:
        inside = ",".join(f'{key}="{_escaped(str(label))}"' for key, label in labels.items())
        yield f"{name}{{{inside}}} {value}" if inside else f"{name} {value}"


def _escaped(text: str) -> str:
    return printable(text).replace("\\", "\\\\").replace('"', '\\"')
