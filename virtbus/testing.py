"""Fakes for tests of virtbus and of what is built on it; they ship with the package.

- events and records: `an_io_error()`, `a_resolved()`, `a_gap()`, `a_heartbeat()`, `a_record()`; every
  field of an event can be overridden by name, and all of them fit their schemas;
- `FakeSource` plays observations, `FakeBus` a broker that only takes, `ListFeed` feeds a bus from a list;
- `no_waiting()` takes the waiting out of retries.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import UTC, datetime, timedelta
from threading import Event as StopEvent
from typing import Any, TypeVar

from virtbus import envelope, model, observations, words
from virtbus.bus import Feed
from virtbus.errors import BusUnavailable
from virtbus.model import to_ns
from virtbus.retry import no_waiting  # noqa: F401 - a part of this module
from virtbus.sources import Sink

AGENT_ID = "6f1c3f5e-8f4e-4f0e-9c39-0c5b2c7b1a11"
EPOCH = "019a05f9-4236-73ae-a6f0-9a8f9d94abdd"
DOMAIN_UUID = "7b0e2d1c-5a34-4c1f-8f55-2f4c6a9d0e01"
MOMENT = datetime(2026, 3, 14, 9, 26, 53, 589793, tzinfo=UTC)

T = TypeVar("T")


def _overridable(make: Callable[[], T]) -> Callable[..., T]:
    """Every field of what is made can be overridden by name."""

    @functools.wraps(make)
    def made(**overrides: Any) -> T:
        return dataclasses.replace(make(), **overrides) if overrides else make()  # type: ignore[type-var]

    return made


@_overridable
def a_host() -> model.Host:
    """The hypervisor's host "compute-1"."""
    return model.Host(
        name="compute-1",
        uuid="3c8a1f0e-9a77-4a55-b2b3-0d3a4f1e2c01",
        boot_id="b1a7c0de-5f1d-4f3e-8d6b-6f2d1e0c9a11",
        hypervisor=model.Hypervisor("QEMU", "7.2.22", "9.0.0"),
    )


@_overridable
def a_domain() -> model.Domain:
    """The guest "web-1", running."""
    return model.Domain(uuid=DOMAIN_UUID, name="web-1", id=1, state=words.GuestState.RUNNING)


@_overridable
def a_device() -> model.Device:
    """The disk vda on an NBD export."""
    return model.Device(
        alias="virtio-disk0",
        target="vda",
        bus="virtio",
        kind="disk",
        serial="vol-1",
        source=model.DeviceSource(type="network", protocol="nbd", path="disk0", hosts=("storage-1:10809",)),
        policy=model.ErrorPolicy(write="stop", read="report"),
    )


@_overridable
def an_io_error() -> model.IoError:
    """An incident opens: a write failed and the guest was paused."""
    return model.IoError(
        host=a_host(),
        domain=a_domain(state=words.GuestState.PAUSED),
        device=a_device(),
        error=model.ErrorFacts(
            action=words.Action.PAUSE,
            action_code=1,
            reason=words.ENOSPC,
            path="disk0",
            message=None,
            disk_error=words.DiskError.NO_SPACE,
            occurred_at=MOMENT,
        ),
        occurrences=model.Occurrences(count=1, total=1, first=MOMENT, last=MOMENT),
        incident=model.Incident(
            id="019a05f9-4236-7000-8000-000000000001",
            phase=words.Phase.OPENED,
            opened_at=MOMENT,
            pauses=1,
        ),
        origin=words.Origin.EVENT,
        enriched=True,
    )


@_overridable
def a_resolved() -> model.IoErrorResolved:
    """The incident of `an_io_error` ends after 42 s: the guest was resumed."""
    return model.IoErrorResolved(
        host=a_host(),
        domain=a_domain(),
        device=a_device(),
        occurrences=model.ResolvedOccurrences(total=1, first=MOMENT, last=MOMENT),
        incident=model.Incident(
            id="019a05f9-4236-7000-8000-000000000001",
            phase=words.Phase.RESOLVED,
            opened_at=MOMENT,
            pauses=1,
        ),
        resolution=model.Resolution(words.ResolutionCause.RESUMED, MOMENT + timedelta(seconds=42), 42.0),
    )


@_overridable
def a_gap() -> model.Gap:
    """The agent was down for a minute."""
    return model.Gap(
        host=a_host(),
        agent_id=AGENT_ID,
        reason=words.GapReason.AGENT_DOWN,
        detail=None,
        started_at=MOMENT - timedelta(minutes=1),
        ended_at=MOMENT,
    )


