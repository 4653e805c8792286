"""``vsock metrics``, read as Prometheus reads it."""

from __future__ import annotations

import http.client
import os
import signal
import socket
import stat
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

import vsockets
from vsockets.attachment import Attachment
from vsockets.cli.limits import METRICS_CONTEXTS_MAX
from vsockets.cli.metrics import exposition
from vsockets.control import Control
from vsockets.testing import PrivateFabric

from .vsock import PATIENCE, Vsock

STATUS = dict.fromkeys(
    ("uptime", "contexts", "streams", "listeners", "datagram_sockets", "descriptors"), 1
)


def read(text: str) -> dict[tuple[str, ...], float]:
    """Return every sample, by its name and its labels context and rule."""
    samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = [sample.labels[name] for name in ("context", "rule") if name in sample.labels]
            key = (sample.name, *labels)
            assert key not in samples
            samples[key] = sample.value
    return samples


def row(cid: int, **facts: Any) -> dict[str, Any]:
    numbers = dict.fromkeys(("sockets", "streams", "connects", "accepts", "refusals"), 0)
    return {"cid": cid, "name": f"guest-{cid}", "leased": False, "denials": {}, **numbers, **facts}


DEPARTED = {"connects": 100, "accepts": 0, "refusals": 1, "denials": {"restricted": 1}}


def test_leased_contexts_are_one_also_when_they_have_ended() -> None:
    rows = [
        row(3, connects=1),
        row(4, connects=20, leased=True, denials={"restricted": 4}),
        row(5, connects=3, leased=True),
    ]
    samples = read(exposition(STATUS, {"contexts": rows, "departed": DEPARTED}))
    assert samples["vsock_connects_total", "3"] == 1
    assert samples["vsock_connects_total", "leased"] == 123
    assert samples["vsock_denials_total", "leased", "restricted"] == 5
    assert ("vsock_connects_total", "4") not in samples


def test_contexts_with_metrics_of_their_own_are_limited() -> None:
    rows = [row(cid) for cid in range(3, METRICS_CONTEXTS_MAX + 10)]
    samples = read(exposition(STATUS, {"contexts": rows, "departed": DEPARTED}))
    streams = [key for key in samples if key[0] == "vsock_streams"]
    assert len(streams) == METRICS_CONTEXTS_MAX + 1
    assert samples["vsock_contexts_left_out",] == 7


def test_names_are_escaped() -> None:
    name = 'a "b"\\\n'
    counts = {"contexts": [row(3, name=name)], "departed": DEPARTED}
    (family,) = [
        family
        for family in text_string_to_metric_families(exposition(STATUS, counts))
        if family.name == "vsock_streams"
    ]
    shown = 'a "b"\\\\n'
    assert family.samples[0].labels == {"context": "3", "name": shown}


def test_events_are_counted(vsock: Vsock, fabric: PrivateFabric) -> None:
    guest, other = fabric.guest(), fabric.guest()
    before = read(vsock("metrics").stdout)
    with vsockets.create_server((2, 5000), context=fabric.host) as server:
        for _ in range(3):
            with vsockets.create_connection((2, 5000), context=guest), server.accept()[0]:
                pass
        for address in ((2, 5001), (other.cid, 5000)):  # not running; forbidden
            with pytest.raises(OSError):
                vsockets.create_connection(address, context=guest)
        after = read(vsock("metrics").stdout)
    cid = str(guest.cid)
    assert after["vsock_connects_total", cid] == 3
    assert after["vsock_accepts_total", "2"] - before["vsock_accepts_total", "2"] == 3
    assert after["vsock_refusals_total", cid] == 2
    assert after["vsock_denials_total", cid, "guest-to-guest"] == 1
    assert after["vsockd_listeners",] - before["vsockd_listeners",] == 1


def test_a_lease_that_ends_leaves_its_counts(vsock: Vsock, fabric: PrivateFabric) -> None:
    before = read(vsock("metrics").stdout)
    with vsockets.create_server((2, 5002), context=fabric.host) as server:
        with Control(fabric.folder) as control:
            guest = Attachment(control.add_context(lease=True)["folder"])
            with vsockets.create_connection((2, 5002), context=guest), server.accept()[0]:
                during = read(vsock("metrics").stdout)
        after = read(vsock("metrics").stdout)
    connects = [samples["vsock_connects_total", "leased"] for samples in (before, during, after)]
    assert connects == [connects[0], connects[0] + 1, connects[0] + 1]
    assert during["vsock_streams", "leased"] - after["vsock_streams", "leased"] == 1


def test_over_loopback(vsock: Vsock, fabric: PrivateFabric) -> None:
    running = vsock.start("metrics", "--listen", "tcp:127.0.0.1:0")
    where = running.error_line().removeprefix("serving /metrics at tcp:")
    with socket.create_connection(tuple_of(where)) as silent:  # does not delay others for long
        with urllib.request.urlopen(f"http://{where}/metrics", timeout=PATIENCE) as answer:
            assert answer.headers["Content-Type"].startswith("text/plain; version=0.0.4")
            assert ("vsock_streams", "2") in read(answer.read().decode())
        silent.close()
    with pytest.raises(urllib.error.HTTPError, match="404") as caught:
        urllib.request.urlopen(f"http://{where}/", timeout=PATIENCE)
    caught.value.close()


def tuple_of(where: str) -> tuple[str, int]:
    host, _, port = where.rpartition(":")
    return host, int(port)


def get(path: Path) -> tuple[int, str]:
    """Return status and text of /metrics over a unix socket."""
    connection = http.client.HTTPConnection("localhost", timeout=PATIENCE)
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(PATIENCE)
    connection.sock.connect(str(path))
    connection.request("GET", "/metrics")
    answer = connection.getresponse()
    with answer:
        return answer.status, answer.read().decode()


def test_over_a_unix_socket_while_vsockd_comes_and_goes(alone: Vsock, tmp_path: Path) -> None:
    path = tmp_path / "metrics"
    running = alone.start("metrics", "--listen", f"unix:{path}")
    running.error_line()
    assert not stat.S_IMODE(os.stat(path).st_mode) & 0o077
    status, text = get(path)
    assert status == 503 and "vsockd is not running" in text
    alone("up")
    status, text = get(path)
    assert status == 200 and ("vsock_streams", "2") in read(text)
    running.process.send_signal(signal.SIGINT)
    running.finish(expect=130)
    assert not path.exists()


def test_other_users_cannot_connect(vsock: Vsock) -> None:
    vsock.fail(
        ("metrics --listen tcp:0.0.0.0:9100", 2, "expected unix:PATH or tcp:127.0.0.1:PORT"),
        ("metrics --listen tcp::9100", 2, "expected unix:PATH or tcp:127.0.0.1:PORT"),
        ("metrics --listen tcp:example.org:9100", 2, "expected unix:PATH"),
        ("metrics --listen vsock:2:9100", 2, "expected unix:PATH"),
        ("metrics --listen udp:127.0.0.1:9100", 2, "expected unix:PATH"),
    )
