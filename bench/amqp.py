"""RabbitMQ through the three proxies beside RabbitMQ by TCP: one broker, one stock client."""

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
    """Whether there are a RabbitMQ and pika."""
    try:
        import pika  # noqa: F401

        programs()
    except (ImportError, NoRabbitMQ):
        return False
    return True


@contextlib.contextmanager
def running() -> Iterator[dict[str, int]]:
    """The ports at which one and the same broker is reached, by the way there."""
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
    """Bytes of messages a second that reach a queue, in MB."""
    data = bytes(size)
    with _channel(port) as (channel, queue):
        begin = perf_counter()
        for _ in range(count):
            channel.basic_publish("", queue, data)
        # The broker answers when it has dealt with all that was said before.
        there = channel.queue_purge(queue).method.message_count
        seconds = perf_counter() - begin
    assert there == count
    return count * size / seconds / 1e6


def fetching(port: int, count: int, size: int) -> float:
    """Bytes of messages a second that a consumer takes, in MB."""
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
    """Microseconds until a message of 64 bytes is confirmed, one after the other."""
    with _channel(port) as (channel, queue):
        channel.confirm_delivery()
        begin = perf_counter()
        for _ in range(count):
            channel.basic_publish("", queue, bytes(64))
        return (perf_counter() - begin) / count * 1e6
