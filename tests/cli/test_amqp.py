"""``vsock amqp`` and ``vsock demo amqp``: command lines and output; tests/amqp has the rest."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from .vsock import PATIENCE, Vsock


def test_bad_command_lines(vsock: Vsock) -> None:
    vsock.fail(
        ("amqp guest-proxy --listen vsock::5", 2, "--listen vsock:any:5: expected tcp: or unix:"),
        ("amqp guest-proxy --host tcp:a:1", 2, "--host tcp:a:1: expected vsock:"),
        ("amqp host-proxy", 2, "--proxy"),
        ("amqp host-proxy --proxy vsock:2:1", 2, "expected tcp: or unix:"),
        ("amqp host-proxy --proxy tcp:a:1 --listen tcp::1", 2, "expected vsock:"),
        ("amqp host-proxy --proxy tcp:a:1 --allow-vhost 3", 2, "expected CID=VHOST"),
        ("amqp host-proxy --proxy tcp:a:1 --tls-cert x", 2, "TLS needs --tls-ca"),
        ("amqp host-proxy --proxy unix:a --tls-ca x", 2, "expected --tls-name"),
        ("amqp host-proxy --proxy tcp:a:1 --tls-ca /none", 1, "/none: No such file"),
        ("amqp proxy --node tcp:a:1 --tls-cert /none", 1, "/none: No such file"),
        ("amqp proxy --node tcp:a:1 --tls-cert /etc/passwd", 1, "/etc/passwd: [SSL] PEM lib"),
        ("amqp proxy", 2, "--node"),
        ("amqp proxy --node udp:a:1", 2, "--node udp:a:1: expected tcp: or unix:"),
        ("amqp proxy --node tcp::1", 2, "--node tcp::1: expected a host and a port"),
        ("amqp proxy --node tcp:a:1 --tls-ca x", 2, "TLS needs --tls-cert"),
        ("amqp proxy --node tcp:a:1 --listen unix:/none/x", 1, "cannot listen on unix:/none/x"),
    )


def test_a_proxy_says_where_it_listens_and_ends_when_told(vsock: Vsock, tmp_path: Path) -> None:
    started = [
        vsock.start("amqp", "guest-proxy", "--listen", f"unix:{tmp_path}/guest"),
        vsock.start("amqp", "host-proxy", "--listen", "vsock::7777", "--proxy", "tcp:127.0.0.1:1"),
        vsock.start("amqp", "proxy", "--listen", f"unix:{tmp_path}/amqp", "--node", "unix:/none"),
    ]
    places = [running.error_line() for running in started]
    assert places == [
        f"listening on unix:{tmp_path}/guest",
        "listening on vsock:2:7777",
        f"listening on unix:{tmp_path}/amqp",
    ]
    numbers = signal.SIGTERM, signal.SIGINT, signal.SIGTERM
    for running, number in zip(started, numbers, strict=True):
        running.process.send_signal(number)
        running.finish()
    assert not list(tmp_path.iterdir())


@pytest.mark.timeout(300)
def test_the_demo(alone: Vsock, path_with_rabbitmq: str) -> None:
    alone.environment["PATH"] = path_with_rabbitmq
    running = alone.start("demo", "amqp", "--json")
    printed, _ = running.process.communicate(timeout=PATIENCE * 8)
    told = json.loads(printed)
    assert running.process.returncode == 0, told
    assert [(step["step"], step["ok"]) for step in told["steps"]] == [
        ("messages", True),
        ("messages", True),
        ("host proxy killed", True),
        ("identity", True),
        ("virtual host", True),
        ("virtual host", True),
    ]
    assert told["throughput"]["messages"] == 10_000


def test_the_demo_without_a_rabbitmq(alone: Vsock, tmp_path: Path) -> None:
    alone.environment["PATH"] = str(tmp_path)
    assert alone.fails("demo", "amqp") == ("RabbitMQ is not installed: apt install rabbitmq-server")
