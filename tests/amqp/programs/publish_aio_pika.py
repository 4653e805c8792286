"""A publisher with aio-pika that sends batches, each once the previous one is confirmed.

Usage: PORT QUEUE SENDER COUNT.  Prints a line for every confirmed tenth of the messages, and
finally a line of JSON.
"""

import asyncio
import json
import sys

import aio_pika
from messages import message

PORT, SENDER, COUNT = int(sys.argv[1]), int(sys.argv[3]), int(sys.argv[4])
QUEUE = sys.argv[2]

#: Messages sent and not confirmed at the same time.
BATCH = 1000


async def main():
    todo = list(range(COUNT))
    again, ends = set(), []
    connections = confirmed = 0
    while todo:
        try:
            connection = await aio_pika.connect(
                f"amqp://guest:guest@127.0.0.1:{PORT}/?heartbeat=60"
            )
        except (aio_pika.exceptions.AMQPError, OSError) as error:
            ends.append(type(error).__name__)
            await asyncio.sleep(0.1)
            continue
        connections += 1
        try:
            async with connection:
                channel = await connection.channel(publisher_confirms=True)
                await channel.declare_queue(QUEUE, durable=True)
                while todo:
                    numbers = todo[:BATCH]
                    answers = await asyncio.gather(
                        *(
                            channel.default_exchange.publish(
                                aio_pika.Message(
                                    message(SENDER, number, connections), delivery_mode=2
                                ),
                                QUEUE,
                            )
                            for number in numbers
                        ),
                        return_exceptions=True,
                    )
                    failed = [
                        number
                        for number, answer in zip(numbers, answers, strict=True)
                        if isinstance(answer, BaseException)
                    ]
                    again.update(failed)
                    todo[: len(numbers)] = failed
                    for _ in range(len(numbers) - len(failed)):
                        confirmed += 1
                        if confirmed % (COUNT // 10) == 0:
                            print(confirmed, flush=True)
                    if failed:
                        raise next(a for a in answers if isinstance(a, BaseException))
        except (aio_pika.exceptions.AMQPError, OSError, RuntimeError) as error:
            ends.append(type(error).__name__)
    print(json.dumps({"again": sorted(again), "ends": ends, "connections": connections}))


asyncio.run(main())
