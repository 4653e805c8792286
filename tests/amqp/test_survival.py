"""Survival of confirmed messages when proxies and nodes are killed."""

from __future__ import annotations

import contextlib

import pika
import pytest

from forms import choose
from vsockets.testing.rabbitmq import PrivateRabbitMQ

from .programs.messages import read
from .stage import Program, Proxies

pytestmark = pytest.mark.timeout(400)

#: Messages of each of the two guests.
COUNT = choose(15_000, 50_000)

QUEUE = "mirrored.survival"


def test_confirmed_messages_survive_the_death_of_each_proxy_and_node(
    proxies: Proxies, rabbitmq: PrivateRabbitMQ
) -> None:
    """Two guests send messages while each of the three proxies and a node are killed."""
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

        sent = {1: one.result(), 2: other.result()}
    rabbitmq.start(0)
    rabbitmq.wait()
    check(consume(rabbitmq.ports[1]), sent)
    # A proxy that survives closes its clients' connections with connection.close.
    assert sent[1]["ends"].count(320) >= 2
    assert sent[1]["connections"] >= 4


def consume(port: int) -> list[bytes]:
    """Return the messages in the queue, in order."""
    connection = pika.BlockingConnection(pika.ConnectionParameters("127.0.0.1", port))
    channel = connection.channel()
    queued = channel.queue_declare(QUEUE, passive=True).method.message_count
    found: list[bytes] = []

    def take(channel: object, method: object, properties: object, body: bytes) -> None:
        found.append(body)
        if len(found) == queued:
            channel.stop_consuming()  # type: ignore[attr-defined]

    channel.basic_consume(QUEUE, take, auto_ack=True)
    channel.start_consuming()
    connection.close()
    return found


def check(found: list[bytes], sent: dict[int, dict[str, list[int]]]) -> None:
    """Check that all messages arrived in order; only repeated ones may arrive twice."""
    numbers: dict[tuple[int, int], list[int]] = {}
    copies: dict[tuple[int, int], int] = {}
    for data in found:
        sender, number, connection = read(data)
        copies[sender, number] = copies.get((sender, number), 0) + 1
        if number not in sent[sender]["again"]:
            numbers.setdefault((sender, connection), []).append(number)
    for sender, results in sent.items():
        assert {number for one, number in copies if one == sender} == set(range(COUNT))
        again = set(results["again"])
        assert {n for (one, n), times in copies.items() if one == sender and times > 1} <= again
    for sequence in numbers.values():
        assert sequence == sorted(sequence)
