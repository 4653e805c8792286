"""RabbitMQ through the three proxies and by TCP, with one broker and one stock client."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from time import perf_counter
from typing import Any

from vsockets.testing import PrivateFabric
from vsockets.testing.rabbitmq import NoRabbitMQ, PrivateRabbitMQ, programs


def available() -> bool:
    """Return whether RabbitMQ and pika are installed."""
    try:
        import pika  # noqa: F401

        programs()
    except (ImportError, NoRabbitMQ):
        return False
    return True


@contextlib.contextmanager
def running() -> Iterator[dict[str, int]]:
    """Yield the ports that lead to the same broker, by the path."""
    with contextlib.ExitStack() as stack:
        fabric = stack.enter_context(PrivateFabric(log_level="warning"))
        (broker,) = stack.enter_context(PrivateRabbitMQ()).ports

        def vsock(context: Any, *arguments: str) -> str:
            process = subprocess.Popen(
                [sys.executable, "-m", "vsockets.cli", "amqp", *arguments],
                env=fabric.environment(context),
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.callback(process.wait)
            stack.callback(process.terminate)
            assert process.stderr is not None
            return process.stderr.readline().strip().removeprefix("vsock: listening on ")

        node, any_port = f"--node=tcp:127.0.0.1:{broker}", "--listen=tcp:127.0.0.1:0"
        proxy = vsock(fabric.host, "proxy", any_port, node)
        host = vsock(fabric.host, "host-proxy", "--listen=vsock::any", f"--proxy={proxy}")
        guest = vsock(fabric.guest(), "guest-proxy", any_port, f"--host={host}")
        yield {"proxies": int(guest.rpartition(":")[2]), "tcp": broker}


@contextlib.contextmanager
def _channel(port: int) -> Iterator[tuple[Any, str]]:
    import pika

    with pika.BlockingConnection(pika.ConnectionParameters("127.0.0.1", port)) as connection:
        channel = connection.channel()
        yield channel, channel.queue_declare("", exclusive=True).method.queue


def publishing(port: int, count: int, size: int) -> float:
    """Return the MB/s of messages that reach a queue."""
    data = bytes(size)
    with _channel(port) as (channel, queue):
        begin = perf_counter()
        for _ in range(count):
            channel.basic_publish("", queue, data)
        # The broker answers once it has handled all earlier frames.
        queued = channel.queue_purge(queue).method.message_count
        seconds = perf_counter() - begin
    assert queued == count
    return count * size / seconds / 1e6


def fetching(port: int, count: int, size: int) -> float:
    """Return the MB/s of messages that a consumer receives."""
    data = bytes(size)
    with _channel(port) as (channel, queue):
        for _ in range(count):
            channel.basic_publish("", queue, data)
        channel.queue_declare(queue, passive=True)
        begin = perf_counter()
        left = count
        for _, _, _ in channel.consume(queue, auto_ack=True):
            left -= 1
            if not left:
                break
        return count * size / (perf_counter() - begin) / 1e6


def confirming(port: int, count: int) -> float:
    """Return the microseconds until a message of 64 bytes is confirmed, sent in sequence."""
    with _channel(port) as (channel, queue):
        channel.confirm_delivery()
        begin = perf_counter()
        for _ in range(count):
            channel.basic_publish("", queue, bytes(64))
        return (perf_counter() - begin) / count * 1e6
