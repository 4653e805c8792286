"""``vsock metrics``: vsockd's counters in Prometheus's text format, version 0.0.4."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ..model.text import printable
from .connect import administrator
from .groups import command
from .limits import METRICS_CONTEXTS_MAX
from .options import address_option, require_private
from .output import notice

if TYPE_CHECKING:
    from .http_server import Handler, Request, Response

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

#: Metrics of each context: the key in a row of :meth:`vsockets.control.Control.counts`, the
#: metric's name, its type and its help.
_OF_CONTEXTS = (
    ("sockets", "vsock_sockets", "gauge", "Ports held by sockets of the context."),
    ("streams", "vsock_streams", "gauge", "Streams with an end in the context."),
    ("connects", "vsock_connects_total", "counter", "Streams that the context connected."),
    ("accepts", "vsock_accepts_total", "counter", "Streams that were connected to the context."),
    ("refusals", "vsock_refusals_total", "counter", "Requests that failed, denials included."),
)

#: Metrics, as in _OF_CONTEXTS, of contexts whose device counts bytes; other contexts lack them.
_OF_DEVICES = (
    ("bytes_sent", "vsock_sent_bytes_total", "Bytes of streams from the guest."),
    ("bytes_received", "vsock_received_bytes_total", "Bytes of streams to the guest."),
)

#: Metrics of vsockd: the key in :meth:`vsockets.control.Control.status`, then name, type and help.
_OF_VSOCKD = (
    ("uptime", "vsockd_uptime_seconds", "gauge", "Time since vsockd was started."),
    ("contexts", "vsockd_contexts", "gauge", "Contexts, the host included."),
    ("streams", "vsockd_streams", "gauge", "Established streams."),
    ("listeners", "vsockd_listeners", "gauge", "Listening sockets."),
    ("datagram_sockets", "vsockd_datagram_sockets", "gauge", "Datagram sockets."),
    ("descriptors", "vsockd_descriptors", "gauge", "File descriptors that vsockd has open."),
)

_Labels = Mapping[str, object]


@command("metrics")
@address_option(
    "--listen",
    help="Serve the metrics over HTTP at /metrics until Ctrl-C: unix:PATH or tcp:127.0.0.1:PORT. "
    "Default: print them once.",
)
def metrics(listen: Any) -> None:
    """Print or serve vsockd's counters in Prometheus's text format."""
    if listen is None:
        print(_read(), end="")
        return
    require_private(listen)
    from .http_server import serve

    def prepare(where: str) -> Handler:
        notice(f"serving /metrics at {str(listen).partition(':')[0]}:{where}")
        return _answer

    serve(listen, prepare)


def _read() -> str:
    with administrator() as control:
        return exposition(control.status(), control.counts())


async def _answer(request: Request) -> Response:
    import asyncio

    from .http_server import Response, text

    if request.path != "/metrics":
        return text(404, "not found (expected /metrics)")
    if request.method != "GET":
        return text(405, "method not allowed (use GET)")
    try:
        body = await asyncio.to_thread(_read)
    except OSError as error:
        return text(503, error.strerror or str(error))
    return Response(200, CONTENT_TYPE, body.encode())


def exposition(status: Mapping[str, Any], counts: Mapping[str, Any]) -> str:
    """Return the metrics as text.

    A guest that is started and removed again causes no time series of its own: all contexts that
    last as long as a lease are counted together as ``context="leased"``, those that have ended
    included.  Of the other contexts the first METRICS_CONTEXTS_MAX have metrics of their own;
    ``vsock_contexts_left_out`` counts the rest.
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
    shown.append(({"context": "leased", "name": ""}, _sum([*leased, counts["departed"]])))
    for key, name, kind, text in _OF_CONTEXTS:
        lines += _family(name, kind, text, [(labels, row.get(key, 0)) for labels, row in shown])
    for key, name, text in _OF_DEVICES:
        known = [(labels, row[key]) for labels, row in shown if row.get(key) is not None]
        lines += _family(name, "counter", text, known)
    denials = [
        ({**labels, "rule": rule}, number)
        for labels, row in shown
        for rule, number in row["denials"].items()
    ]
    lines += _family("vsock_denials_total", "counter", "Requests that a rule denied.", denials)
    left_out = len(lasting) - len(lasting[:METRICS_CONTEXTS_MAX])
    text = "Contexts without metrics of their own."
    lines += _family("vsock_contexts_left_out", "gauge", text, [({}, left_out)])
    return "".join(f"{line}\n" for line in lines)


def _sum(rows: list[dict[str, Any]]) -> dict[str, Any]:
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
        inside = ",".join(f'{key}="{_escape(str(label))}"' for key, label in labels.items())
        yield f"{name}{{{inside}}} {value}" if inside else f"{name} {value}"


def _escape(text: str) -> str:
    return printable(text).replace("\\", "\\\\").replace('"', '\\"')
