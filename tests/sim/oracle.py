"""The promises, in plain words, against the truth. Numbers P1 to P6 are the README's and docs/events.md's."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from tests.sim.broker import Arrival
from tests.sim.hypervisor import Error
from tests.sim.runtime import START_NS
from virtbus.model import Gap, IoError, IoErrorResolved, Stamp, to_ns
from virtbus.words import Origin

READ_SECONDS = 30.0  # by then the consumer has read what the broker holds


@dataclass
class Truth:
    """What really happened, and what was seen of it."""

    errors: list[Error] = field(default_factory=list)
    log: list[Arrival] = field(default_factory=list)
    made: dict[str, tuple[float, float]] = field(default_factory=dict)  # id → (true time, wall clock's skew)
    promised: dict[tuple[str, int], str] = field(default_factory=dict)  # (epoch, sequence) → id
    epochs: dict[str, list[str]] = field(default_factory=dict)  # host → its runs, in order
    blind: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    pending: dict[str, int] = field(default_factory=dict)
    open: dict[str, set[str]] = field(default_factory=dict)
    effects: Counter[str] = field(default_factory=Counter)
    settled: set[str] = field(default_factory=set)
    repeats_allowed: Counter[str] = field(default_factory=Counter)
    recent: list[str] = field(default_factory=list)
    missing_told: list[str] = field(default_factory=list)
    queued: int = 0
    problems: list[str] = field(default_factory=list)

    def promise(self, host: str, epoch: str, stamps: list[Stamp]) -> None:
        """A commit returned."""
        for stamp in stamps:
            assert stamp.sequence is not None
            if self.promised.setdefault((epoch, stamp.sequence), stamp.id) != stamp.id:
                self.problems.append(f"P2: {host}: sequence {stamp.sequence} of {epoch} has two ids")

    def effect(self, event_id: str) -> None:
        """The consumer acted."""
        self.effects[event_id] += 1
        self.recent = [*self.recent[-63:], event_id]

    def consumer_killed(self) -> None:
        """What was in flight may come again: effects without an ack, and acks of an open group commit."""
        for event_id in set(self.recent):
            self.repeats_allowed[event_id] += 1


@dataclass
class Event:
    """One event as it first arrived."""

    arrival: Arrival
    data: dict[str, Any]

    @property
    def type(self) -> str:
        return self.arrival.record.attributes["type"]


@dataclass
class Interval:
    """A gap's, in true time."""

    start: float
    end: float
    reason: str


def judge(truth: Truth) -> list[str]:
    """The promises that were broken."""
    events = _first(truth)
    hosts = sorted(truth.epochs)
    gaps = {host: _gaps(truth, [e for e in events if e.arrival.host == host]) for host in hosts}
    found = list(truth.problems)
    found += _one_id_one_content(truth)
    found += _in_order(truth, events)
    found += _nothing_missing(truth, events)
    found += _every_error(truth, events, gaps)
    found += _every_standstill(truth, gaps)
    found += _incidents(truth, events)
    found += _effects(truth, events)
    return found


def _first(truth: Truth) -> list[Event]:
    seen: set[str] = set()
    events = []
    for arrival in truth.log:
        record = arrival.record
        if record.id not in seen and record.row:
            seen.add(record.id)
            events.append(Event(arrival, json.loads(record.body)))
    return events


def _gaps(truth: Truth, events: list[Event]) -> list[Interval]:
    found = []
    for event in events:
        if event.type == Gap.TYPE:
            _, skew = truth.made[event.arrival.record.id]
            start = event.data["started_at"]
            found.append(
                Interval(
                    float("-inf") if start is None else _true(start, skew),
                    _true(event.data["ended_at"], skew),
                    event.data["reason"],
                )
            )
    return found


def _true(text: str, skew: float) -> float:
    """A wall time as true time, the wall clock being off by so many seconds."""
    return (to_ns(datetime.fromisoformat(text)) - START_NS) / 1e9 - skew


def story(truth: Truth) -> Iterator[tuple[float, str, str]]:
    """What came, as (true time, host, words)."""
    for event in _first(truth):
        data, at = event.data, event.arrival.at
        if event.type == Gap.TYPE:
            _, skew = truth.made[event.arrival.record.id]
            start = "?" if data["started_at"] is None else f"{_true(data['started_at'], skew):.1f}"
            end = _true(data["ended_at"], skew)
            words = f"gap {data['reason']} {start} to {end:.1f}, found {data['found']}"
        else:
            incident, occurrences = data["incident"], data["occurrences"]
            words = f"{incident['phase']} {data['domain']['name']} {data['device']['alias']}"
            if event.type == IoError.TYPE:
                words += f", {occurrences['count']} ({data['origin']})"
            else:
                words += f" after {data['resolution']['cause']}"
            words += f", {occurrences['total']} in all"
        yield at, event.arrival.host, f"    -> {words}"


# ------------------------------------------------------------------------------------------ the promises


def _one_id_one_content(truth: Truth) -> Iterator[str]:
    """P2: the same id on every re-send, and the same content."""
    bodies: dict[str, tuple[bytes, dict[str, str]]] = {}
    for arrival in truth.log:
        what = (arrival.record.body, dict(arrival.record.attributes))
        if bodies.setdefault(arrival.record.id, what) != what:
            yield f"P2: event {arrival.record.id} came with two contents"


