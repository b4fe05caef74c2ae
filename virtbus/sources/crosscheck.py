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
   second) is followed by a look, and where that finds the guest running, by word that it does;
6. an error told without its device's name (libvirt gives none during a blockcopy, or the look is late) is
   named by the first look that can, without a count.

A disk error that virDomainGetDiskErrors gives may be an old one: QEMU keeps it after the guest was resumed
(measured on QEMU 5.2 to 11.1). So what was there before a pause says nothing about it.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from enum import Enum

from virtbus.model import Burst, Device, Evidence, Origin, RawIoError
from virtbus.sources.link import (
    ACTION_PAUSE,
    ACTION_REPORT,
    DISK_ERROR_NO_SPACE,
    DISK_ERROR_UNSPECIFIED,
    DISK_ERRORS,
    PAUSED,
    RUNNING,
)
from virtbus.sources.looks import (
    CONFIRMS,
    Look,
    Message,
    disk_errors_by_alias,
    gather,
    newest_by_alias,
    newest_message,
)

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
class _Finding:
    """An error of the present pause that was told without an event."""

    at: float  # monotonic
    raw: RawIoError


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
    # Since the last resume: alias ("": not known) → its event, or its finding.
    told: dict[str, RawIoError] = field(default_factory=dict)
    synthesised: dict[str, _Finding] = field(default_factory=dict)
    unseen: set[str] = field(default_factory=set)  # aliases told of before any look at their pause
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
        self.slack_ns = STAMP_SLACK_NS  # 0 where the hypervisor's clock is ours
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
        # "" is a finding that could not name its device; an event without a name is of any finding.
        for told in (alias, "") if alias else tuple(case.synthesised):
            finding = case.synthesised.pop(told, None)
            if finding is not None and mono - finding.at <= LATE_SECONDS:
                if not alias and told:
                    case.told[told] = case.told.pop(alias)._replace(alias=told)
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
        case.unseen.clear()

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

        What it says about errors without a pause, and about those of a pause that was told before any look,
        is returned: bursts of no count, and devices of that pause that nobody told of.
        """
        case = self._cases.get(uuid)
        if case is None:
            return []
        seen = [pause for pause in case.pauses if pause.began <= look.asked_at and not _complete(pause.look)]
        if seen:
            seen[-1].look = look
            seen[-1].wrong = disk_errors_by_alias(look.disk_errors or {}, devices)
        wanting, case.wanting = case.wanting, set()
        found = [
            _burst(raw, 0, Origin.EVENT, look, devices.get(alias), pause=False)
            for alias, raw in case.reports.items()
            if alias in wanting
        ]
        if case.paused and look.paused_by_io_error and not any(not pause.over for pause in case.pauses):
            found += self._look_back(uuid, case, look, devices)
        return found

    def identified(self, uuid: str, alias: str) -> list[Burst]:
        """The device behind the events that came without its name: what was told of it, without a count."""
        case = self._cases.get(uuid)
        if case is None:
            return []
        raws = [found.pop("") for found in (case.reports, case.told) if "" in found]
        if finding := case.synthesised.pop("", None):
            raws.append(finding.raw)
        for raw in raws:
            kept = case.told if raw.action_code == ACTION_PAUSE else case.reports
            kept[alias] = raw._replace(alias=alias)
        for names in (case.unseen, case.wanting):
            if "" in names:
                names.discard("")
                names.add(alias)
        for each in (*(pause.told for pause in case.pauses), case.credit):
            if "" in each:
                each[alias] = each.pop("")._replace(alias=alias)
        return [
            _burst(raw._replace(alias=alias), 0, Origin.EVENT, None, None, pause=False) for raw in raws[:1]
        ]

    def has_nameless(self, uuid: str) -> bool:
        """Whether something was told of the domain without the name of its device."""
        case = self._cases.get(uuid)
        return case is not None and any("" in each for each in (case.reports, case.told, case.synthesised))

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
        return frozenset(alias for alias, raw in last.items() if raw.reason == "enospc")

    def known(self, raw: RawIoError) -> Burst:
        """An event of verdict KNOWN, as it is passed on: its facts, no count."""
        return Burst(raw, 0, raw.observed_at, raw.observed_at)

    # ---- after a (re)connect

    def listed(
        self, uuid: str, name: str, number: int | None, *, alias: str, mono: float, ns: int
    ) -> list[Burst]:
        """The listing shows a guest paused by an I/O error, and no look at it has been answered yet.

        `alias` is its only disk, or "": then the look that comes later names it, without a count.
        """
        case = self._case(uuid, name, number)
        if case.told or case.synthesised or any(not pause.over for pause in case.pauses):
            return []
        case.paused = case.found_ahead = True
        raw = _raw((uuid, name, number), alias=alias, code=None, action=ACTION_PAUSE, ns=ns)
        case.synthesised[alias] = _Finding(mono, raw)
        case.unseen.add(alias)
        seen = Evidence("state", CONFIRMS, "listed as paused by an I/O error")
        return [Burst(raw, 1, ns, ns, Origin.RECONCILE, evidence=(seen,))]

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
        newer = _newer_messages(look, since_ns, case, devices, self.slack_ns)
        found: dict[str, Burst] = {}
        named: list[Burst] = []
        if look.paused_by_io_error:
            case = self._case(uuid, name, number)
            case.paused = True
            wrong = disk_errors_by_alias(look.disk_errors or {}, devices)
            suspects = wrong or dict.fromkeys(newer, DISK_ERROR_UNSPECIFIED)
            named = self._name(case, suspects, look, devices)
            told = case.told.keys() | case.synthesised.keys()
            fresh = [
                alias
                for alias in _missed(case, suspects, told, devices)
                if alias not in told or alias in newer
            ]
            fresh += [alias for alias in newer if alias in suspects and alias not in fresh]
            case.stale = wrong
            stamps = newest_by_alias(look, devices)
            for alias in fresh:
                kept = stamps.get(alias)
                at = ns if kept is None or kept.at_ns is None else kept.at_ns
                raw = _raw(
                    (uuid, name, number), alias=alias, code=wrong.get(alias), action=ACTION_PAUSE, ns=at
                )
                found[alias] = _burst(raw, 1, Origin.RECONCILE, look, devices.get(alias), pause=True)
                case.synthesised[alias] = _Finding(mono, raw)
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
        return [*named, *found.values()]

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
        wrong = pause.wrong
        fresh = [alias for alias, code in wrong.items() if case.stale.get(alias) != code]
        by_error = look is not None and look.paused_by_io_error
        if "" in told and by_error and (alias := _suspect(case, wrong, told.keys(), devices)):
            told[alias] = told.pop("")._replace(alias=alias)
            if not pause.over:
                case.told[alias] = case.told.pop("", told[alias])._replace(alias=alias)
        missed: list[str] = []
        if pause.certain or (by_error and fresh):
            known = told.keys() | case.synthesised.keys()
            missed = _missed(case, wrong if by_error else {}, known, devices)
        if look is not None:
            case.stale = wrong
        found = []
        for alias in missed:
            found.append(self._found(uuid, case, alias, pause.ns, look, devices, wrong.get(alias)))
            if not pause.over:
                case.synthesised[alias] = _Finding(mono, found[-1].raw)
        if look is not None:
            found += [
                _burst(raw, 0, Origin.EVENT, look, devices.get(alias), pause=True)
                for alias, raw in told.items()
            ]
        if not _complete(look) and not pause.over:
            case.unseen |= {*told, *missed}
        return found

    def _found(
        self,
        uuid: str,
        case: _Case,
        alias: str,
        ns: int,
        look: Look | None,
        devices: Mapping[str, Device],
        code: int | None,
    ) -> Burst:
        """An error of a pause that no event told of."""
        raw = _raw((uuid, case.name, case.number), alias=alias, code=code, action=ACTION_PAUSE, ns=ns)
        case.last_ns[alias] = ns
        return _burst(raw, 1, Origin.LIFECYCLE, look, devices.get(alias), pause=True)

    def _look_back(self, uuid: str, case: _Case, look: Look, devices: Mapping[str, Device]) -> list[Burst]:
        """What a look says about a pause that was told before it: names, evidence, further devices."""
        if not case.unseen and "" not in case.told and "" not in case.synthesised:
            return []
        wrong = disk_errors_by_alias(look.disk_errors or {}, devices)
        found = self._name(case, wrong, look, devices)
        known = case.told.keys() | case.synthesised.keys()
        named = {burst.raw.alias for burst in found}
        found += [
            _burst(_raw_of(case, alias), 0, Origin.EVENT, look, devices.get(alias), pause=True)
            for alias in sorted(case.unseen - named)
            if alias in known and alias in devices
        ]
        if known and look.complete:
            for alias in _missed(case, wrong, known, devices):
                found.append(
                    self._found(
                        uuid,
                        case,
                        alias,
                        _raw_of(case, next(iter(known))).observed_at,
                        look,
                        devices,
                        wrong[alias],
                    )
                )
                case.synthesised[alias] = _Finding(look.asked_at, found[-1].raw)
        if look.complete:
            case.unseen.clear()
            case.stale = wrong
        return found

    def _name(
        self, case: _Case, wrong: Mapping[str, int], look: Look, devices: Mapping[str, Device]
    ) -> list[Burst]:
        """Name what was told of this pause without a device, if the look can; a burst of no count."""
        told = case.told.keys() | case.synthesised.keys()
        if "" not in told:
            return []
        alias = _suspect(case, wrong, told, devices)
        if not alias:
            return []
        raw = _raw_of(case, "")._replace(alias=alias)
        if "" in case.told:
            case.told[alias] = raw
            del case.told[""]
        finding = case.synthesised.pop("", None)
        if finding is not None:
            if not raw.reason and wrong.get(alias) == DISK_ERROR_NO_SPACE:
                raw = raw._replace(reason="enospc")
            case.synthesised[alias] = _Finding(finding.at, raw)
        case.last_ns[alias] = max(case.last_ns.get(alias, 0), raw.observed_at)
        case.unseen.discard("")
        return [_burst(raw, 0, Origin.EVENT, look, devices.get(alias), pause=True)]


def _complete(look: Look | None) -> bool:
    return look is not None and look.complete


def _raw_of(case: _Case, alias: str) -> RawIoError:
    """What was told of a device in this pause."""
    return case.told[alias] if alias in case.told else case.synthesised[alias].raw


def _suspect(
    case: _Case, wrong: Mapping[str, int], told: AbstractSet[str], devices: Mapping[str, Device]
) -> str:
    """The device of an error that came without its name; "" when that can't be told."""
    return _missed(case, wrong, told - {""}, devices, nameless=True)[0]


