"""The promises, in plain words, against the truth. Numbers P1 to P6 are the README's and docs/events.md's."""

from __future__ import annotations

import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from tests.sim.hypervisor import SECRET, Error, Stood
from tests.sim.plan import Shape
from tests.sim.runtime import START_NS
from virtbus import envelope
from virtbus.fleet import Fleet
from virtbus.model import Gap, IoError, IoErrorResolved, Message, Now, Stamp, to_ns
from virtbus.words import GapReason, Origin, Phase

if TYPE_CHECKING:
    from tests.sim.broker import Arrival
    from tests.sim.plane import Plane

READ_SECONDS = 30.0  # by then the consumer has read what the broker holds
LOOK_SECONDS = 80.0  # by then a look that failed was asked again
PAUSE_SECONDS = 3.0  # who stands for so long after a gap is found …
FOUND_SECONDS = 60.0  # … by then
LATE_SECONDS = 10.0  # what a busy host did not get to is done by then
GROUP_SECONDS = 0.1  # a group commit's 50 ms, and a step of the consumer
HOLD_SLACK_SECONDS = 180.0  # a hold that was due when the host's fault ended


@dataclass
class Acting:
    """What the consumer did, and what may be done once more because a kill found it in flight."""

    effects: Counter[str] = field(default_factory=Counter)
    repeats: Counter[str] = field(default_factory=Counter)  # how often each may come again
    in_flight: set[str] = field(default_factory=set)  # done, and `ack` has not returned
    grouped: list[tuple[float, str]] = field(default_factory=list)  # `ack` returned before the write

    def begin(self, event_id: str) -> None:
        """The effect happens."""
        self.effects[event_id] += 1
        self.in_flight.add(event_id)

    def acknowledged(self, event_id: str, *, at: float, grouped: bool) -> None:
        """`ack` returned."""
        self.in_flight.discard(event_id)
        if grouped:
            self.grouped = [*self.grouped[-63:], (at, event_id)]

    def killed(self, now: float) -> None:
        """SIGKILL of the consumer."""
        lost = self.in_flight | {event_id for at, event_id in self.grouped if now - at <= GROUP_SECONDS}
        self.repeats.update(lost)
        self.in_flight, self.grouped = set(), []


