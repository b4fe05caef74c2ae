"""One active member of a group: the second stands by, or takes over; never do two act."""

from __future__ import annotations

import threading
import time

import pytest

from tests.faults.consumer_kit import GROUP, make_group
from tests.faults.consumer_kit import publish as send
from virtbus.bus import BusOptions, open_bus
from virtbus.consumer import Consumer
from virtbus.errors import BusDenied
from virtbus.testing import ListFeed, records


def publish(url: str, options: BusOptions, count: int = 10) -> None:
    bus = open_bus(url, options)
    ListFeed(records(count, keys=5)).drain(bus)
    bus.close()


def drain(consumer: Consumer, wait: float = 3.0) -> int:
    found = 0
    while (delivery := consumer.receive(wait)) is not None:
        delivery.ack()
        found += 1
    return found


@pytest.mark.parametrize("kind", ["amqp", "embedded"])
def test_the_second_stands_by_until_the_first_is_gone(kind, request, tmp_path):
    url = request.getfixturevalue("amqp_url") if kind == "amqp" else f"embedded://{tmp_path}/bus.db"
    options = BusOptions()
    first = Consumer(url, group="solo", exclusive=True)
    assert first.receive(1.0) is None
    second = Consumer(url, group="solo", exclusive=True)
    assert second.receive(1.0) is None
    publish(url, options)
    assert second.receive(1.0) is None
    assert drain(first) == 10
    publish(url, options)
    first.close()
    assert drain(second) == 10
    second.close()


def test_with_kafka_the_newer_takes_over_and_the_older_is_told(kafka_url, kafka_topic):
    options = BusOptions(topic=kafka_topic)
    first = Consumer(kafka_url, group="solo", options=options, exclusive=True)
    first.receive(1.0)
    publish(kafka_url, options)
    assert drain(first, 5.0) == 10
    second = Consumer(kafka_url, group="solo", options=options, exclusive=True)
    second.receive(6.0)
    with pytest.raises(BusDenied, match="took over"):
        for _ in range(60):
            first.receive(1.0)
    publish(kafka_url, options)
    assert drain(second, 8.0) == 10
    first.close()
    second.close()


def test_members_that_start_at_the_same_time_keep_the_order_of_a_domain(amqp_url: str) -> None:
    """Each subscribes several times: were another's in between, the queue would go to and fro."""
    make_group(amqp_url)
    send(amqp_url, records(40))  # of one domain
    members, handled, done = 3, [], threading.Event()
    together = threading.Barrier(members)

    def work() -> None:
        with Consumer(amqp_url, group=GROUP) as consumer:
            together.wait()
            while not done.is_set():
                delivery = consumer.receive(0.2)
                if delivery is not None:
                    handled.append(int(delivery.attributes["sequence"]))
                    time.sleep(0.01)  # so that another one could come in between
                    handled.append(int(delivery.attributes["sequence"]))
                    delivery.ack()

    threads = [threading.Thread(target=work) for _ in range(members)]
    for thread in threads:
        thread.start()
    until = time.monotonic() + 60
    while len(set(handled)) < 40 and time.monotonic() < until:
        time.sleep(0.05)
    done.set()
    for thread in threads:
        thread.join()
    assert handled == [number for number in range(1, 41) for _ in range(2)]