def _in_order(truth: Truth, events: list[Event]) -> Iterator[str]:
    """P2: in order for each domain, over the agent's restarts; epochs grow."""
    place: dict[tuple[str, str], tuple[int, int]] = {}
    for host, epochs in truth.epochs.items():
        if epochs != sorted(epochs):
            yield f"P2: {host}: a later run has an earlier epoch: {epochs}"
    for event in events:
        record, host = event.arrival.record, event.arrival.host
        here = (truth.epochs[host].index(record.epoch), record.seq)
        before = place.get((host, record.key))
        if before is not None and here < before:
            yield f"P2: {host}: {record.key} got number {record.seq} behind {before}"
        place[host, record.key] = max(here, before or here)


def _nothing_missing(truth: Truth, events: list[Event]) -> Iterator[str]:
    """P2: what was committed is delivered, or named by number; the consumer is told of no other hole."""
    come = {(event.arrival.record.epoch, event.arrival.record.seq) for event in events}
    named: set[tuple[str, int]] = set()
    for event in events:
        if event.type == Gap.TYPE:
            for item in event.data["missing"]:
                named |= {(item["epoch"], n) for n in range(item["first"], item["last"] + 1)}
    lost = sorted(place for place in truth.promised if place not in come and place not in named)
    if lost:
        yield f"P2: {len(lost)} committed events neither came nor are named, the first {lost[0]}"
    for host, count in truth.pending.items():
        if count:
            yield f"P2: {host}: {count} events still wait in the spool"
    for told in truth.missing_told:
        yield f"P5: the consumer was told of a hole that is none: {told}"


def _every_error(truth: Truth, events: list[Event], gaps: dict[str, list[Interval]]) -> Iterator[str]:
    """P1: every error is counted in an event or lies in a gap's interval; counts are never too high."""
    counted: Counter[tuple[str, str]] = Counter()
    # QEMU keeps disk errors that are over. Which of them are new can't be told in a gap, nor after an error
    # without a device's name; "where twice and never can't be told apart, it is twice" (crosscheck).
    guessed: Counter[tuple[str, str]] = Counter()
    for event in events:
        if event.type == IoError.TYPE:
            where, count = (
                (event.arrival.host, event.data["domain"]["uuid"]),
                event.data["occurrences"]["count"],
            )
            counted[where] += count
            guess = event.data["origin"] == Origin.RECONCILE or event.data["device"]["alias"] is None
            guessed[where] += count if guess else 0
    made: dict[tuple[str, str], list[Error]] = defaultdict(list)
    for error in truth.errors:
        made[error.host, error.uuid].append(error)
    for host, uuid in sorted({*made, *counted}):
        errors = made[host, uuid]
        clear = [error for error in errors if not _lies_in(error.at, gaps[host])]
        count = counted[host, uuid]
        if count < len(clear):
            times = ", ".join(f"{error.at:.3f}" for error in clear[:12])
            yield f"P1: {host}: {count} errors of {uuid} counted, {len(clear)} outside of gaps (at {times})"
        if count - guessed[host, uuid] > len(errors):
            yield f"P1: {host}: {count} errors of {uuid} counted, {len(errors)} happened"


def _lies_in(at: float, gaps: list[Interval]) -> bool:
    return any(gap.start - 0.1 <= at <= gap.end + 0.1 for gap in gaps)


def _every_standstill(truth: Truth, gaps: dict[str, list[Interval]]) -> Iterator[str]:
    """P3: an absence or a standstill is told from its beginning until its end."""
    for host, times in truth.blind.items():
        for begin, end in times:
            if end > 700:
                continue
            at = begin + 0.01
            for gap in sorted(gaps[host], key=lambda gap: gap.start):
                if gap.start - 0.1 <= at <= gap.end:
                    at = gap.end
            if at < end - 0.2:
                yield f"P3: {host}: blind from {begin:.3f} to {end:.3f}, told only until {at:.3f}"


def _incidents(truth: Truth, events: list[Event]) -> Iterator[str]:
    """docs/events.md: each incident opens once and ends once, and speaks of a device that failed."""
    opened: Counter[str] = Counter()
    ended: Counter[str] = Counter()
    failed: dict[str, set[str]] = defaultdict(set)
    for error in truth.errors:
        failed[error.uuid].add(error.alias)
    counts: dict[str, int] = defaultdict(int)
    for event in events:
        if event.type not in (IoError.TYPE, IoErrorResolved.TYPE):
            continue
        data = event.data
        incident = data["incident"]["id"]
        alias = data["device"]["alias"]
        if alias and alias not in failed[data["domain"]["uuid"]]:
            yield f"incident {incident} blames {alias} of {data['domain']['name']}, which never failed"
        if event.type == IoErrorResolved.TYPE:
            ended[incident] += 1
            if data["occurrences"]["total"] != counts[incident]:
                yield f"incident {incident} ends with {data['occurrences']['total']}, told {counts[incident]}"
            continue
        counts[incident] += data["occurrences"]["count"]
        opened[incident] += data["incident"]["phase"] == "opened"
        if ended[incident]:
            yield f"incident {incident} goes on after its end"
    for incident in sorted({*opened, *ended}):
        if (opened[incident], ended[incident]) != (1, 1):
            yield f"incident {incident} opened {opened[incident]} times and ended {ended[incident]} times"
    for host, still in truth.open.items():
        if still:
            yield f"{host}: incidents {sorted(still)} are still open long after the last error"


def _effects(truth: Truth, events: list[Event]) -> Iterator[str]:
    """P5: every event has its effect; only what was in flight at a kill has it again."""
    if truth.queued:
        yield f"P5: {truth.queued} messages wait for the consumer in the end"
    for event in events:
        event_id = event.arrival.record.id
        times = truth.effects[event_id]
        if times == 0 and not truth.queued:
            yield f"P5: event {event_id} never had its effect"
        if times > 1 + truth.repeats_allowed[event_id]:
            yield f"P5: event {event_id} had its effect {times} times"