@_overridable
def a_heartbeat() -> model.Heartbeat:
    """The agent lives, connected, with nothing open."""
    return model.Heartbeat(
        host=a_host(),
        agent_id=AGENT_ID,
        agent_version="0.1.0",
        epoch=EPOCH,
        started_at=MOMENT - timedelta(hours=1),
        sent_at=MOMENT,
        interval_seconds=60.0,
        source=model.SourceHealth(words.SourceState.CONNECTED, MOMENT - timedelta(hours=1)),
        backlog=model.Backlog(0, 0, None),
        committed_sequence=7,
        confirmed_sequence=7,
        incidents=model.OpenIncidents(0),
    )


def a_raw_io_error(**overrides: Any) -> observations.RawIoError:
    """Libvirt's callback as the source hands it over."""
    made = observations.RawIoError(
        DOMAIN_UUID, "web-1", 1, "disk0", "virtio-disk0", 1, words.ENOSPC, to_ns(MOMENT)
    )
    return made._replace(**overrides)


@_overridable
def a_stamp() -> model.Stamp:
    """A new id; sequence 1 of the epoch EPOCH unless overridden."""
    return model.Stamp(
        id=envelope.uuid7(time.time_ns()),
        agent_id=AGENT_ID,
        epoch=EPOCH,
        sequence=1,
        recorded_ns=to_ns(MOMENT),
    )


def a_record(event: model.Event | None = None, *, row: int = 1, **stamp: Any) -> model.Record:
    """An encoded event as a bus takes it; `stamp` overrides fields of its stamp (`sequence`, `id`, …)."""
    made = a_stamp(**{"sequence": row, **stamp})
    return envelope.record(envelope.encode(event or an_io_error(), made), made, row)


def records(count: int, *, keys: int = 1) -> list[model.Record]:
    """`count` records of `keys` domains in turn, with rows and sequences from 1.

    Encoded once a domain: fast enough for benchmarks. They differ in `id` and `sequence`.
    """
    uuids = [f"00000000-0000-4000-8000-{number:012d}" for number in range(keys)]
    patterns = [a_record(an_io_error(domain=a_domain(uuid=uuid))) for uuid in uuids]
    made = []
    for row in range(1, count + 1):
        pattern = patterns[(row - 1) % keys]
        stamp = a_stamp(sequence=row)
        attributes = {**pattern.attributes, "id": stamp.id, "sequence": f"{row:012d}"}
        made.append(pattern._replace(row=row, seq=row, id=stamp.id, attributes=attributes))
    return made


class ListFeed:
    """A feed over a list, with the manners of the spool: the oldest record of each key that is not taken.

    `settle(record, outcome)` as the agent does for each outcome of `publish`: a record that was not confirmed
    comes again (a refused one does not). `drain(bus)` does both until all is settled or nothing moves.
    `took` has the ids in the order they were taken, `outcomes` everything settled.
    """

    def __init__(self, items: Iterable[model.Record] = ()) -> None:
        """`items` in the order of the spool."""
        self._numbers = itertools.count()
        self._queues: dict[str, deque[tuple[int, model.Record]]] = {}  # by key
        self._ready: list[tuple[int, str]] = []  # a heap: the number of each free key's first record
        self._taken: dict[str, tuple[int, model.Record]] = {}  # by key
        self.took: list[str] = []
        self.outcomes: list[tuple[model.Record, model.Outcome]] = []
        self.most_taken = 0
        for record in items:
            self.add(record)

    def add(self, record: model.Record) -> None:
        """One more record, behind the others of its key."""
        waiting = self._queues.get(record.key)
        if waiting is None:
            waiting = self._queues[record.key] = deque()
        number = next(self._numbers)
        if not waiting and record.key not in self._taken:
            heapq.heappush(self._ready, (number, record.key))
        waiting.append((number, record))

    def __len__(self) -> int:
        return sum(len(waiting) for waiting in self._queues.values()) + len(self._taken)

    def take(self, limit: int, busy: AbstractSet[str]) -> Sequence[model.Record]:
        """See virtbus.bus.Feed."""
        out: list[model.Record] = []
        skipped = []
        while self._ready and len(out) < limit:
            number, key = heapq.heappop(self._ready)
            if key in busy:
                skipped.append((number, key))
                continue
            self._taken[key] = self._queues[key].popleft()
            out.append(self._taken[key][1])
        for entry in skipped:
            heapq.heappush(self._ready, entry)
        self.took += [record.id for record in out]
        self.most_taken = max(self.most_taken, len(self._taken))
        return out

    def settle(self, record: model.Record, outcome: model.Outcome, *, again: bool = True) -> None:
        """Say what became of a taken record; `again=False` gives up one that was not confirmed."""
        number, taken = self._taken.get(record.key, (0, None))
        if taken is not record:
            raise AssertionError(f"an outcome for record {record.row}, which is not taken")
        del self._taken[record.key]
        self.outcomes.append((record, outcome))
        waiting = self._queues[record.key]
        if again and not isinstance(outcome, model.Confirmed) and type(outcome).__name__ != "Refused":
            waiting.appendleft((number, record._replace(attempts=record.attempts + 1)))
        if waiting:
            heapq.heappush(self._ready, (waiting[0][0], record.key))

    def publish(self, bus: Any, *, again: bool = False) -> list[model.Outcome]:
        """One call of `bus.publish`, settled as it goes; the outcomes in the order they came.

        With `again` what was not confirmed comes again, also within this call.
        """
        outcomes = []
        for record, outcome in bus.publish(self):
            self.settle(record, outcome, again=again)
            outcomes.append(outcome)
        return outcomes

    def drain(self, bus: Any, *, timeout: float = 30.0) -> int:
        """Publish until nothing is left, over reconnects too; the number of confirmed records."""
        limit = time.monotonic() + timeout
        while len(self):
            if time.monotonic() > limit:
                raise TimeoutError(f"{len(self)} records are still not confirmed after {timeout:g} s")
            try:
                outcomes = self.publish(bus, again=True)
            except BusUnavailable:
                outcomes = []
            if not outcomes or not isinstance(outcomes[-1], model.Confirmed):
                time.sleep(0.02)
        return sum(isinstance(outcome, model.Confirmed) for _, outcome in self.outcomes)


