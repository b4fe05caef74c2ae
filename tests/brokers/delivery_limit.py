"""What a delivery limit does to messages that were only prefetched when their consumer's connection ended.

    python -m tests.brokers.delivery_limit [SUITE…]      bookworm, trixie, forky

Fifty messages in a quorum queue with dead letters; a bare client takes all fifty and ends 25 times without
an acknowledgement in one of several ways, and what is then in which queue is counted. Prints a row for each
release, way and limit.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import amqp

from tests.brokers.rabbitmq import RabbitMQ, wait_until
from tests.lab.chroot import RABBITMQ, suite_root

MESSAGES, ENDS = 50, 25
SUITES = ("bookworm", "trixie", "forky")
LIMITS: dict[str, int | None] = {"none set": None, "20": 20, "-1": -1}
WAYS = ("connection", "channel", "requeue")
ROW = "{:9} {:8} {:11} {:9} {:>6} {:>8} {:>9}"


def connect(broker: RabbitMQ, vhost: str) -> amqp.Connection:
    connection = amqp.Connection(f"127.0.0.1:{broker.port}", virtual_host=vhost)
    connection.connect()
    return connection


def fill(broker: RabbitMQ, vhost: str, limit: int | None) -> None:
    """The two queues, and the messages in the first one."""
    with connect(broker, vhost) as connection:
        channel = connection.channel()
        channel.queue_declare("dead", durable=True, auto_delete=False)
        arguments = {
            "x-queue-type": "quorum",
            "x-dead-letter-exchange": "",
            "x-dead-letter-routing-key": "dead",
        } | ({} if limit is None else {"x-delivery-limit": limit})
        channel.queue_declare("q", durable=True, auto_delete=False, arguments=arguments)
        channel.confirm_select()
        for number in range(MESSAGES):
            channel.basic_publish_confirm(amqp.Message(str(number), delivery_mode=2), routing_key="q")


def take(channel: amqp.Channel, count: int) -> list[amqp.Message]:
    """Up to `count` messages, unacknowledged."""
    found: list[amqp.Message] = []
    channel.basic_qos(0, count, False)
    channel.basic_consume("q", callback=found.append)
    try:
        while len(found) < count:
            channel.connection.drain_events(timeout=2)
    except TimeoutError:
        pass
    return found


def measure(broker: RabbitMQ, limit: int | None, way: str) -> tuple[int, int, int]:
    """(ready in the queue, dead, deliveries counted by the broker on what is left)."""
    vhost = broker.vhost()
    fill(broker, vhost, limit)
    for _ in range(ENDS):
        connection = connect(broker, vhost)
        channel = connection.channel()
        messages = take(channel, MESSAGES)
        if not messages:
            connection.close()
            break
        if way == "channel":
            channel.close()
        elif way == "requeue":
            for message in messages:
                channel.basic_reject(message.delivery_tag, requeue=True)
        if way == "connection":
            connection.transport.sock.close()  # as a crash does
            connection.collect()
        else:
            connection.close()
    wait_until(lambda: sum(broker.queues(vhost).values()) == MESSAGES, "all messages are accounted for", 30)
    queues = broker.queues(vhost)
    counted = 0
    with connect(broker, vhost) as connection:
        left = take(connection.channel(), 1) if queues["q"] else []
        if left:
            counted = int(left[0].headers.get("x-delivery-count", 0)) if left[0].headers else 0
    broker.drop_vhost(vhost)
    return queues["q"], queues["dead"], counted


def main(suites: list[str]) -> None:
    """Print the table."""
    print(ROW.format("suite", "version", "way", "limit", "left", "dead", "counted"), flush=True)
    for suite in suites or SUITES:
        with tempfile.TemporaryDirectory(prefix="vbrun-", dir="/tmp", ignore_cleanup_errors=True) as folder:
            broker = RabbitMQ.shared(Path(folder) / "rabbitmq", root=suite_root(suite, RABBITMQ))
            try:
                version = broker.version()
                for way in WAYS:
                    for name, limit in LIMITS.items():
                        try:
                            row = measure(broker, limit, way)
                        except amqp.AMQPError as error:
                            print(
                                ROW.format(suite, version, way, name, "-", "-", str(error)[:60]), flush=True
                            )
                            continue
                        print(ROW.format(suite, version, way, name, *row), flush=True)
            finally:
                broker.close()


if __name__ == "__main__":
    main(sys.argv[1:])
