"""Decides which errors libvirt or QEMU kept from us, and says each error once. Pure: the clock is passed in.

libvirt and QEMU lose I/O-error events (unnamed network disks up to libvirt 9.0, daemon restarts, merged
ones from QEMU 9.2 on); what they rarely lose is the pause that follows. So every pause by I/O error is
paired with an event; one that stays alone for a grace time becomes a finding. Guarantees, while no event
comes later than the grace time, nor after the resume that follows it:

1. an error whose event comes is told by its event, exactly once, whichever of event, pause and look is first;
2. a pause by I/O error whose event never comes is told exactly once, with the devices that a look found;
3. an event that comes after its finding is not counted again (it only adds what it knows);
4. where "twice" and "never" can't be told apart, it is twice: nothing is lost;
5. an event of a pause that comes after its guest was resumed (QEMU from 9.2 to 10 may hold it back for a
   second) is followed by a look, and where that finds the guest running, by word that it does.

A disk error that virDomainGetDiskErrors gives may be an old one: QEMU keeps it after the guest was resumed
(measured on QEMU 5.2 to 11.1). So what was there before a pause says nothing about it.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from enum import Enum

from virtbus.model import Burst, Device, RawIoError
from virtbus.sources.link import (
    ACTION_PAUSE,
    ACTION_REPORT,
    DISK_ERROR_NO_SPACE,
    DISK_ERRORS,
    PAUSED,
    RUNNING,
)
from virtbus.sources.looks import Look, Message, disk_errors_by_alias, gather, stamps_by_alias
from virtbus.words import ENOSPC, DiskError, Origin

LATE_SECONDS = 10.0  # an event that is later than this after its finding is an error of its own
EVIDENCE_SECONDS = 60.0  # at most one look for evidence a device in this time
ACTION_UNKNOWN = -1  # the guest runs, and the policy does not tell whether it was ever paused
STAMP_SLACK_NS = 2_000_000_000  # between libvirt's own stamp of an error and our callback


class Verdict(Enum):
    """What becomes of an I/O-error event."""

    TELL = "tell"  # pass it on
    TELL_AND_LOOK = "tell and look"  # pass it on, and look for evidence
    KNOWN = "known"  # the same error was told as a finding: it adds facts, no count


@dataclass(frozen=True, slots=True)
class Decision:
    """What is told of one pause: findings, and (bursts of no count) evidence for what was told before."""

    bursts: list[Burst]
    over: bool  # the guest runs again by now


@dataclass(slots=True, eq=False)
class _Pause:
    """One pause that is not decided yet."""

    ns: int
    began: float
    due: float
    certain: bool  # libvirt said that it is by an I/O error
    told: dict[str, RawIoError]  # the events of this pause, by alias
    over: bool = False
    look: Look | None = None
    wrong: dict[str, int] = field(default_factory=dict)  # what the look found: alias → disk error
    waited: bool = False


@dataclass(slots=True)
class _Case:
    """A domain in trouble."""

    name: str
    number: int | None
    paused: bool = False
    pauses: list[_Pause] = field(default_factory=list)  # undecided, oldest first
    credit: dict[str, RawIoError] = field(default_factory=dict)  # events whose pause is still to come
    credit_at: float = 0.0
    found_ahead: bool = False  # a finding whose pause is still to come
    doubted_at: float | None = None  # an event told of a pause, and no pause came yet
    ask_at: float = 0.0  # when a look is to tell
    # Since the last resume: alias → its event, or when its finding was told.
    told: dict[str, RawIoError] = field(default_factory=dict)
    synthesised: dict[str, float] = field(default_factory=dict)
    # Also before it:
    stale: dict[str, int] = field(default_factory=dict)  # alias → a disk error that may be an old one
    last_ns: dict[str, int] = field(default_factory=dict)  # alias → the last error told
    reports: dict[str, RawIoError] = field(default_factory=dict)  # alias → the last one without a pause
    looked_for: dict[str, float] = field(default_factory=dict)  # alias → when evidence was last asked for
    wanting: set[str] = field(default_factory=set)  # aliases whose evidence is being looked for


class CrossCheck:
    """The pairing of pauses and events, a case a domain; memory is bounded by the domains in trouble.

    Not thread-safe: the observer holds its lock. `mono` is monotonic seconds, `ns` the wall clock.
    """

    def __init__(self, grace_seconds: float) -> None:
        self._grace = grace_seconds
        self._cases: dict[str, _Case] = {}

    def __len__(self) -> int:
        return len(self._cases)

    # ---- what libvirt says

    def event(self, raw: RawIoError, mono: float) -> Verdict:
        """An I/O-error event."""
        case = self._case(raw.domain_uuid, raw.domain_name, raw.domain_id)
        alias = raw.alias
        case.last_ns[alias] = raw.observed_at
        if raw.action_code != ACTION_PAUSE:
            case.reports[alias] = raw
            if mono - case.looked_for.get(alias, float("-inf")) < EVIDENCE_SECONDS:
                return Verdict.TELL
            case.looked_for[alias] = mono
            case.wanting.add(alias)
            return Verdict.TELL_AND_LOOK
        case.told[alias] = raw
        for told in (alias, ""):  # "": a finding that could not name its device
            at = case.synthesised.pop(told, None)
            if at is not None and mono - at <= LATE_SECONDS:
                return Verdict.KNOWN
        if case.pauses and not case.pauses[-1].over:
            case.pauses[-1].told[alias] = raw
        else:
            case.credit[alias] = raw
            case.credit_at = mono
            if not case.paused:
                case.doubted_at, case.ask_at = mono, mono + self._grace
        return Verdict.TELL

    def suspended(
        self, uuid: str, name: str, number: int | None, *, by_io_error: bool, mono: float, ns: int
    ) -> None:
        """A pause by I/O error, or one of unknown reason, which only a look can tell from an operator's."""
        case = self._case(uuid, name, number)
        case.paused = True
        case.doubted_at = None
        if case.found_ahead:
            case.found_ahead = False
            case.credit = {}
            return
        told = case.credit if mono - case.credit_at <= self._grace else {}
        case.pauses.append(_Pause(ns, mono, mono + self._grace, by_io_error, told))
        case.credit = {}

    def resumed(self, uuid: str) -> None:
        """The guest runs again: whatever fails from now on is new."""
        case = self._cases.get(uuid)
        if case is None:
            return
        case.paused = case.found_ahead = False
        case.doubted_at = None
        for pause in case.pauses:
            pause.over = True
        case.credit = {}
        case.told.clear()
        case.synthesised.clear()

    def gone(self, uuid: str) -> list[Burst]:
        """The domain left: what is still undecided is told now, the rest is forgotten."""
        case = self._cases.pop(uuid, None)
        if case is None:
            return []
        return [b for pause in case.pauses for b in self._decide(uuid, case, pause, 0.0, {}) if b.count]

    def removed(self, uuid: str, alias: str) -> None:
        """The device was unplugged: nothing is kept of it but what belongs to a pause that goes on."""
        case = self._cases.get(uuid)
        if case is None:
            return
        case.wanting.discard(alias)
        for kept in (case.stale, case.last_ns, case.reports, case.looked_for):
            kept.pop(alias, None)

    def looked(self, uuid: str, look: Look, devices: Mapping[str, Device]) -> list[Burst]:
        """What a look found: kept for the undecided pause that it saw.

        What it says about errors without a pause is returned as bursts of no count.
        """
        case = self._cases.get(uuid)
        if case is None:
            return []
        seen = [pause for pause in case.pauses if pause.began <= look.asked_at and pause.look is None]
        if seen:
            seen[-1].look = look
            seen[-1].wrong = disk_errors_by_alias(look.disk_errors or {}, devices)
        wanting, case.wanting = case.wanting, set()
        return [
            _burst(raw, 0, Origin.EVENT, look, devices.get(alias), pause=False)
            for alias, raw in case.reports.items()
            if alias in wanting
        ]

    def baseline(self, uuid: str, name: str, number: int | None, wrong: Mapping[str, int]) -> None:
        """The disk errors (by alias) of a guest that runs: left over from before."""
        if wrong or uuid in self._cases:
            case = self._case(uuid, name, number)
            if not case.paused and not case.pauses:
                case.stale = dict(wrong)

    def runs(self, uuid: str, look: Look) -> bool:
        """Whether a look found a guest running of which an event told a pause that never came."""
        case = self._cases.get(uuid)
        if case is None or case.doubted_at is None or look.asked_at <= case.doubted_at:
            return False
        case.doubted_at = None
        if look.state == RUNNING:
            self.resumed(uuid)
        return look.state == RUNNING

    # ---- what follows

    def next_due(self) -> float | None:
        """When `due` has something to say (monotonic), or None."""
        return min((p.due for case in self._cases.values() for p in case.pauses), default=None)

    def due(self, mono: float, devices: Mapping[str, Mapping[str, Device]]) -> list[Decision]:
        """The decisions about pauses whose grace is over; `devices` by domain, as far as they are known."""
        decisions = []
        for uuid, case in self._cases.items():
            for pause in [pause for pause in case.pauses if pause.due <= mono]:
                if pause.look is None and not pause.waited:
                    pause.waited, pause.due = True, mono + self._grace  # once: late is better than nameless
                    continue
                case.pauses.remove(pause)
                bursts = self._decide(uuid, case, pause, mono, devices.get(uuid, {}))
                decisions.append(Decision(bursts, not case.paused))
        return decisions

    def next_doubt(self) -> float | None:
        """When `doubtful` has something to say (monotonic), or None."""
        return min((c.ask_at for c in self._cases.values() if c.doubted_at is not None), default=None)

    def doubtful(self, mono: float) -> list[str]:
        """The domains to look at now: an event told of a pause that did not come within the grace time."""
        found = [
            uuid for uuid, case in self._cases.items() if case.doubted_at is not None and case.ask_at <= mono
        ]
        for uuid in found:
            self._cases[uuid].ask_at = mono + LATE_SECONDS  # a look may fail
        return found

    def undecided(self) -> list[str]:
        """The domains that wait for a decision."""
        return [uuid for uuid, case in self._cases.items() if case.pauses]

    def is_told(self, uuid: str) -> bool:
        """Whether an event told of the error that the domain is paused by; a look can only add to that."""
        case = self._cases.get(uuid)
        return case is not None and bool(case.pauses) and bool(case.pauses[-1].told)

    def out_of_space(self, uuid: str) -> frozenset[str]:
        """The aliases whose last error was told with reason "enospc"."""
        case = self._cases.get(uuid)
        if case is None:
            return frozenset()
        last = {**case.reports, **case.told}
        return frozenset(alias for alias, raw in last.items() if raw.reason == ENOSPC)

    def known(self, raw: RawIoError) -> Burst:
        """An event of verdict KNOWN, as it is passed on: its facts, no count."""
        return Burst(raw, 0, raw.observed_at, raw.observed_at)

    # ---- after a (re)connect

    def reconcile(
        self,
        uuid: str,
        name: str,
        number: int | None,
        look: Look,
        devices: Mapping[str, Device],
        *,
        since_ns: int | None,
        mono: float,
        ns: int,
    ) -> list[Burst]:
        """What the look after a (re)connect found at one domain and no event told of.

        Errors that libvirt kept a message of count when they are newer than `since_ns` (the source's last
        sign of life) and than what was told of the device; None leaves messages alone.
        """
        case = self._cases.get(uuid)
        if case is not None and case.paused and look.state != PAUSED:
            self.resumed(uuid)  # and nobody told us
        newer = _newer_messages(look, since_ns, case, devices)
        found: dict[str, Burst] = {}
        if look.paused_by_io_error:
            case = self._case(uuid, name, number)
            case.paused = True
            told = case.told.keys() | case.synthesised.keys()
            wrong = disk_errors_by_alias(look.disk_errors or {}, devices)
            fresh = [
                alias for alias in _missed(case, wrong, told, devices) if alias not in told or alias in newer
            ]
            fresh += [alias for alias in newer if alias in wrong and alias not in fresh]
            case.stale = wrong
            stamps = stamps_by_alias(look, devices)
            for alias in fresh:
                at = stamps.get(alias, ns)
                raw = _raw(
                    (uuid, name, number), alias=alias, code=wrong.get(alias), action=ACTION_PAUSE, ns=at
                )
                found[alias] = _burst(raw, 1, Origin.RECONCILE, look, devices.get(alias), pause=True)
                case.synthesised[alias] = mono
                case.last_ns[alias] = at
            if fresh:
                # Its pause may still be on its way to us, unless it is the one that waits for its event.
                waits = [pause for pause in case.pauses if not pause.over]
                case.found_ahead = not waits
                case.pauses = [pause for pause in case.pauses if pause.over]
        for alias, message in newer.items():
            if alias in found:
                continue
            at = message.at_ns or ns
            device = devices.get(alias)
            raw = _raw((uuid, name, number), alias=alias, code=None, action=_action_by_policy(device), ns=at)
            found[alias] = _burst(raw, 1, Origin.RECONCILE, look, device, pause=False)
            self._case(uuid, name, number).last_ns[alias] = at
        return list(found.values())

    def keep_only(self, uuids: frozenset[str]) -> list[Burst]:
        """Forget the domains that are not there any more; what was undecided of them is told."""
        left = [uuid for uuid in self._cases if uuid not in uuids]
        return [burst for uuid in left for burst in self.gone(uuid)]

    # ---- inside

    def _case(self, uuid: str, name: str, number: int | None) -> _Case:
        case = self._cases.get(uuid)
        if case is None:
            case = self._cases[uuid] = _Case(name, number)
        elif case.number != number and number is not None:
            if case.number is not None:  # the domain was started anew and nobody told us
                case = self._cases[uuid] = _Case(name, number)
            case.number = number
        return case

    def _decide(
        self, uuid: str, case: _Case, pause: _Pause, mono: float, devices: Mapping[str, Device]
    ) -> list[Burst]:
        look, told = pause.look, pause.told
        fresh = [alias for alias, code in pause.wrong.items() if case.stale.get(alias) != code]
        by_error = look is not None and look.paused_by_io_error
        missed: list[str] = []
        if pause.certain or (by_error and fresh):
            known = told.keys() | case.synthesised.keys()
            missed = _missed(case, pause.wrong if by_error else {}, known, devices)
        if look is not None:
            case.stale = pause.wrong
        found = []
        for alias in missed:
            code = pause.wrong.get(alias)
            raw = _raw(
                (uuid, case.name, case.number), alias=alias, code=code, action=ACTION_PAUSE, ns=pause.ns
            )
            found.append(_burst(raw, 1, Origin.LIFECYCLE, look, devices.get(alias), pause=True))
            case.last_ns[alias] = pause.ns
            if not pause.over:
                case.synthesised[alias] = mono
        if look is not None:
            found += [
                _burst(raw, 0, Origin.EVENT, look, devices.get(alias), pause=True)
                for alias, raw in told.items()
            ]
        return found


