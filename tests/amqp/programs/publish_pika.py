"""A publisher with pika that repeats unconfirmed messages.

Usage: PORT QUEUE SENDER COUNT.  Prints a line for every confirmed tenth of the messages, and
finally a line of JSON.
"""

import collections
import json
import sys

import pika
from messages import message
from pika.adapters.select_connection import IOLoop

PORT, SENDER, COUNT = int(sys.argv[1]), int(sys.argv[3]), int(sys.argv[4])
QUEUE = sys.argv[2]

#: Messages sent and not confirmed at the same time.
WINDOW = 1000


class Publisher:
    def __init__(self):
        self.loop = IOLoop()
        self.channel = None
        self.todo = collections.deque(range(COUNT))
        self.unconfirmed = {}
        self.confirmed = 0
        self.again = set()
        self.ends = []
        self.connections = 0

    def connect(self):
        pika.SelectConnection(
            pika.ConnectionParameters("127.0.0.1", PORT, heartbeat=60),
            on_open_callback=lambda connection: connection.channel(on_open_callback=self.opened),
            on_open_error_callback=self.closed,
            on_close_callback=self.closed,
            custom_ioloop=self.loop,
        )

    def closed(self, connection, why):
        self.channel = None
        if self.confirmed == COUNT:
            self.loop.stop()
            return
        self.ends.append(getattr(why, "reply_code", type(why).__name__))
        self.again.update(self.unconfirmed.values())
        self.todo.extendleft(reversed(self.unconfirmed.values()))
        self.unconfirmed.clear()
        self.loop.call_later(0.1, self.connect)

    def opened(self, channel):
        self.connections += 1
        self.tag = 0
        channel.confirm_delivery(self.answered)
        channel.queue_declare(QUEUE, durable=True, callback=lambda _: self.begin(channel))

    def begin(self, channel):
        self.channel = channel
        self.publish()

    def publish(self):
        properties = pika.BasicProperties(delivery_mode=2)
        while self.channel is not None and self.todo and len(self.unconfirmed) < WINDOW:
            number = self.todo.popleft()
            self.tag += 1
            self.unconfirmed[self.tag] = number
            data = message(SENDER, number, self.connections)
            self.channel.basic_publish("", QUEUE, data, properties)

    def answered(self, frame):
        method = frame.method
        first = next(iter(self.unconfirmed)) if method.multiple else method.delivery_tag
        for tag in range(first, method.delivery_tag + 1):
            number = self.unconfirmed.pop(tag, None)
            if number is None:
                continue
            if isinstance(method, pika.spec.Basic.Nack):
                self.again.add(number)
                self.todo.append(number)
                continue
            self.confirmed += 1
            if self.confirmed % (COUNT // 10) == 0:
                print(self.confirmed, flush=True)
        if self.confirmed == COUNT:
            self.channel.connection.close()
        elif len(self.unconfirmed) < WINDOW // 2:
            self.publish()


publisher = Publisher()
publisher.connect()
publisher.loop.start()
again, ends = sorted(publisher.again), publisher.ends
print(json.dumps({"again": again, "ends": ends, "connections": publisher.connections}))
