"""Unroutable, nacked, 403, 404, 406: python -m tests.faults.amqp_refusals [runs]

`marked_delivered` counts records that were called confirmed and are in no queue; `next_max_seconds` is the
longest time from the fault (or, where the whole exchange is refused, from its repair) to the next confirm.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import kombu

from tests.brokers.rabbitmq import RabbitMQ
from tests.faults.amqp_kit import drain_queue, private_broker
from virtbus.bus import BusOptions
from virtbus.bus.amqp.bus import AmqpBus
from virtbus.model import Confirmed, Deferred, Record
from virtbus.testing import ListFeed, records

COUNT = 20


def declare(url: str, keys: list[str] | None = None, **arguments: object) -> None:
    """The exchange and the queue "all", bound for every routing key, or for those of `keys` alone."""
    with kombu.Connection(url) as connection:
        channel = connection.channel()
        channel.exchange_declare("virtbus.events", type="topic", durable=True, auto_delete=False)
        channel.queue_declare("all", durable=True, auto_delete=False, arguments=arguments)
        for binding in ["#"] if keys is None else [f"io_error.*.{key}" for key in keys]:
            channel.queue_bind("all", "virtbus.events", binding)


def publish(url: str, items: list[Record], mend: Callable[[], None] | None = None) -> tuple[int, float]:
    """Publish with a fault in the middle; (confirmed but in no queue, seconds to the next confirm).

    Without `mend` the fault is one record's, and the others must go on. With it nothing passes before.
    """
    feed = ListFeed(items)
    confirmed: list[str] = []
    confirmed_at: list[float] = []
    bus = AmqpBus(url, options=BusOptions(declare=False))
    fault_at: float | None = None
    for attempt in range(6):
        for record, outcome in bus.publish(feed):
            feed.settle(record, outcome, again=isinstance(outcome, Deferred))
            now = time.monotonic()
            if isinstance(outcome, Confirmed):
                confirmed.append(record.id)
                confirmed_at.append(now)
            elif fault_at is None:
                fault_at = now
        if mend is not None and attempt == 1:
            assert not confirmed, "confirmed although the exchange refuses all"
            mend()
            fault_at = time.monotonic()
        if not len(feed):
            break
    bus.close()
    assert fault_at is not None, "the fault did not show"
    stored = {identity for identity, _ in drain_queue(url, "all")}
    after = [moment - fault_at for moment in confirmed_at if moment >= fault_at]
    return len(set(confirmed) - stored), min(after, default=0.0 if len(confirmed) >= COUNT - 1 else 99.0)


def scenarios(broker: RabbitMQ) -> dict[str, tuple[int, float]]:
    """Each fault once, in a virtual host of its own."""
    done: dict[str, tuple[int, float]] = {}

    vhost = broker.vhost()
    items = records(COUNT, keys=COUNT)
    declare(broker.url(vhost), [record.key for record in items[1:]])
    done["unroutable"] = publish(broker.url(vhost), items)

    vhost = broker.vhost()
    declare(broker.url(vhost), **{"x-max-length": COUNT - 1, "x-overflow": "reject-publish"})
    done["nack"] = publish(broker.url(vhost), items)

    vhost = broker.vhost()
    declare(broker.url(vhost))
    url = broker.user("denied", vhost, read=".*", configure=".*")
    done["403"] = publish(
        url, items, lambda: broker.permit("denied", vhost, write=".*", read=".*", configure=".*")
    )
    broker.permit_topic("denied", vhost, "virtbus.events", write=f"^(?!.*{items[3].key}).*$")
    done["403-topic"] = publish(url, items)

    vhost = broker.vhost()
    url = broker.url(vhost)
    done["404"] = publish(url, items, lambda: declare(url))

    vhost = broker.vhost()
    url = broker.url(vhost)
    declare(url)
    with broker.largest_message(100_000):
        big = [*items]
        big[4] = big[4]._replace(body=b'"' + b"x" * 200_000 + b'"')
        done["406"] = publish(url, big)
    return done


def main() -> None:
    """Print the line."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    worst: dict[str, float] = {}
    marked = 0
    with private_broker() as broker:
        for _ in range(runs):
            for name, (lies, seconds) in scenarios(broker).items():
                marked += lies
                worst[name] = max(worst.get(name, 0.0), seconds)
    slowest = max(worst.values())
    each = " ".join(f"{name}={seconds:.3f}" for name, seconds in worst.items())
    print(f"amqp_refusals runs={runs} marked_delivered={marked} next_max_seconds={slowest:.3f} {each}")
    sys.exit(0 if marked == 0 and slowest <= 1.0 else 1)


if __name__ == "__main__":
    main()