class FakeSource:
    """A source that plays what it is given, and goes on with what `play` gives it while it runs.

    A script that does not begin with `SourceReady` gets one with no domains first.
    """

    def __init__(
        self,
        script: Iterable[observations.Observation] = (),
        *,
        host: model.Host | None = None,
        descriptions: Mapping[str, observations.Description] | None = None,
    ) -> None:
        """`descriptions` by domain UUID are what `describe` knows."""
        self.host = host or a_host()
        self.descriptions = dict(descriptions or {})
        self._script = list(script)
        self._more: queue.SimpleQueue[observations.Observation] = queue.SimpleQueue()
        self.running = threading.Event()

    def play(self, *observations: observations.Observation) -> None:
        """Observe these too; from any thread."""
        for observation in observations:
            self._more.put(observation)

    def run(self, sink: Sink, stop: StopEvent) -> None:
        """See virtbus.sources.Source."""
        if not self._script or not isinstance(self._script[0], observations.SourceReady):
            sink(self.snapshot())
        for observation in self._script:
            sink(observation)
        self.running.set()
        while not stop.is_set():
            try:
                sink(self._more.get(timeout=0.02))
            except queue.Empty:
                continue

    def describe(self, domain_uuid: str) -> observations.Description | None:
        """See virtbus.sources.Source."""
        return self.descriptions.get(domain_uuid)

    def snapshot(self) -> observations.SourceReady:
        """See virtbus.sources.Source."""
        return observations.SourceReady(host=self.host, at_ns=time.time_ns(), domains=())

    def probe(self) -> Sequence[model.Check]:
        """See virtbus.sources.Source."""
        return (model.Check("source", "ok", "a fake source"),)


# ------------------------------------------------------------------------------------- a bus

Decide = Callable[[model.Record], model.Outcome]


class FakeBus:
    """A broker in memory, as a publisher sees it; `decide` says what becomes of each record.

    `delivered` has what was confirmed, in order. `unavailable`, when set, is raised by `publish`. A test that
    consumes, too, takes `embedded:`, which is a real bus in a file.
    """

    def __init__(self, decide: Decide = lambda record: model.Confirmed()) -> None:
        """`decide` may return any outcome; a `Deferred` ends that `publish`, as the contract says."""
        self.decide = decide
        self.unavailable: Exception | None = None
        self.delivered: list[model.Record] = []
        self.closed = False

    def publish(self, feed: Feed) -> Iterator[tuple[model.Record, model.Outcome]]:
        """See virtbus.bus.Publishing."""
        if self.closed:
            raise BusUnavailable("the bus was closed")
        if self.unavailable is not None:
            raise self.unavailable
        deferred = False
        while not (deferred or self.closed) and (taken := feed.take(16, frozenset())):
            for record in taken:
                outcome = self.decide(record)
                if isinstance(outcome, model.Confirmed):
                    self.delivered.append(record)
                deferred = deferred or type(outcome).__name__ == "Deferred"
                yield record, outcome

    def tick(self) -> None:
        """See virtbus.bus.Publishing: there is no peer."""

    def close(self) -> None:
        """See virtbus.bus.Publishing."""
        self.closed = True
