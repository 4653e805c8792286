"""Stock clients and RabbitMQ, with the three proxies between them."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pika
import pika.exceptions
import pytest
import trustme

from vm import downloads
from vsockets.testing import wait_until
from vsockets.testing.rabbitmq import PrivateRabbitMQ

from .stage import Proxies

pytestmark = pytest.mark.timeout(240)

#: Timeout of clients, in seconds.
PATIENCE = 30.0


@contextlib.contextmanager
def connected(port: int, virtual_host: str = "/", **properties: object) -> Iterator[Any]:
    """Yield a channel with publisher confirms."""
    connection = pika.BlockingConnection(
        pika.ConnectionParameters(
            "127.0.0.1",
            port,
            virtual_host,
            client_properties=properties or None,
            socket_timeout=PATIENCE,
            stack_timeout=PATIENCE,
            blocked_connection_timeout=PATIENCE,
        )
    )
    try:
        channel = connection.channel()
        channel.confirm_delivery()
        yield channel
    finally:
        with contextlib.suppress(pika.exceptions.AMQPError):
            connection.close()


def works(port: int, virtual_host: str = "/", size: int = 1000) -> bool:
    """Return whether a message reaches the broker and comes back unchanged."""
    data = os.urandom(size)
    with connected(port, virtual_host) as channel:
        queue = channel.queue_declare("", exclusive=True).method.queue
        channel.basic_publish("", queue, data)
        return bool(channel.basic_get(queue)[2] == data)


def test_guest_is_identified_and_limited_to_its_virtual_hosts(
    proxies: Proxies, rabbitmq: PrivateRabbitMQ
) -> None:
    one, other = proxies.fabric.guest(), proxies.fabric.guest()
    _, proxy = proxies.amqp_proxy(rabbitmq.ports)
    rules = ("--allow-vhost", f"{one.cid}=/,orders", "--allow-vhost", f"{other.cid}=orders")
    _, host = proxies.host_proxy(proxy, *rules)
    _, port = proxies.guest_proxy(one, host)
    _, other_port = proxies.guest_proxy(other, host)

    assert works(port, "/", 3_000_000)
    assert works(port, "orders")
    assert works(other_port, "orders")
    with pytest.raises(pika.exceptions.ProbableAccessDeniedError, match=r"530.*refused to context"):
        works(other_port, "/")
    with (
        pytest.raises(
            pika.exceptions.AMQPConnectionError, match="vsock_cid: reserved for the host proxy"
        ),
        connected(other_port, "orders", vsock_cid=2),
    ):
        pass
    with connected(port), connected(other_port, "orders"):
        listed = rabbitmq.control(0, "list_connections", "client_properties")
        for guest in (one, other):
            assert f'"vsock_cid",{guest.cid}' in listed.replace(" ", "")


def test_sessions_are_balanced_over_healthy_nodes(
    proxies: Proxies, rabbitmq: PrivateRabbitMQ
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        ports = [closed.getsockname()[1], silent.getsockname()[1], *rabbitmq.ports]
        proxy, where = proxies.amqp_proxy(ports)
        _, host = proxies.host_proxy(where)
        _, port = proxies.guest_proxy(proxies.fabric.guest(), host)
        down = {proxy.error_line(), proxy.error_line()}
        assert down == {
            f"tcp:127.0.0.1:{ports[0]}: node is down: Connection refused",
            f"tcp:127.0.0.1:{ports[1]}: node is down: connected, but received no AMQP frame",
        }
        with contextlib.ExitStack() as stack:
            for _ in range(4):
                stack.enter_context(connected(port))
            listed = rabbitmq.control(0, "list_connections", "port").split()
            for one in rabbitmq.ports:
                assert listed.count(str(one)) == 2


def test_slow_consumer_does_not_block_a_fast_one(
    proxies: Proxies, rabbitmq: PrivateRabbitMQ
) -> None:
    port = proxies.all_three(rabbitmq.ports)
    count, data = 300, os.urandom(100_000)
    with connected(rabbitmq.ports[0]) as direct, connected(port) as slow:
        direct.queue_declare("plenty")
        for _ in range(count):
            direct.basic_publish("", "plenty", data)
        got: list[bytes] = []
        # The unread messages fill every buffer up to the broker.
        slow.basic_consume("plenty", lambda *event: got.append(event[3]), auto_ack=True)
        for _ in range(20):
            assert works(port, size=1_000_000)
        assert len(got) < count
        while len(got) < count:
            slow.connection.process_data_events(time_limit=PATIENCE)
        assert set(got) == {data}
        direct.queue_delete("plenty")


def test_lost_uplink_is_reconnected(proxies: Proxies, rabbitmq: PrivateRabbitMQ) -> None:
    guest = proxies.fabric.guest()
    proxy, where = proxies.amqp_proxy(rabbitmq.ports)
    host, host_where = proxies.host_proxy(where)
    guest_proxy, port = proxies.guest_proxy(guest, host_where)
    with connected(port) as channel:
        proxy.process.kill()
        with pytest.raises(pika.exceptions.ConnectionClosedByBroker) as caught:
            channel.connection.process_data_events(time_limit=PATIENCE)
        assert caught.value.reply_code == 320
    proxy, _ = proxies.amqp_proxy(rabbitmq.ports, listen=where)
    assert works(port)
    # On SIGTERM the others close their clients' connections in an orderly way.
    for running in (host, guest_proxy):
        with connected(port) as channel:
            running.process.terminate()
            with pytest.raises(pika.exceptions.ConnectionClosedByBroker) as caught:
                channel.connection.process_data_events(time_limit=PATIENCE)
            assert caught.value.reply_code == 320
            assert "shutting down" in caught.value.reply_text
        assert running.finish()[0] == b""
        if running is host:
            proxies.host_proxy(where, listen=host_where.replace("vsock:2:", "vsock::"))


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """Create ``ca.pem``, ``server.pem`` for 127.0.0.1, ``client.pem`` and ``stranger.pem``."""
    authority, stranger = trustme.CA(), trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    for name, issuer in (("server", authority), ("client", authority), ("stranger", stranger)):
        certificate = issuer.issue_cert("127.0.0.1")
        certificate.private_key_and_cert_chain_pem.write_to_path(tmp_path / f"{name}.pem")
    return tmp_path


def test_tls_requires_a_client_certificate(
    proxies: Proxies, rabbitmq: PrivateRabbitMQ, certificates: Path
) -> None:
    guest = proxies.fabric.guest()
    authority = ("--tls-ca", certificates / "ca.pem")
    _, where = proxies.amqp_proxy(
        rabbitmq.ports, "--tls-cert", certificates / "server.pem", *authority
    )

    def through(*options: object) -> int:
        _, host = proxies.host_proxy(where, *options)
        return proxies.guest_proxy(guest, host)[1]

    assert works(through(*authority, "--tls-cert", certificates / "client.pem"), size=2_000_000)
    refused = [
        authority,
        (*authority, "--tls-cert", certificates / "stranger.pem"),
    ]
    for options in refused:
        host, _ = proxies.host_proxy(where, *options)
        assert "reconnecting" in host.error_line()
    host, _ = proxies.host_proxy(where, *authority, "--tls-name", "localhost")
    assert "certificate is not valid for 'localhost'" in host.error_line()


@contextlib.contextmanager
def running(*command: str, port: int) -> Iterator[None]:
    """Run a program until the end of the context, once it accepts TCP at ``port``."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def serves() -> bool:
        assert process.poll() is None
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return True
        return False

    try:
        wait_until(serves, command[0], PATIENCE)
        yield
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_host_proxy_works_with_stock_proxies(
    proxies: Proxies, rabbitmq: PrivateRabbitMQ, tmp_path: Path
) -> None:
    """The path: host proxy, nghttpx (HTTP/2 CONNECT), tinyproxy (HTTP/1.1 CONNECT), RabbitMQ."""
    nghttpx, tinyproxy = stock_proxies()
    front, back = free_port(), free_port()
    configuration = tmp_path / "tinyproxy.conf"
    broker = f"127.0.0.1:{rabbitmq.ports[0]}"
    configuration.write_text(f"Port {back}\nListen 127.0.0.1\nConnectPort {rabbitmq.ports[0]}\n")
    ends = ("--http2-proxy", f"--frontend=127.0.0.1,{front};no-tls", f"--backend=127.0.0.1,{back}")
    with (
        running(*tinyproxy, "-c", str(configuration), port=back),
        running(*nghttpx, *ends, port=front),
    ):
        _, host = proxies.host_proxy(f"tcp:127.0.0.1:{front}", "--authority", broker)
        _, port = proxies.guest_proxy(proxies.fabric.guest(), host)
        for _ in range(3):
            assert works(port, size=1_000_000)


