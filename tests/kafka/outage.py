"""Load on a bus while brokers die, and the account afterwards: lost, duplicates, order, time to recover."""

from __future__ import annotations

import dataclasses
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from tests.kafka.help import headers, read
from virtbus.bus import Bus
from virtbus.errors import BusDenied, BusUnavailable
from virtbus.model import Confirmed, Outcome, Record
from virtbus.testing import a_record


class Load:
    """An endless feed of numbered records; what is not confirmed comes first when its key comes again."""

    def __init__(self, keys: int = 50, a_second: int = 500) -> None:
        self._template = a_record()
        self.keys = [f"domain-{number}" for number in range(keys)]
        self._again: dict[str, deque[Record]] = {key: deque() for key in self.keys}
        self._number = 0
        self._pace = a_second
        self._begun = time.monotonic()
        self.made: list[Record] = []
        self.over = False
        self.confirmed: list[float] = []
        self.last_confirmed: dict[str, float] = {}  # by key

    def take(self, limit: int, busy: AbstractSet[str]) -> Sequence[Record]:
        taken: list[Record] = []
        for key in self.keys:
            if len(taken) == limit:
                break
            if key in busy:
                continue
            if self._again[key]:
                taken.append(self._again[key].popleft())
            elif not self.over and len(self.made) < (time.monotonic() - self._begun) * self._pace:
                taken.append(self._new(key))
        return taken

    def _new(self, key: str) -> Record:
        self._number += 1
        event_id = str(uuid.uuid4())
        attributes = {
            **self._template.attributes,
            "id": event_id,
            "partitionkey": key,
            "sequence": f"{self._number:012d}",
        }
        record = self._template._replace(id=event_id, key=key, seq=self._number, attributes=attributes)
        self.made.append(record)
        return record

    def settle(self, record: Record, outcome: Outcome) -> None:
        if isinstance(outcome, Confirmed):
            self.confirmed.append(time.monotonic())
            self.last_confirmed[record.key] = self.confirmed[-1]
        else:
            self._again[record.key].appendleft(record)

    @property
    def left(self) -> int:
        return len(self.made) - len(self.confirmed)


@dataclasses.dataclass(frozen=True)
class Account:
    """What became of a run."""

    runs: int
    sent: int
    lost: int
    duplicates: int
    disordered: int
    rebuilt_max_seconds: float

    def line(self, name: str) -> str:
        """One line for a person and for grep."""
        return (
            f"{name} runs={self.runs} sent={self.sent} lost={self.lost} duplicates={self.duplicates} "
            f"disordered={self.disordered} rebuilt_max_seconds={self.rebuilt_max_seconds:.2f}"
        )


def run(
    bus: Bus,
    url: Callable[[], str],
    topic: str,
    outages: int,
    outage: Callable[[int], Any],
    pause: float = 1.0,
) -> Account:
    """Publish under load; call `outage(number)` `outages` times, which returns when brokers can answer.

    Rebuilt is when every key, so every partition that has one, was confirmed again.
    """
    load = Load()
    failure: list[BaseException] = []

    def publish() -> None:
        try:
            while not (load.over and load.left == 0):
                try:
                    for record, outcome in bus.publish(load):
                        load.settle(record, outcome)
                    bus.tick()
                    time.sleep(0.02)
                except (BusUnavailable, BusDenied):
                    time.sleep(0.1)
        except BaseException as error:
            failure.append(error)
            raise

    thread = threading.Thread(target=publish, daemon=True)
    thread.start()
    _wait(lambda: len(load.last_confirmed) == len(load.keys), "the first confirmations", failure)
    slowest = 0.0
    for number in range(outages):
        time.sleep(pause)
        outage(number)
        back = time.monotonic()
        _wait(
            lambda since=back: min(list(load.last_confirmed.values())) > since,
            "a confirmation of every key after the outage",
            failure,
        )
        slowest = max(slowest, time.monotonic() - back)
    load.over = True
    thread.join(60)
    assert not thread.is_alive(), f"{load.left} records not confirmed a minute after the last outage"
    if failure:
        raise failure[0]
    return _account(load, url(), topic, outages, slowest)


def _wait(condition: Callable[[], bool], what: str, failure: list[BaseException]) -> None:
    limit = time.monotonic() + 60
    while not condition():
        if failure:
            raise failure[0]
        if time.monotonic() > limit:
            raise TimeoutError(f"no {what} within 60 s")
        time.sleep(0.01)


def _account(load: Load, url: str, topic: str, outages: int, slowest: float) -> Account:
    ids = {record.id for record in load.made}
    found: dict[str, int] = {}
    first_copies: dict[bytes, list[int]] = {}
    copies = 0
    for message in read(url, topic, len(ids), seconds=60, quiet=2.0):
        copies += 1
        told = headers(message)
        if told["ce_id"] not in found:
            found[told["ce_id"]] = 1
            first_copies.setdefault(message.key(), []).append(int(told["ce_sequence"]))
    return Account(
        runs=outages,
        sent=len(ids),
        lost=len(ids - set(found)),
        duplicates=copies - len(found),
        disordered=sum(numbers != sorted(numbers) for numbers in first_copies.values()),
        rebuilt_max_seconds=slowest,
    )
