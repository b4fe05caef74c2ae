"""Between libvirt's thread and ours: the queue that folds, and the folding of what was drained."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import replace

from virtbus.model import (
    Burst,
    CallbackLost,
    DeviceRemoved,
    DomainGone,
    DomainHalted,
    DomainResumed,
    HostKnown,
    Observation,
    RawIoError,
    SourceGone,
    SourceLost,
    SourceReady,
    SourceSeen,
    Surveyed,
)
from virtbus.telemetry import METRICS
from virtbus.words import Origin

QUEUE_LIMIT = 10_000  # callbacks; beyond it they fold into counters
FOLD_LIMIT = 10_000  # different (device, action, reason) counters; beyond it errors are counted as dropped
_SELF = 4  # words of a connection about itself that always find room: seen, lost, ready, its host
BATCH_LIMIT = 20_000  # observations a transaction


class IntakeQueue:
    """Between libvirt's thread and ours: bounded, lossless in counts, a microsecond a call.

    Guarantees:
    1. `put` never blocks on anything but a lock held for microseconds, and never raises;
    2. above `limit` queued, errors fold into one counter a (device, action, reason), and with `fold_limit` of
       these into one a (domain, action, reason), whose device is unknown: counts stay exact;
    3. an error never changes sides with a lifecycle observation that came after it; when there is no room
       for each of those either, the last of its kind stays, and stands behind or before a domain's errors as
       the last of these did: so the domain's state in the end is the true one;
    4. a connection's losses and returns that find no room become one of each, which says what all said;
    5. what can't be kept even so is counted in `take_dropped`; no more than `limit` and three times
       `fold_limit` are kept together (each connection beyond the first may add three);
    6. a `SourceSeen` leaves behind everything that was put before it.
    """

    def __init__(self, limit: int = QUEUE_LIMIT, fold_limit: int = FOLD_LIMIT) -> None:
        self._limit = limit
        self._fold_limit = fold_limit
        self._items: deque[Observation] = deque()
        self._folded: dict[tuple[object, ...], Observation] = {}
        self._lock = threading.Lock()
        self._ready = threading.Event()
        self._dropped_errors = 0
        self._dropped_others = 0
        self._unread: tuple[int, str] = (0, "")
        self.emptied = True  # the last `drain` took everything that was there when it began

    def put(self, observation: Observation) -> None:
        """Take one observation; the sink of a source."""
        if isinstance(observation, CallbackLost):
            with self._lock:
                self._unread = (self._unread[0] + 1, observation.why)
        elif len(self._items) < self._limit and not self._folded:
            self._items.append(observation)
        else:
            self._put_folded(observation)
        if not self._ready.is_set():
            self._ready.set()

    def _put_folded(self, observation: Observation) -> None:
        with self._lock:
            if isinstance(observation, SourceSeen):
                # Behind all that is folded, which leaves in one batch with it: it needs no barrier.
                self._put_last((SourceSeen, observation.connection), observation)
                return
            if not isinstance(observation, RawIoError):
                if len(self._items) + len(self._folded) >= self._limit + self._fold_limit:
                    self._put_crowded(observation)
                    return
                # A barrier: what was folded before it must be told before it.
                self._unfold()
                self._items.append(observation)
                return
            key = _same_error(observation)
            if key not in self._folded and len(self._folded) >= self._fold_limit:
                observation = observation._replace(path="", alias="")
                key = _same_error(observation)
            burst, at = self._folded.get(key), observation.observed_at
            if isinstance(burst, Burst):
                if next(reversed(self._folded)) != key:  # so it never looks empty to `put`
                    del self._folded[key]  # goes to the end, behind the last words that came since
                self._folded[key] = Burst(burst.raw, burst.count + 1, burst.first_ns, at)
            elif self._has_room():
                self._folded[key] = Burst(observation, 1, at, at)
            else:
                self._dropped_errors += 1
                return
        METRICS.folded.inc()

    def _has_room(self) -> bool:
        """For one more thing that nothing of its kind can be folded into."""
        kept = len(self._items) + len(self._folded)
        return len(self._folded) < 2 * self._fold_limit and kept < self._limit + 3 * self._fold_limit - _SELF

    def _put_last(self, key: tuple[object, ...], observation: Observation) -> None:
        self._folded[key] = observation  # first, so that it never looks empty to `put`
        if next(reversed(self._folded)) != key:
            self._folded[key] = self._folded.pop(key)

    def _put_crowded(self, observation: Observation) -> None:
        """Keep the last word about a domain, device or connection: memory before order, and it is told."""
        if isinstance(observation, SourceReady | SourceLost):
            key: tuple[object, ...] = (type(observation), observation.connection)
            self._put_last(key, self._joined(self._folded.get(key), observation))
            return
        if isinstance(observation, HostKnown):
            self._put_last((HostKnown,), observation)
            return
        if isinstance(observation, SourceGone | Surveyed) and self._has_room():
            self._put_last((type(observation), getattr(observation, "connection", None)), observation)
            return
        if isinstance(observation, DomainResumed | DomainHalted | DomainGone | DeviceRemoved):
            key = (type(observation), observation.domain_uuid, getattr(observation, "alias", None))
            replaced = key in self._folded
            if replaced or self._has_room():
                self._put_last(key, observation)
                self._dropped_others += replaced
                return
        self._dropped_errors += callbacks_in(observation)
        self._dropped_others += not callbacks_in(observation)

    def _joined(self, before: Observation | None, now: SourceReady | SourceLost) -> Observation:
        """Two losses are one since the first; two returns are the last one with the findings of both."""
        if isinstance(before, SourceLost) and isinstance(now, SourceLost):
            return replace(now, at_ns=min(before.at_ns, now.at_ns))
        if isinstance(before, SourceReady) and isinstance(now, SourceReady):
            findings = before.findings + now.findings
            self._dropped_errors += max(0, len(findings) - self._fold_limit)
            return replace(now, findings=findings[-self._fold_limit :])
        return now

    def drain(self, timeout: float) -> list[Observation]:
        """Wait up to `timeout` seconds, then take at most BATCH_LIMIT observations, oldest first."""
        if not self._items and not self._folded:
            self._ready.wait(timeout)
        self._ready.clear()
        items = self._items
        with self._lock:
            self.emptied = len(items) <= BATCH_LIMIT
            if self.emptied and self._folded:
                self._unfold()
            count = len(items) if self.emptied else BATCH_LIMIT  # `put` may append meanwhile
        taken = [items.popleft() for _ in range(count)]
        if items or self._folded:
            self._ready.set()
        return taken

    def _unfold(self) -> None:
        """Queue what was folded, proofs last. The lock is held; `_folded` never looks empty too early."""
        self._items.extend(sorted(self._folded.values(), key=lambda each: isinstance(each, SourceSeen)))
        self._folded = {}

    def wake(self) -> None:
        """Let a waiting `drain` return."""
        self._ready.set()

    def take_dropped(self) -> tuple[int, int]:
        """(errors, other observations) that were dropped since the last call."""
        with self._lock:
            dropped = (self._dropped_errors, self._dropped_others)
            self._dropped_errors = self._dropped_others = 0
        return dropped

    @property
    def unread(self) -> int:
        """How many callbacks came since the last `take_unread` that nobody could read."""
        return self._unread[0]

    def take_unread(self) -> tuple[int, str]:
        """(how many callbacks came since the last call that nobody could read, what the last one was)."""
        with self._lock:
            unread, self._unread = self._unread, (0, "")
        return unread

    def __len__(self) -> int:
        return len(self._items) + len(self._folded)


def _same_error(raw: RawIoError) -> tuple[object, ...]:
    return (raw.domain_uuid, raw.alias, raw.path, raw.action_code, raw.reason)


def aggregate(observations: Iterable[Observation]) -> list[Observation]:
    """Equal raw errors become one Burst, ordered by their last time; anything else is a barrier between."""
    out: list[Observation] = []
    groups: dict[tuple[object, ...], list[object]] = {}  # key → [raw, count, last_ns]

    def flush() -> None:
        bursts = [
            Burst(raw, count, raw.observed_at, last)  # type: ignore[attr-defined, arg-type]
            for raw, count, last in groups.values()
        ]
        bursts.sort(key=lambda burst: burst.last_ns)
        out.extend(bursts)
        groups.clear()

    for item in observations:
        if isinstance(item, RawIoError):
            key = _same_error(item)
            group = groups.get(key)
            if group is None:
                groups[key] = [item, 1, item.observed_at]
            else:
                group[1] += 1  # type: ignore[operator]
                group[2] = item.observed_at
        else:
            if groups:
                flush()
            out.append(item)
    if groups:
        flush()
    return out


def callbacks_in(item: Observation) -> int:
    """How many calls of libvirt's I/O-error callback stand behind an observation."""
    if isinstance(item, RawIoError):
        return 1
    return item.count if isinstance(item, Burst) and item.origin is Origin.EVENT else 0