def _missed(
    case: _Case,
    wrong: Mapping[str, int],
    told: AbstractSet[str],
    devices: Mapping[str, Device],
    *,
    nameless: bool = False,
) -> list[str]:
    """The devices of one pause that nobody told of; "" when the pause was not told and nothing names it.

    `nameless`: something was told without a name, so there is one more than those in `told`.
    """
    fresh = [alias for alias, code in wrong.items() if alias not in told and case.stale.get(alias) != code]
    if fresh or (told and not nameless):
        return fresh
    wrong = {alias: code for alias, code in wrong.items() if alias not in told}
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
    look: Look, since_ns: int | None, case: _Case | None, devices: Mapping[str, Device], slack_ns: int
) -> dict[str, Message]:
    """The messages that tell of an error which nobody told us of, by alias; the newest of each."""
    if since_ns is None or look.messages is None:
        return {}
    newer: dict[str, Message] = {}
    for alias, message in newest_by_alias(look, devices).items():
        if message.at_ns is None or message.at_ns <= since_ns:
            continue
        told = None if case is None else case.last_ns.get(alias)
        if told is None or message.at_ns > told + slack_ns:
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
    reason = "enospc" if code == DISK_ERROR_NO_SPACE else ""
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
    kept = None
    code = None
    if look is not None and target is not None:
        kept = newest_message(look.messages, target)
        code = (look.disk_errors or {}).get(target)
    evidence = gather(look, device, raw.reason, lifecycle=origin is Origin.LIFECYCLE, pause=pause)
    return Burst(
        raw=raw,
        count=count,
        first_ns=raw.observed_at,
        last_ns=raw.observed_at,
        origin=origin,
        message=kept.text if kept else None,
        stamp_ns=kept.at_ns if kept else None,
        disk_error=None if code is None else DISK_ERRORS.get(code, f"code {code}"),
        evidence=evidence,
    )
