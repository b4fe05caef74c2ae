"""Parts of the embedded bus's tests: records, a feed, and processes that can be killed."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from virtbus.bus import Bus, Subscription
from virtbus.model import Confirmed, Message, Outcome, Record

ROOT = Path(__file__).parents[2]


class ListFeed:
    """A feed over a list; what comes back unconfirmed is put back in its place."""

    def __init__(self, records: Iterable[Record]) -> None:
        self.left = list(records)

    def take(self, limit: int, busy: AbstractSet[str]) -> Sequence[Record]:
        taken: list[Record] = []
        keys = set(busy)
        for record in self.left:
            if record.key not in keys and len(taken) < limit:
                taken.append(record)
            keys.add(record.key)
        self.left = [record for record in self.left if record not in taken]
        return taken


def make_record(number: int, key: str = "11111111-1111-4111-8111-111111111111", size: int = 300) -> Record:
    """An event as the spool would hand it over; its body holds `number`."""
    attributes = {
        "specversion": "1.0",
        "id": str(uuid4()),
        "source": "/virtbus/agents/22222222-2222-4222-8222-222222222222",
        "type": "io.virtbus.domain.io_error.v1",
        "subject": f"{key}/virtio-disk0",
        "partitionkey": key,
        "time": "2026-01-01T00:00:00.000000Z",
        "datacontenttype": "application/json",
        "epoch": "33333333-3333-4333-8333-333333333333",
        "sequence": f"{number:012d}",
    }
    body = b'{"n":%d,"pad":"%s"}' % (number, b"x" * size)
    return Record(number, attributes["epoch"], number, attributes["id"], key, attributes, body, 0)


def publish(bus: Bus, records: Iterable[Record]) -> list[Outcome]:
    """Publish and give the outcomes in the order of the records."""
    records = list(records)
    outcomes = {record.id: outcome for record, outcome in bus.publish(ListFeed(records))}
    return [outcomes[record.id] for record in records if record.id in outcomes]


def publish_all(bus: Bus, records: Iterable[Record]) -> list[Record]:
    """Publish what must be confirmed."""
    records = list(records)
    outcomes = publish(bus, records)
    assert len(outcomes) == len(records)
    assert all(isinstance(outcome, Confirmed) for outcome in outcomes), outcomes
    return records


def event_id(message: Message) -> str:
    return str(message.headers["ce-id"])


def receive(subscription: Subscription, timeout: float = 5.0) -> Message:
    message = subscription.receive(timeout)
    assert message is not None, f"nothing came in {timeout} s"
    return message


def drain(subscription: Subscription, timeout: float = 0.3) -> list[str]:
    """Receive and acknowledge until nothing comes for `timeout` seconds; the events' ids."""
    ids = []
    while (message := subscription.receive(timeout)) is not None:
        subscription.ack(message)
        ids.append(event_id(message))
    return ids


@contextmanager
def child(role: str, *args: object, prefix: Sequence[str] = ()) -> Iterator[subprocess.Popen[str]]:
    """A process of `embedded_child`; killed at the end if it still runs."""
    command = [*prefix, sys.executable, "-m", "tests.bus.embedded_child", role, *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def line(process: subprocess.Popen[str]) -> str:
    """The next line a child prints."""
    assert process.stdout is not None
    text = process.stdout.readline()
    assert text, f"the child ended with {process.wait()}"
    return text.rstrip("\n")