def test_amqp_proxy_works_with_a_stock_client(proxies: Proxies, rabbitmq: PrivateRabbitMQ) -> None:
    """nghttpx turns its client's HTTP/1.1 CONNECT into an HTTP/2 CONNECT to the proxy."""
    nghttpx, _ = stock_proxies()
    _, where = proxies.amqp_proxy(rabbitmq.ports)
    front, back = free_port(), where.rpartition(":")[2]
    ends = (
        "--http2-proxy",
        f"--frontend=127.0.0.1,{front};no-tls",
        f"--backend=127.0.0.1,{back};;proto=h2",
    )
    with running(*nghttpx, *ends, port=front):
        for name, status in (("rabbitmq:5672", b"200"), ("elsewhere:5672", b"403")):
            with socket.create_connection(("127.0.0.1", front), timeout=PATIENCE) as client:
                client.sendall(f"CONNECT {name} HTTP/1.1\r\nHost: {name}\r\n\r\n".encode())
                head = b""
                while b"\r\n\r\n" not in head:
                    head += client.recv(1)
                assert head.split()[1] == status
                if status == b"200":
                    client.sendall(b"AMQP\0\0\x09\x01")
                    assert client.recv(1) == b"\x01"  # the frame of connection.start


def stock_proxies() -> tuple[list[str], list[str]]:
    try:
        return downloads.http2_proxy()
    except downloads.Unavailable as error:
        if os.environ.get("VSOCKETS_REQUIRE_VM"):
            raise
        pytest.skip(f"no stock proxies: {error}")