@dataclass
class Truth:
    """What really happened, and what was seen of it."""

    shape: Shape = Shape.HOST
    errors: list[Error] = field(default_factory=list)
    stood: list[Stood] = field(default_factory=list)
    log: list[Arrival] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)  # as the broker holds them, poison too
    made: dict[str, tuple[float, float]] = field(default_factory=dict)  # id → (true time, wall clock's skew)
    promised: dict[tuple[str, int], str] = field(default_factory=dict)  # (epoch, sequence) → id
    epochs: dict[str, list[str]] = field(default_factory=dict)  # host → its runs, in order
    blind: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    unanswered: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # looks failed or hung
    slow: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # threads come too late
    frozen: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # its agent stood still
    standstills: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # long, of one that saw
    ends: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # of a host's agent
    skews: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # host → (since when, skew)
    clocks: dict[str, set[float]] = field(default_factory=dict)  # host → the skews that its spools know of
    boots: dict[str, list[float]] = field(default_factory=dict)  # host → when its power was cut
    sockets: dict[str, str] = field(default_factory=dict)  # of nodes → whose
    pending: dict[str, int] = field(default_factory=dict)
    open: dict[str, set[str]] = field(default_factory=dict)
    acting: Acting = field(default_factory=Acting)
    missing_told: list[str] = field(default_factory=list)
    queued: dict[str, int] = field(default_factory=dict)  # group → what waits for it
    poison: int = 0
    letters: list[tuple[str, bytes, str]] = field(default_factory=list)
    plane: Plane | None = None
    handing: tuple[str, str] | None = None  # which reactor hands which event over at this moment
    hand_again: Counter[str] = field(default_factory=Counter)  # because a kill found it in flight
    returned: Counter[str] = field(default_factory=Counter)  # to the reactors' group, by event id
    stores_lost: bool = False
    lost_waiting: set[str] = field(default_factory=set)  # handing over was stored, and the store lost
    at_fault: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    away: dict[str, list[tuple[float, float]]] = field(default_factory=dict)  # uuid → when it was shut off
    ended: float = 0.0
    problems: list[str] = field(default_factory=list)

    def promise(self, host: str, epoch: str, stamps: list[Stamp]) -> None:
        """A commit returned."""
        for stamp in stamps:
            assert stamp.sequence is not None
            if self.promised.setdefault((epoch, stamp.sequence), stamp.id) != stamp.id:
                self.problems.append(f"P2: {host}: sequence {stamp.sequence} of {epoch} has two ids")


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
    uuid: str | None = None  # it is of this guest alone, whose socket its detail names


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
    found += _every_pause(truth, events, gaps)
    found += _every_standstill(truth, gaps)
    found += _incidents(truth, events)
    found += _effects(truth, events)
    found += _poison(truth)
    found += _handed_over(truth, events)
    found += _holds(truth)
    found += _late_consumer(truth)
    found += _secrets(truth)
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
    """In true time. A gap over a reboot begins in the clock of before, if any that was set since then.

    By how much a clock was set while its host was off, or while nothing could be written before, is nowhere
    to be known (docs/libvirt.md).
    """
    found = []
    before = last = 0.0  # when the commit before was made, and this one
    for event in sorted(events, key=lambda event: truth.made[event.arrival.record.id][0]):
        made, skew = truth.made[event.arrival.record.id]
        if made > last:
            before, last = last, made
        if event.type == Gap.TYPE:
            host, start = event.arrival.host, event.data["started_at"]
            detail = event.data["detail"] or ""
            skews = {skew}
            if any(before <= cut <= made for cut in truth.boots.get(host, ())):
                times = truth.skews[host]
                ends = [*(at for at, _ in times[1:]), made]
                skews |= {each for (_, each), end in zip(times, ends, strict=True) if end >= before}
            found.append(
                Interval(
                    float("-inf") if start is None else min(_true(start, each) for each in skews),
                    _true(event.data["ended_at"], skew),
                    event.data["reason"],
                    next((whose for path, whose in truth.sockets.items() if path in detail), None),
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
    """P1: every error is counted in an event or lies in a gap's interval; counts are never too high.

    A guest's count is exact where none of its errors lies in a gap and each was named. Otherwise it may be
    higher by findings: QEMU keeps disk errors that are over, and which of them are new can't be told after a
    time without sight, nor beside an error without a device's name ("where twice and never can't be told
    apart, it is twice": crosscheck). There is at most one finding a device for each time without sight.

    Nor can they be told apart where a busy host's threads hear of a pause later than the grace time: a look
    may have been ahead of it and have seen the guest run, or have found the message of an error whose event
    was still to come. And an event may never come: libvirt up to 9.0 loses those of some network disks, and
    what QEMU still holds back ends with its guest. Where something else explains the pause, only a look that
    comes in time shows such an error.
    """
    counted: Counter[tuple[str, str]] = Counter()
    found: Counter[tuple[str, str, str | None]] = Counter()
    guessed: Counter[tuple[str, str]] = Counter()
    overtaken: Counter[tuple[str, str]] = Counter()
    for event in events:
        if event.type == IoError.TYPE:
            host, uuid = event.arrival.host, event.data["domain"]["uuid"]
            count, alias = event.data["occurrences"]["count"], event.data["device"]["alias"]
            counted[host, uuid] += count
            if event.data["origin"] == Origin.RECONCILE:
                found[host, uuid, alias] += count
            late = event.data["origin"] != Origin.EVENT and (
                _is_late(truth, event) or _is_ahead(truth, event)
            )
            if late:
                overtaken[host, uuid] += count
            if late or event.data["origin"] == Origin.RECONCILE or alias is None:
                guessed[host, uuid] += count
    made: dict[tuple[str, str], list[Error]] = defaultdict(list)
    for error in truth.errors:
        made[error.host, error.uuid].append(error)
    for host, uuid in sorted({*made, *counted}):
        errors = made[host, uuid]
        clear = [error for error in errors if not (error.hidden or _lies_in(error, gaps[host]))]
        count = counted[host, uuid]
        if count < len(clear):
            times = ", ".join(f"{error.at:.3f}" for error in clear[:12])
            yield f"P1: {host}: {count} errors of {uuid} counted, {len(clear)} outside of gaps (at {times})"
        if count - guessed[host, uuid] > len(errors):
            yield f"P1: {host}: {count} errors of {uuid} counted, {len(errors)} happened"
        exact = len(clear) == len(errors) and all(error.named for error in errors)
        if exact and not len(errors) <= count <= len(errors) + overtaken[host, uuid]:
            yield f"P1: {host}: {count} errors of {uuid} counted, {len(errors)} happened, all in sight"
    short = {where for where in made if counted[where] < len(made[where])}
    yield from _every_message(truth, events, gaps, short)
    for (host, uuid, alias), count in found.items():
        if count > len(gaps[host]):
            yield f"P1: {host}: {count} findings at {alias} of {uuid}, {len(gaps[host])} times without sight"


def _is_ahead(truth: Truth, event: Event) -> bool:
    """Whether libvirt keeps a message of its device from before the clock was set back: it lies ahead of now.

    An agent that starts can't know that the clock was not ahead for a moment while nobody looked.
    """
    host, at = event.arrival.host, truth.made[event.arrival.record.id][0]
    device = (host, event.data["domain"]["uuid"], event.data["device"]["alias"])
    return any(
        error.kept and error.at < at and _stamp(truth, host, error.at) > _stamp(truth, host, at)
        for error in truth.errors
        if (error.host, error.uuid, error.alias) == device
    )


def _is_late(truth: Truth, event: Event) -> bool:
    """Whether its host is so busy that threads come later than the grace time, or was a moment before."""
    at = truth.made[event.arrival.record.id][0]
    return any(begin <= at <= end + LATE_SECONDS for begin, end in truth.slow.get(event.arrival.host, ()))


def _every_message(
    truth: Truth, events: list[Event], gaps: dict[str, list[Interval]], short: set[tuple[str, str]]
) -> Iterator[str]:
    """docs/events.md: an error in a gap that libvirt keeps a message of is found when the gap ends.

    Only of guests of which less was counted than happened, and not of an error that its own event told: a gap
    begins where what was seen is committed, which may be before the error. And not of one whose stamp, since
    the clock was set back, is older than that of an error before it, or lies ahead of now: it can't be told
    from one that was told; now is when a look that failed, or hung, was answered at last. Nor where the agent
    ended before a look that failed was asked again: the next run asks for what is newer than what this one
    saw. Nor of one whose stamp lies outside of the gap by a clock that nobody knows of: one that was set back
    while the spool's disk took nothing, and set again before a run could open it, or set and set again while
    the agent stood still. Nor where events that had waited for it came as it woke up: of which error each is,
    their time does not say.
    """
    later: dict[tuple[str, str, str], list[Error]] = defaultdict(list)
    made: dict[tuple[str, str], list[Error]] = defaultdict(list)
    for error in truth.errors:
        later[error.host, error.uuid, error.alias].append(error)
        made[error.host, error.uuid].append(error)
    found: dict[tuple[str, str, str | None], list[float]] = defaultdict(list)
    # When an event was made, and how many it counts.
    counted: dict[tuple[str, str, str | None], list[tuple[float, int]]] = defaultdict(list)
    for event in events:
        if event.type == IoError.TYPE:
            key = (event.arrival.host, event.data["domain"]["uuid"], event.data["device"]["alias"])
            at = truth.made[event.arrival.record.id][0]
            if event.data["origin"] == Origin.RECONCILE:
                found[key].append(at)
            elif event.data["origin"] == Origin.EVENT:
                counted[key].append((at, event.data["occurrences"]["count"]))

    def told(error: Error, since: float) -> list[float]:
        """When a finding or an event told it, as far as that can be known."""
        host, uuid, alias = error.host, error.uuid, error.alias
        times = list(found[host, uuid, alias])
        # What came without a name and before the gap was told under the name that a look found.
        nameless = [one for one in made[host, uuid] if not one.named and (error.named or one.at >= since)]
        its = later[host, uuid, alias]
        for counts, those in ((counted[host, uuid, alias], its), (counted[host, uuid, None], nameless)):
            before = float("-inf")
            # All since the last one, but for those of a gap that was over before this one began.
            sought = [one for one in those if one.at >= since or not _lies_in(one, gaps[host])]
            for at, count in sorted(counts):
                if count >= sum(before < one.at <= at for one in sought):
                    times.append(at)
                before = at
        return times

    for (host, uuid, alias), errors in later.items():
        for error, following in zip(errors, [*errors[1:], None], strict=True):
            if following is not None and following.at == error.at:
                continue
            inside = [
                g for g in gaps[host] if g.start + 0.2 <= error.at <= g.end - 0.2 and g.uuid in (None, uuid)
            ]
            until = truth.ended if following is None else following.at
            gone = any(a <= until and b >= error.at for a, b in truth.away.get(uuid, ()))
            found_at = max((g.end for g in inside), default=math.inf)
            gone = gone or any(0 < at - found_at < LOOK_SECONDS for at in truth.ends[host])
            told_all = (host, uuid) not in short
            if told_all or not error.kept or not inside or gone or until - found_at < LOOK_SECONDS:
                continue
            stamp, end = (_stamp(truth, host, at) for at in (error.at, max(g.end for g in inside)))
            stills = [(a, b) for a, b in truth.frozen.get(host, ()) if a <= error.at <= b]
            skew = _skew(truth, host, error.at)
            unknown_clock = skew not in truth.clocks[host] or any(
                skew not in (_skew(truth, host, begin), _skew(truth, host, end)) for begin, end in stills
            )
            if any(0 <= at - end < LOOK_SECONDS for _, end in stills for at, _ in counted[host, uuid, alias]):
                continue
            if unknown_clock and not _stamp(truth, host, min(g.start for g in inside)) < stamp <= end:
                continue
            late = [b for a, b in truth.unanswered.get(host, ()) if a - LATE_SECONDS <= found_at <= b]
            looked = _latest_stamp(truth, host, found_at, max(late) + LOOK_SECONDS) if late else end
            if any(
                one.at < error.at and (stamp <= _stamp(truth, host, one.at) <= looked or stamp > end)
                for one in made[host, uuid]
                if one.alias == alias or not one.named
            ):
                continue
            start = min(g.start for g in inside)
            if not any(error.at <= at <= until for at in told(error, start)):
                yield (
                    f"P1: {error.host}: the error of {alias} of {uuid} at {error.at:.3f} lies in a gap, "
                    "libvirt kept a message of it, and it was not found"
                )


def _stamp(truth: Truth, host: str, at: float) -> float:
    """What the host's wall clock said at a true time."""
    return at + _skew(truth, host, at)


def _latest_stamp(truth: Truth, host: str, begin: float, end: float) -> float:
    """The latest that the host's wall clock said between two true times."""
    turns = [since for since, _ in truth.skews[host] if begin < since < end]
    return max(_stamp(truth, host, at) for at in (begin, *turns, *(turn - 0.001 for turn in turns), end))


def _skew(truth: Truth, host: str, at: float) -> float:
    """By how much the host's wall clock was off at a true time."""
    return [skew for since, skew in truth.skews[host] if since <= max(at, 0.0)][-1]


def _every_pause(truth: Truth, events: list[Event], gaps: dict[str, list[Interval]]) -> Iterator[str]:
    """docs/events.md: a guest that stands by an error when a gap ends is found, whoever saw its pause.

    Unless it stood when the gap began, an event had said so (or of a pause that can't be told from that one),
    and the disk that fails now had failed before: that it was resumed meanwhile, and paused again, nobody can
    tell. QEMU keeps a disk's error when the guest is resumed, libvirt keeps no message and no time of an
    error that pauses, and a listing that calls the pause by another word than before may be of the same one
    (of a daemon that started again meanwhile, say).
    """
    told: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event in events:
        if event.type == IoError.TYPE and event.data["occurrences"]["count"]:
            told[event.arrival.host, event.data["domain"]["uuid"]].append(
                truth.made[event.arrival.record.id][0]
            )
    same: list[Stood] = []  # as far as anybody can tell, as an earlier one
    for stood in sorted(truth.stood, key=lambda one: one.begin):
        if not stood.listed:
            continue
        its = [gap for gap in gaps[stood.host] if gap.uuid in (None, stood.uuid)]
        at_all = told[stood.host, stood.uuid]
        for gap in its:
            seen_until = min([other.start for other in its if other.end > gap.end + 0.5], default=math.inf)
            if stood.begin > gap.end or min(stood.end, seen_until, truth.ended) < gap.end + PAUSE_SECONDS:
                continue
            blind = gap.start - 1.0
            for other in sorted(its, key=lambda each: -each.end):
                if other.end >= blind:
                    blind = min(blind, other.start - 1.0)
            if _failed_before(truth, stood) and any(
                one in same or any(one.begin <= at <= stood.begin for at in at_all)
                for one in truth.stood
                if (one.host, one.uuid) == (stood.host, stood.uuid) and blind <= one.end <= stood.begin
            ):
                same.append(stood)
                continue
            if not any(stood.begin <= at <= gap.end + FOUND_SECONDS for at in at_all):
                yield (
                    f"P1: {stood.host}: {stood.uuid} stands since {stood.begin:.3f} and did when a gap ended "
                    f"at {gap.end:.3f}, and it was not found"
                )
                break


def _failed_before(truth: Truth, stood: Stood) -> bool:
    """Whether the disk that a guest stands by had failed already."""
    its = [error for error in truth.errors if (error.host, error.uuid) == (stood.host, stood.uuid)]
    now = {error.alias for error in its if error.at == stood.begin}
    return any(error.alias in now and error.at < stood.begin for error in its)


def _lies_in(error: Error, gaps: list[Interval]) -> bool:
    return any(
        gap.start - 0.1 <= error.at <= gap.end + 0.1 and gap.uuid in (None, error.uuid) for gap in gaps
    )


def _every_standstill(truth: Truth, gaps: dict[str, list[Interval]]) -> Iterator[str]:
    """P3: an absence or a standstill is told from its beginning until its end."""
    for host, times in truth.blind.items():
        for begin, end in times:
            if end > truth.ended - 100:
                continue
            at = begin + 0.01
            for gap in sorted(gaps[host], key=lambda gap: gap.start):
                if gap.start - 0.1 <= at <= gap.end:
                    at = gap.end
            if at < end - 0.2:
                yield f"P3: {host}: blind from {begin:.3f} to {end:.3f}, told only until {at:.3f}"
    for host, times in truth.standstills.items():
        for begin, end in times:
            reasons = {gap.reason for gap in gaps[host] if gap.start <= end and begin <= gap.end}
            if end < truth.ended - 100 and reasons.isdisjoint(
                {GapReason.AGENT_STANDSTILL, GapReason.AGENT_DOWN}
            ):
                yield f"P3: {host}: stood still from {begin:.3f} to {end:.3f}, told as {sorted(reasons)}"


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
    for group, waiting in truth.queued.items():
        if waiting:
            yield f"P5: {waiting} messages wait for group {group} in the end"
    acting = truth.acting
    for event in events:
        event_id = event.arrival.record.id
        times = acting.effects[event_id]
        if times == 0 and not truth.queued["g"]:
            yield f"P5: event {event_id} never had its effect"
        if times > 1 + acting.repeats[event_id]:
            yield f"P5: event {event_id} had its effect {times} times"


def _poison(truth: Truth) -> Iterator[str]:
    """P5: a bad message costs nothing but itself, and is among the dead letters of each group."""
    for group in truth.queued:
        aside = [reason for name, _, reason in truth.letters if name == group]
        if len(aside) < truth.poison and not truth.queued[group]:
            yield f"P5: {truth.poison} bad messages, {len(aside)} dead letters of group {group}"
    known = {arrival.record.body for arrival in truth.log}
    for group, body, reason in truth.letters:
        if body in known:
            yield f"P5: group {group} put an event aside: {reason}"


def _handed_over(truth: Truth, events: list[Event]) -> Iterator[str]:
    """P6: the control plane is told of each opened incident, and again only of what was in flight."""
    assert truth.plane is not None
    if truth.queued.get("react-plane", 1):
        return
    copies = Counter(arrival.record.id for arrival in truth.log)
    for event in events:
        if event.type != IoError.TYPE or event.data["incident"]["phase"] != Phase.OPENED:
            continue
        record = event.arrival.record
        key = f"{record.attributes['source']} {record.id}"
        times = truth.plane.handed[key]
        if times == 0 and key not in truth.lost_waiting:
            yield f"P6: event {record.id} was never handed over"
        allowed = 1 + truth.hand_again[key] + truth.plane.unanswered[key]
        if truth.stores_lost:  # another machine's store does not know what this one's did
            allowed += truth.returned[record.id] + copies[record.id] - 1
        if times > allowed:
            yield f"P6: event {record.id} was handed over {times} times, {allowed} can be explained"


def _holds(truth: Truth) -> Iterator[str]:
    """P6: no host is held that is not at fault, none for ever, and no more than the limit at once."""
    plane = truth.plane
    assert plane is not None
    for at, host, why, others in plane.held:
        guilty = [f"{begin:.0f} to {end:.0f}" for begin, end in truth.at_fault.get(host, ())]
        if not any(begin <= at <= end + HOLD_SLACK_SECONDS for begin, end in truth.at_fault.get(host, ())):
            yield f"P6: {host} is held at {at:.0f} ({why}); at fault: {', '.join(guilty) or 'never'}"
        if others:
            yield f"P6: {host} is held at {at:.0f} beside {', '.join(others)}, more than the limit"
    for at, host, standing in plane.released:
        if standing:
            yield f"P6: {host} is given back at {at:.0f}, and {', '.join(standing)} still stands"
    for name, node in plane.nodes.items():
        if node.mark is not None or node.tainted:
            yield f"P6: {name} is held in the end: {node.mark}"
        if truth.shape is Shape.FLEET and (node.condition is None or node.condition["status"] != "True"):
            yield f"P6: {name} shows {node.condition} in the end, and nothing is wrong with it"


def _late_consumer(truth: Truth) -> Iterator[str]:
    """P5: whoever reads all of it late, and some of it again, comes to the same: nothing is open."""
    dice = random.Random(len(truth.messages))
    fleet = Fleet()
    order: list[tuple[Message, bool]] = []  # and whether it comes once more
    for message in truth.messages:
        order.append((message, False))
        if dice.random() < 0.1:
            order.append((dice.choice(order)[0], True))
    now = Now(START_NS + int(truth.ended * 1e9), truth.ended, 0.0)
    for message, again in order:
        if message.body[:1] != b"{":
            continue
        before = fleet.view(now).incidents if again else 0
        opened = envelope.decode(message)
        event = envelope.to_event(opened, validate=False)
        if event is not None:
            fleet.saw(event, opened.attributes, now)
        if again and fleet.view(now).incidents > before:
            yield f"P5: what came once more opened an incident: {opened.attributes['id']}"
    view = fleet.view(now)
    if view.incidents:
        hosts = ", ".join(host.name for host in view.hosts if host.incidents)
        yield f"P5: a late consumer believes in {view.incidents} open incidents ({hosts})"


def _secrets(truth: Truth) -> Iterator[str]:
    """Nothing secret leaves: what stands in a domain's description as one is in no event."""
    for arrival in truth.log:
        if SECRET.encode() in arrival.record.body or SECRET in str(arrival.record.attributes):
            yield f"a secret is in event {arrival.record.id}"
