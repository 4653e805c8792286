"""The message clients of ``vsock demo amqp``: plain pika programs, with RabbitMQ at 127.0.0.1.

Run as ``python amqp_client.py ROLE PORT ARGUMENT...``; they report in lines of JSON.
"""

from __future__ import annotations

import collections
import hashlib
import json
import re
import sys
import time
from typing import Any

import pika
from pika.adapters.select_connection import IOLoop

#: Most unconfirmed messages, and received messages between two reports.
WINDOW, REPORTED_EVERY = 500, 250


def report(**facts: Any) -> None:
    """Print one line of JSON for the parent process."""
    print(json.dumps(facts), flush=True)


def parameters(port: str, virtual_host: str = "/") -> Any:
    """Return the parameters of a connection to the local port."""
    return pika.ConnectionParameters("127.0.0.1", int(port), virtual_host)


def message(queue: str, number: int) -> bytes:
    """Return the ``number``-th message for ``queue``, with a digest that the receiver checks."""
    text = f"{number} {queue} "
    return (text + hashlib.sha256(text.encode()).hexdigest()).encode()


class Exchange:
    """A client that sends ``count`` messages to one queue and receives as many from another.

    Messages that are not confirmed when a connection ends are sent again over the next connection.
    """

    def __init__(self, port: str, outgoing: str, incoming: str, count: str) -> None:
        self.parameters = parameters(port)
        self.outgoing, self.incoming, self.count = outgoing, incoming, int(count)
        self.todo = collections.deque(range(self.count))
        self.unconfirmed: dict[int, int] = {}
        self.confirmed = self.again = 0
        self.received: set[int] = set()
        self.closed: list[int | str] = []
        self.channel: Any = None
        self.loop = IOLoop()
        self.finishing = False

    def run(self) -> None:
        """Run until all messages are confirmed and received."""
        began = time.perf_counter()
        self._connect()
        self.loop.start()
        report(
            confirmed=self.confirmed,
            intact=len(self.received),
            again=self.again,
            closed=self.closed,
            seconds=time.perf_counter() - began,
        )

    def _connect(self) -> None:
        pika.SelectConnection(
            self.parameters,
            on_open_callback=lambda connection: connection.channel(on_open_callback=self._opened),
            on_open_error_callback=self._closed,
            on_close_callback=self._closed,
            custom_ioloop=self.loop,
        )

    def _closed(self, connection: Any, why: Any) -> None:
        self.channel = None
        if self.finishing:
            self.loop.stop()
            return
        self.closed.append(getattr(why, "reply_code", type(why).__name__))
        self.again += len(self.unconfirmed)
        self.todo.extendleft(reversed(self.unconfirmed.values()))
        self.unconfirmed.clear()
        self.loop.call_later(0.2, self._connect)

    def _opened(self, channel: Any) -> None:
        self.tag = 0
        channel.confirm_delivery(self._answered)
        channel.basic_qos(prefetch_count=WINDOW)
        channel.queue_declare(self.incoming, durable=True)
        channel.queue_declare(self.outgoing, durable=True, callback=lambda _: self._begin(channel))

    def _begin(self, channel: Any) -> None:
        self.channel = channel
        channel.basic_consume(self.incoming, self._take)
        self._publish()

    def _publish(self) -> None:
        properties = pika.BasicProperties(delivery_mode=2)
        while self.channel is not None and self.todo and len(self.unconfirmed) < WINDOW:
            number = self.todo.popleft()
            self.tag += 1
            self.unconfirmed[self.tag] = number
            data = message(self.outgoing, number)
            self.channel.basic_publish("", self.outgoing, data, properties)

    def _answered(self, frame: Any) -> None:
        last = frame.method.delivery_tag
        first = min(self.unconfirmed) if frame.method.multiple else last
        accepted = isinstance(frame.method, pika.spec.Basic.Ack)
        for tag in range(first, last + 1):
            number = self.unconfirmed.pop(tag)
            if accepted:
                self.confirmed += 1
            else:
                self.again += 1
                self.todo.append(number)
        self._publish()
        self._finish_if_done()

    def _take(self, channel: Any, method: Any, properties: Any, data: bytes) -> None:
        number = int(data.split(b" ", 1)[0])
        if data != message(self.incoming, number):
            raise ValueError(f"message {number}: corrupted: {data!r}")
        self.received.add(number)
        channel.basic_ack(method.delivery_tag)
        if len(self.received) % REPORTED_EVERY == 0:
            report(received=len(self.received))
        self._finish_if_done()

    def _finish_if_done(self) -> None:
        done = self.confirmed == self.count == len(self.received)
        if done and not self.finishing and self.channel is not None:
            self.finishing = True
            self.channel.connection.close()


def exchange(port: str, outgoing: str, incoming: str, count: str) -> None:
    """Send and receive ``count`` messages."""
    Exchange(port, outgoing, incoming, count).run()


def enter(port: str, virtual_host: str) -> None:
    """Connect to a virtual host, and report the reply code if the broker refuses, else 0."""
    try:
        pika.BlockingConnection(parameters(port, virtual_host)).close()
        report(closed=0)
    except pika.exceptions.ProbableAccessDeniedError as error:
        code = re.search(r"\((\d+)\)", str(error))  # pika has the code in the text only
        report(closed=int(code[1]) if code else str(error))


def stay(port: str) -> None:
    """Stay connected until killed."""
    connection = pika.BlockingConnection(parameters(port))
    report(ready=True)
    connection.process_data_events(time_limit=None)


ROLES = {role.__name__: role for role in (exchange, enter, stay)}

if __name__ == "__main__":
    ROLES[sys.argv[1]](*sys.argv[2:])