def _missed(
    case: _Case, wrong: Mapping[str, int], told: AbstractSet[str], devices: Mapping[str, Device]
) -> list[str]:
    """The devices of one pause that nobody told of; "" when the pause was not told and nothing names it."""
    fresh = [alias for alias, code in wrong.items() if alias not in told and case.stale.get(alias) != code]
    if fresh or told:
        return fresh
    # One that failed before failed again: the only one, or the only one whose events libvirt loses.
    for suspects in (list(wrong), [alias for alias in wrong if _is_unnamed(devices.get(alias))]):
        if len(suspects) == 1:
            return suspects
    return [""]


def _is_unnamed(device: Device | None) -> bool:
    """A network disk whose source has no name: libvirt up to 9.0 drops its I/O-error events."""
    source = None if device is None else device.source
    return source is not None and source.type == "network" and not source.path


def _newer_messages(
    look: Look, since_ns: int | None, case: _Case | None, devices: Mapping[str, Device]
) -> dict[str, Message]:
    """The messages that tell of an error which nobody told us of, by alias; the newest of each."""
    if since_ns is None or look.messages is None:
        return {}
    by_target = {device.target: alias for alias, device in devices.items() if device.target}
    newer: dict[str, Message] = {}
    for message in look.messages:
        if message.at_ns is None or message.at_ns <= since_ns:
            continue
        alias = by_target.get(message.target, "")
        told = None if case is None else case.last_ns.get(alias)
        if told is not None and message.at_ns <= told + STAMP_SLACK_NS:
            continue
        before = newer.get(alias)
        if before is None or (before.at_ns or 0) < message.at_ns:
            newer[alias] = message
    return newer


