"""Between libvirt's thread and ours: the queue that folds, and the folding of what was drained."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import replace

from virtbus.observations import (
    Burst,
    CallbackLost,
    DeviceRemoved,
    DevicesKnown,
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
    StoodStill,
    Surveyed,
)
from virtbus.telemetry import METRICS
from virtbus.words import Origin

QUEUE_LIMIT = 10_000  # callbacks; beyond it they fold into counters
FOLD_LIMIT = 10_000  # counters by device; beyond it errors fold by domain, beyond twice that they are dropped
_OF_THE_SOURCE = (SourceReady, SourceLost, SourceGone, HostKnown, StoodStill, Surveyed)
_OF_A_GUEST = (DomainResumed, DomainHalted, DomainGone, DeviceRemoved, DevicesKnown)
_SELF = 4  # what one connection may say about itself, for which room is kept: seen, lost, ready, its host
BATCH_LIMIT = 20_000  # observations per transaction


class IntakeQueue:
    """Between libvirt's thread and ours: bounded, exact in counts up to its bounds, a microsecond per call.

    Guarantees:
    1. `put` never blocks on anything but a lock held for microseconds, and never raises;
    2. above `limit` queued, errors fold into one counter per (device, path, action, reason), and with
       `fold_limit` of these into one per (domain, action, reason) without a device: counts stay exact up to
       twice `fold_limit` counters;
    3. an error never moves behind a lifecycle observation that came after it; when there is no room for all
       of those, only the last of each kind is kept, on its true side of the domain's errors, so the domain's
       final state is right;
    4. when there is no room, a connection's losses merge into one, its returns into one with the findings of
       all, and its ends into one with the guests of all;
    5. what can't be kept even so is counted in `take_dropped`; no more than `limit` and three times
       `fold_limit` are kept together (of several connections each may add four, and their source two);
    6. a `SourceSeen` comes out after everything that was put before it.
    """

    def __init__(self, limit: int = QUEUE_LIMIT, fold_limit: int = FOLD_LIMIT) -> None:
        self._limit = limit
        self._fold_limit = fold_limit
        self._items: deque[Observation] = deque()
        self._folded: dict[tuple[object, ...], Observation] = {}
        self._lock = threading.Lock()
        self._filled = threading.Event()
        self._dropped_errors = 0
        self._dropped_others = 0
        self._unread: tuple[int, str] = (0, "")
        self._counted: frozenset[tuple[object, ...]] = frozenset()  # errors, all but when: they wake nobody
        self.emptied = True  # the last `drain` took everything that was there when it began

    def put(self, observation: Observation) -> None:
        """Take one observation; the sink of a source."""
        with self._lock:
            if isinstance(observation, CallbackLost):
                self._unread = (self._unread[0] + 1, observation.why)
            elif len(self._items) < self._limit and not self._folded:
                self._items.append(observation)
            elif isinstance(observation, RawIoError):
                self._put_error(observation)
            elif isinstance(observation, SourceSeen):
                # Behind all that is folded, which leaves in one batch with it: it needs no barrier.
                self._put_last((SourceSeen, observation.connection), observation)
            elif len(self) < self._limit + self._fold_limit:
                # A barrier: what was folded before it must come out before it.
                self._unfold()
                self._items.append(observation)
            else:
                self._put_crowded(observation)
        if self._counted and isinstance(observation, RawIoError) and observation[:-1] in self._counted:
            return
        if not self._filled.is_set():
            self._filled.set()

    def _put_error(self, raw: RawIoError) -> None:
        key: tuple[object, ...] = raw[:-1]
        if key not in self._folded and len(self._folded) >= self._fold_limit:
            raw = raw._replace(path="", alias="")
            key = raw[:-1]
        burst, at = self._folded.get(key), raw.observed_at
        if isinstance(burst, Burst):  # it goes to the end, behind the last words that came since
            self._put_last(key, Burst(burst.raw, burst.count + 1, burst.first_ns, at))
        elif self._has_room():
            self._folded[key] = Burst(raw, 1, at, at)
        else:
            self._dropped_errors += 1
            return
        METRICS.folded.inc()

    def _has_room(self) -> bool:
        """For one more thing that nothing of its kind can be folded into."""
        limit = self._limit + 3 * self._fold_limit - _SELF
        return len(self._folded) < 2 * self._fold_limit and len(self) < limit

    def _put_last(self, key: tuple[object, ...], observation: Observation) -> None:
        self._folded.pop(key, None)
        self._folded[key] = observation

    def _put_crowded(self, observation: Observation) -> None:
        """Keep only the last observation of a domain, device or connection; what is dropped is counted.

        For what a source says about itself there is always room: nobody would say it again.
        """
        kind = type(observation)
        if isinstance(observation, _OF_THE_SOURCE):
            about = (kind, getattr(observation, "connection", None))
            self._put_last(about, self._joined(self._folded.get(about), observation))
        elif isinstance(observation, _OF_A_GUEST):
            part = getattr(observation, "alias", getattr(observation, "connection", None))
            key = (kind, observation.domain_uuid, part)
            known = key in self._folded
            if known or self._has_room():
                self._put_last(key, observation)
                self._dropped_others += known  # the one before it
            else:
                self._dropped_others += 1
        else:
            self._dropped_errors += callbacks_in(observation)
            self._dropped_others += not callbacks_in(observation)

    def _joined(self, before: Observation | None, now: Observation) -> Observation:
        """Two losses or standstills are one since the first, two returns or ends the last one with both's."""
        if isinstance(before, SourceLost) and isinstance(now, SourceLost):
            first = min(before, now, key=_moment)
            return replace(now, at_ns=first.at_ns, booted_ns=first.booted_ns)
        if isinstance(before, StoodStill) and isinstance(now, StoodStill):
            return replace(now, since=before.since)
        if isinstance(before, SourceGone) and isinstance(now, SourceGone):
            return replace(now, domains=before.domains | now.domains)
        if isinstance(before, SourceReady) and isinstance(now, SourceReady):
            findings = before.findings + now.findings
            self._dropped_errors += max(0, len(findings) - self._fold_limit)
            return replace(now, findings=findings[-self._fold_limit :])
        return now

    def drain(self, timeout: float) -> list[Observation]:
        """Wait up to `timeout` seconds, then take at most BATCH_LIMIT observations, oldest first."""
        if not len(self):
            self._counted = frozenset()
            if not len(self):  # look again: what `put` added before `_counted` was cleared woke nobody
                self._filled.wait(timeout)
        with self._lock:
            self._filled.clear()
            self.emptied = len(self._items) <= BATCH_LIMIT
            if self.emptied:
                self._unfold()
            count = len(self._items) if self.emptied else BATCH_LIMIT
            taken = [self._items.popleft() for _ in range(count)]
            if len(self):
                self._filled.set()
        return taken

    def _unfold(self) -> None:
        """Queue what was folded, proofs last. The lock is held."""
        self._items.extend(sorted(self._folded.values(), key=lambda each: isinstance(each, SourceSeen)))
        self._folded.clear()

    def gather(self, counted: Iterable[Observation], seconds: float) -> bool:
        """Wait up to `seconds` for anything but errors that equal one of these → whether it came."""
        raws = (item.raw if isinstance(item, Burst) else item for item in counted)
        self._counted = frozenset(raw[:-1] for raw in raws if isinstance(raw, RawIoError))
        return bool(self._counted) and self._filled.wait(seconds)

    def wake(self) -> None:
        """Let a waiting `drain` return."""
        self._filled.set()

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

    @property
    def is_told(self) -> bool:
        """Whether everything was taken, also the callbacks that nobody could read."""
        return not (len(self) or self._unread[0])

    def __len__(self) -> int:
        return len(self._items) + len(self._folded)


def _moment(lost: SourceLost) -> int:
    """When it was lost, by the time since the boot where that is known: the wall clock may have been set."""
    return lost.at_ns - (lost.booted_ns or 0)


def aggregate(observations: Iterable[Observation]) -> list[Observation]:
    """Equal raw errors become one Burst, ordered by their last time; anything else is a barrier between."""
    out: list[Observation] = []
    groups: dict[tuple[object, ...], list[RawIoError]] = {}

    def flush() -> None:
        bursts = [Burst(g[0], len(g), g[0].observed_at, g[-1].observed_at) for g in groups.values()]
        bursts.sort(key=lambda burst: burst.last_ns)
        out.extend(bursts)
        groups.clear()

    for item in observations:
        if isinstance(item, RawIoError):
            groups.setdefault(item[:-1], []).append(item)
        else:
            flush()
            out.append(item)
    flush()
    return out


def callbacks_in(item: Observation) -> int:
    """How many calls of libvirt's I/O-error callback stand behind an observation."""
    if isinstance(item, RawIoError):
        return 1
    return item.count if isinstance(item, Burst) and item.origin is Origin.EVENT else 0
