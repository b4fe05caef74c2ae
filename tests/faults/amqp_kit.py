"""What the AMQP fault scenarios share: a publisher under load, and the account of what arrived.

The obligations are the records that were made, never what is read back from the bus under test.
"""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import kombu

from tests.brokers.rabbitmq import RabbitMQ
from tests.faultkit import TcpFaultProxy
from tests.waiting import wait_until
from virtbus.bus import BusOptions
from virtbus.bus.amqp.bus import AmqpBus
from virtbus.errors import BusDenied, BusUnavailable
from virtbus.model import Confirmed, Deferred, Record
from virtbus.retry import Backoff
from virtbus.telemetry import METRICS, configure
from virtbus.testing import ListFeed, records

QUEUE = "load"


@contextmanager
def private_broker() -> Iterator[RabbitMQ]:
    """A node of this scenario's own."""
    configure(level="error")
    folder = Path(tempfile.mkdtemp(prefix="vbfaults-", dir="/tmp"))  # short, for its sockets
    broker = RabbitMQ.shared(folder / "rabbitmq")
    try:
        yield broker
    finally:
        broker.close()
        with suppress(TimeoutError):  # the node writes until it has ended
            wait_until(
                lambda: shutil.rmtree(folder, ignore_errors=True) or not folder.exists(), what="cleaning up"
            )


def report(name: str, runs: int, accounts: Sequence[Account], *, good: bool = True, **more: object) -> None:
    """Print the scenario's one line, and end the process: 0 when nothing was lost and all else is `good`."""
    lost = sum(account.lost + account.changed for account in accounts)
    disorder = sum(account.out_of_order for account in accounts)
    words = {
        "runs": runs,
        "events": sum(account.sent for account in accounts),
        "lost": lost,
        "duplicates": sum(account.duplicates for account in accounts),
        "out_of_order": disorder,
        "reconnect_max_seconds": round(max(one.reconnect_max_seconds for one in accounts), 2),
        **more,
    }
    print(name, *(f"{key}={value}" for key, value in words.items()), flush=True)
    sys.exit(0 if good and lost == 0 and disorder == 0 else 1)


@dataclass
class Account:
    """What became of the obligations."""

    sent: int
    lost: int
    duplicates: int
    out_of_order: int
    changed: int = 0
    reconnect_max_seconds: float = 0.0
    found_seconds: float = 0.0
    blocked_seconds: float = 0.0
    reconnects: int = 0
    drain_rate: float = 0.0  # events a second

    def assert_nothing_lost_and_ordered(self) -> None:
        assert (self.lost, self.out_of_order, self.changed) == (0, 0, 0), self


def check(items: Sequence[Record], stored: Sequence[tuple[str, bytes]]) -> Account:
    """Compare what was to arrive with (id, body) of what did, in its order."""
    by_id = {record.id: record for record in items}
    seen: set[str] = set()
    newest: dict[str, int] = {}
    duplicates = disorder = changed = 0
    for event_id, body in stored:
        record = by_id[event_id]
        changed += body != record.body
        if event_id in seen:
            duplicates += 1
            continue  # a repeat of what is there already disturbs nobody's order
        seen.add(event_id)
        disorder += record.seq < newest.get(record.key, 0)
        newest[record.key] = record.seq
    return Account(len(items), len(by_id) - len(seen), duplicates, disorder, changed)


def drain_queue(url: str, queue: str) -> list[tuple[str, bytes]]:
    """(id, body) of everything in the queue, in its order; empties it."""
    found: list[tuple[str, bytes]] = []
    with kombu.Connection(url) as connection:
        channel = connection.channel()
        last = channel.queue_declare(queue, passive=True).message_count
        channel.basic_qos(0, 500, False)

        def take(message: object) -> None:
            body = message.body  # type: ignore[attr-defined]
            identity = message.properties["message_id"]  # type: ignore[attr-defined]
            found.append((identity, body.encode() if isinstance(body, str) else body))

        channel.basic_consume(queue, callback=take, no_ack=True)
        while len(found) < last:
            connection.drain_events(timeout=10)
    return found


def make_queue(url: str, queue: str = QUEUE) -> None:
    """A durable queue that gets everything."""
    with kombu.Connection(url) as connection:
        channel = connection.channel()
        channel.exchange_declare("virtbus.events", type="topic", durable=True, auto_delete=False)
        channel.queue_declare(queue, durable=True, auto_delete=False)
        channel.queue_bind(queue, "virtbus.events", "#")


def close_connections(broker: RabbitMQ, vhost: str) -> None:
    """The broker closes every connection of a virtual host."""
    broker.eval(
        "lists:foreach(fun(P) -> rabbit_networking:close_connection(P, <<\"test\">>) end, "
        "[proplists:get_value(pid, I) || I <- rabbit_networking:connection_info_all([pid, vhost]), "
        f'proplists:get_value(vhost, I) =:= <<"{vhost}">>]).'
    )  # fmt: skip


