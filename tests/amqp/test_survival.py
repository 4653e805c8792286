"""Nothing that was confirmed is lost, whoever dies on the way."""

from __future__ import annotations

import contextlib

import pika
import pytest

from vsockets.testing.rabbitmq import PrivateRabbitMQ

from .programs.messages import read
from .stage import Program, Proxies

pytestmark = pytest.mark.timeout(400)

#: Of each of the two guests.
COUNT = 50_000

QUEUE = "mirrored.survival"


def test_whoever_dies_what_was_confirmed_is_there(
    proxies: Proxies, rabbitmq: PrivateRabbitMQ
) -> None:
    """100,000 messages from two guests, while each of the three proxies and a node are killed."""
    guests = proxies.fabric.guest(), proxies.fabric.guest()
    proxy, where = proxies.amqp_proxy(rabbitmq.ports)
    host, host_where = proxies.host_proxy(where)
    ports = [proxies.guest_proxy(guest, host_where) for guest in guests]
    with contextlib.ExitStack() as stack:
        one = Program("publish_pika.py", ports[0][1], QUEUE, 1, COUNT)
        stack.callback(one.close)
        other = Program("publish_aio_pika.py", ports[1][1], QUEUE, 2, COUNT)
        stack.callback(other.close)

        one.wait_for(2, COUNT)
        host.process.kill()
        proxies.host_proxy(where, listen=host_where.replace("vsock:2:", "vsock::"))

        one.wait_for(4, COUNT)
        rabbitmq.kill(0)

        one.wait_for(6, COUNT)
        proxy.process.kill()
        proxies.amqp_proxy(rabbitmq.ports, listen=where)

        one.wait_for(8, COUNT)
        ports[0][0].process.kill()
        proxies.guest_proxy(guests[0], host_where, listen=f"tcp:127.0.0.1:{ports[0][1]}")

        told = {1: one.result(), 2: other.result()}
    rabbitmq.start(0)
    rabbitmq.wait()
    check(consume(rabbitmq.ports[1]), told)
    # The clients of a proxy that lives are seen off as AMQP does that.
    assert told[1]["ends"].count(320) >= 2
    assert told[1]["connections"] >= 4


def consume(port: int) -> list[bytes]:
    """All that is in the queue, in its order."""
    connection = pika.BlockingConnection(pika.ConnectionParameters("127.0.0.1", port))
    channel = connection.channel()
    there = channel.queue_declare(QUEUE, passive=True).method.message_count
    found: list[bytes] = []

    def take(channel: object, method: object, properties: object, body: bytes) -> None:
        found.append(body)
        if len(found) == there:
            channel.stop_consuming()  # type: ignore[attr-defined]

    channel.basic_consume(QUEUE, take, auto_ack=True)
    channel.start_consuming()
    connection.close()
    return found


def check(found: list[bytes], told: dict[int, dict[str, list[int]]]) -> None:
    """Every message is there as it was sent, in order; twice only what was sent again."""
    numbers: dict[tuple[int, int], list[int]] = {}
    copies: dict[tuple[int, int], int] = {}
    for data in found:
        sender, number, connection = read(data)
        copies[sender, number] = copies.get((sender, number), 0) + 1
        if number not in told[sender]["again"]:
            numbers.setdefault((sender, connection), []).append(number)
    for sender, said in told.items():
        assert {number for who, number in copies if who == sender} == set(range(COUNT))
        again = set(said["again"])
        assert {n for (who, n), times in copies.items() if who == sender and times > 1} <= again
    for sequence in numbers.values():
        assert sequence == sorted(sequence)