def _action_by_policy(device: Device | None) -> int:
    """What the hypervisor did about an error of a guest that runs, as far as the policies tell."""
    policy = None if device is None else device.policy
    asked = set() if policy is None else {policy.write, policy.read} - {None}
    return ACTION_REPORT if asked and asked <= {"report"} else ACTION_UNKNOWN


def _raw(
    domain: tuple[str, str, int | None], *, alias: str, code: int | None, action: int, ns: int
) -> RawIoError:
    # libvirt's reason and its "no space" disk error come from the same word of QEMU, "nospace".
    reason = ENOSPC if code == DISK_ERROR_NO_SPACE else ""
    return RawIoError(*domain, path="", alias=alias, action_code=action, reason=reason, observed_at=ns)


def _burst(
    raw: RawIoError,
    count: int,
    origin: Origin,
    look: Look | None,
    device: Device | None,
    *,
    pause: bool,
) -> Burst:
    target = None if device is None else device.target
    message = None
    code = None
    if look is not None and target is not None:
        message = next((m.text for m in look.messages or () if m.target == target), None)
        code = (look.disk_errors or {}).get(target)
    evidence = gather(look, device, raw.reason, lifecycle=origin is Origin.LIFECYCLE, pause=pause)
    return Burst(
        raw=raw,
        count=count,
        first_ns=raw.observed_at,
        last_ns=raw.observed_at,
        origin=origin,
        message=message,
        disk_error=None if code is None else DISK_ERRORS.get(code, DiskError.UNSPECIFIED),
        evidence=evidence,
    )