class Load:
    """A thread that publishes a list as the agent does: outcomes settled, backoff after trouble, ticks."""

    def __init__(self, bus: AmqpBus, items: Sequence[Record], *, rate: float) -> None:
        """`rate` records a second are added to the feed; the rest waits."""
        self.bus = bus
        self.feed = ListFeed()
        self._items = items
        self._rate = rate
        self._stop = threading.Event()
        self.confirmed_at: list[float] = []
        self.troubles: list[tuple[float, str]] = []
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def finish(self, timeout: float) -> None:
        """Wait until everything is confirmed."""
        self._thread.join(timeout)
        if self._thread.is_alive():
            self._stop.set()
            raise TimeoutError(f"{len(self._items) - len(self.confirmed_at)} records were never confirmed")

    def _run(self) -> None:
        backoff = Backoff("load", hook=lambda event: None)
        begun, added = time.monotonic(), 0
        while len(self.confirmed_at) < len(self._items) and not self._stop.is_set():
            due = min(len(self._items), int((time.monotonic() - begun) * self._rate) + 1)
            for record in self._items[added:due]:
                self.feed.add(record)
            added = max(added, due)
            error: Exception | None = None
            try:
                for record, outcome in self.bus.publish(self.feed):
                    self.feed.settle(record, outcome)
                    if isinstance(outcome, Confirmed):
                        self.confirmed_at.append(time.monotonic())
                        backoff.reset()
                    elif isinstance(outcome, Deferred):
                        error = outcome.error
            except (BusUnavailable, BusDenied) as unavailable:
                error = unavailable
            if error is not None:
                self.troubles.append((time.monotonic(), str(error)))
                backoff.wait(self._stop, error)
            elif not len(self.feed):
                self.bus.tick()
                self._stop.wait(0.005)


def restart(broker: RabbitMQ, *, runs: int, events: int, kill: bool = False) -> Account:
    """Restart (or kill -9) the broker `runs` times under load."""
    url = broker.url(broker.vhost())
    make_queue(url)
    items = records(events, keys=100)
    bus = AmqpBus(url, options=BusOptions())
    load = Load(bus, items, rate=events / (2.0 + 10.0 * runs))
    load.start()
    slowest = 0.0
    for _ in range(runs):
        count = len(load.confirmed_at)
        wait_until(lambda count=count: len(load.confirmed_at) > count + 50, timeout=60, what="load")  # type: ignore[misc]
        if kill:
            broker.kill(signal.SIGKILL)
            broker.start()
        else:
            broker.restart()
        up = time.monotonic()
        count = len(load.confirmed_at)
        wait_until(lambda count=count: len(load.confirmed_at) > count, timeout=60, what="reconnect")  # type: ignore[misc]
        slowest = max(slowest, load.confirmed_at[count] - up)
    load.finish(120)
    bus.close()
    account = check(items, drain_queue(url, QUEUE))
    account.reconnect_max_seconds = max(0.0, slowest)
    return account


def black_hole(
    broker: RabbitMQ, vhost: str, *, seconds: float, heartbeat: float, backlog: int, keys: int = 1000
) -> Account:
    """The network swallows everything for `seconds` under load; then a backlog drains."""
    direct = broker.url(vhost)
    make_queue(direct)
    items = records(200 + backlog, keys=keys)
    early, late = items[:200], items[200:]
    with TcpFaultProxy("127.0.0.1", broker.port) as proxy:
        url = f"amqp://guest:guest@{proxy.host}:{proxy.port}/{vhost}"
        bus = AmqpBus(url, options=BusOptions(heartbeat=heartbeat))
        load = Load(bus, early, rate=1e9)
        load.start()
        load.finish(60)
        more = Load(bus, late, rate=1e9)
        proxy.black_hole()
        began = time.monotonic()
        more.start()
        time.sleep(seconds)
        proxy.heal()
        healed = time.monotonic()
        more.finish(600)
        drained = time.monotonic()
        bus.close()
        account = check(items, drain_queue(direct, QUEUE))
    account.found_seconds = more.troubles[0][0] - began if more.troubles else 0.0
    account.reconnect_max_seconds = more.confirmed_at[0] - healed
    account.drain_rate = len(late) / (drained - more.confirmed_at[0])
    return account


def alarm(broker: RabbitMQ, *, seconds: float) -> Account:
    """The memory alarm for `seconds` under load."""
    url = broker.url(broker.vhost())
    make_queue(url)
    items = records(int(200 * (seconds + 4)), keys=100)
    bus = AmqpBus(url, options=BusOptions())
    load = Load(bus, items, rate=200.0)
    load.start()
    wait_until(lambda: len(load.confirmed_at) > 50, what="load")
    before = METRICS.bus_reconnects._value.get()
    with broker.memory_alarm():
        blocked = wait_until(lambda: METRICS.bus_blocked._value.get() == 1, timeout=20, what="the gauge")
        confirmed = len(load.confirmed_at)
        time.sleep(seconds)
        assert len(load.confirmed_at) - confirmed <= 256, "published under the alarm"
    load.finish(120)
    bus.close()
    account = check(items, drain_queue(url, QUEUE))
    account.blocked_seconds = blocked
    account.reconnects = int(METRICS.bus_reconnects._value.get() - before)
    return account
