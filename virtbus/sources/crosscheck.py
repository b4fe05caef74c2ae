"""Decides which errors libvirt or QEMU failed to report, and reports each error once.

Pure: the clock is passed in.

libvirt and QEMU lose I/O-error events (unnamed network disks up to libvirt 9.0, daemon restarts, merged ones
from QEMU 9.2 on); what they rarely lose is the pause that follows. So every pause by I/O error is paired with
an event; a pause without one at the end of the grace time becomes a finding. Guarantees, as long as no event
comes later than LATE_SECONDS after its finding:

1. an error whose event comes within the grace time is reported by its event, exactly once, whichever of
   event, pause and look is first;
2. a pause by I/O error whose event never comes is reported exactly once, with the devices that a look found;
3. an event that comes after its finding is not counted again (it only adds what it knows), also if the guest
   has left, or gone on since and a look had named the device. If it belonged to the next pause after all,
   that pause is reported as a finding;
4. where "twice" and "never" can't be told apart, it is twice: nothing is lost. A pause of unknown reason, of
   a disk that failed before, is an operator's until an event comes: the next one is taken for its;
5. an event of a pause that comes after its guest was resumed (QEMU from 9.2 to 10 may hold it back for a
   second) is followed by a look and, if that finds the guest running, by a `DomainResumed`;
6. an error reported without its device's name (libvirt gives none during a blockcopy, or the look is late) is
   named by the first look that can, without a count.

A disk error that virDomainGetDiskErrors gives may be an old one: QEMU keeps it after the guest was resumed
(measured on QEMU 5.2 to 11.1). So what was there before a pause says nothing about it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from virtbus.model import Device, Evidence, Now
from virtbus.observations import (
    LATE_SECONDS,
    Burst,
    DomainGone,
    DomainHalted,
    DomainResumed,
    Observation,
    RawIoError,
)
from virtbus.sources.cases import (
    Case,
    Cases,
    Finding,
    Nameless,
    complete,
    missed_devices,
    name_nameless,
    raw_of,
)
from virtbus.sources.evidence import STAMP_SLACK_NS, Look, disk_errors_by_alias
from virtbus.sources.findings import ACTION_UNKNOWN, burst_of, newer_messages, raw_error
from virtbus.sources.link import (
    ACTION_PAUSE,
    CRASHED_EVENT,
    PAUSED,
    PAUSES,
    PMSUSPENDED_EVENT,
    RESUMED,
    RUNNING,
    STARTED,
    STATE_AFTER,
    STOPPED,
    SUSPENDED,
    SUSPENDED_IOERROR,
    left_by,
    runs_again,
)
from virtbus.sources.nameless import described, is_unclear, release_waiting, waits
from virtbus.words import ENOSPC, EvidenceCheck, EvidenceVerdict, Origin, ResolutionCause

__all__ = ["ACTION_UNKNOWN", "CrossCheck", "Decision", "Verdict"]

EVIDENCE_SECONDS = 60.0  # at most one look for evidence per device in this time


class Verdict(Enum):
    """What becomes of an I/O-error event."""

    TELL = "tell"  # pass it on
    TELL_AND_LOOK = "tell and look"  # pass it on, and look for evidence
    HOLD = "hold"  # say nothing yet: `due` reports it, with its device's name if a look finds that
    KNOWN = "known"  # its pause was reported as a finding: it adds facts, no count
    FOUND = "found"  # like KNOWN, but only a look had seen the pause: an earlier run may have reported it


@dataclass(frozen=True, slots=True)
class Decision:
    """What is reported of one pause: findings, and (bursts of no count) evidence for earlier ones."""

    bursts: list[Burst]
    over: bool  # the guest runs again by now


def _reported(case: Case, raw: RawIoError, mono: float) -> Verdict:
    """An error that the guest was given: looked at once in a while, and each that names no device."""
    alias = raw.alias
    case.last_ns[alias], case.reports[alias] = raw.observed_at, raw
    if not alias and is_unclear(case, mono):
        case.nameless.busy.add("")  # what is read later says nothing of it
    elif not alias or mono - case.looked_for.get(alias, float("-inf")) >= EVIDENCE_SECONDS:
        case.looked_for[alias] = mono
        case.wanting.add(alias)
        return Verdict.TELL_AND_LOOK
    return Verdict.TELL


def _look_back(case: Case, look: Look, devices: Mapping[str, Device]) -> list[Burst]:
    """What a look says about a pause that was reported before it: names, evidence, further devices."""
    if not case.unseen and "" not in case.events and "" not in case.synthesised:
        return []
    wrong = disk_errors_by_alias(look.disk_errors or {}, devices)
    found = name_nameless(case, wrong, look, devices)
    known = case.events.keys() | case.synthesised.keys()
    named = {burst.raw.alias for burst in found}
    found += [
        burst_of(raw_of(case, alias), 0, Origin.EVENT, look, devices.get(alias), pause=True)
        for alias in sorted(case.unseen - named)
        if alias in known and alias in devices
    ]
    if known and look.complete:
        ns = raw_of(case, next(iter(known))).observed_at
        origin = Origin.RECONCILE if case.unsure else Origin.LIFECYCLE
        for alias in missed_devices(case, wrong, known, devices):
            found.append(case.found(alias, ns, look, devices, wrong[alias], origin))
            case.synthesised[alias] = Finding(look.asked_at, found[-1].raw)
    if look.complete:
        case.unseen.clear()
        case.stale, case.unsure = wrong, False
    return found


class Unheard:
    """Pauses that are over and were reported without their events: these may still come."""

    def __init__(self) -> None:
        self._findings: dict[str, list[tuple[float, RawIoError]]] = {}  # with when the guest left or went on

    def note(
        self, uuid: str, case: Case | None, found: Sequence[Burst], mono: float, *, left: bool = False
    ) -> None:
        """The guest goes on, or `left`; `found`: what is reported of pauses that are over by then."""
        recent = {one: self._recent(one, mono) for one in self._findings}
        self._findings = {one: those for one, those in recent.items() if those}
        raws = [] if case is None else case.unheard(mono, seen=left)
        raws += [burst.raw for burst in found if burst.origin is not Origin.EVENT]
        known = [raw for _, raw in self._findings.get(uuid, ())]
        # Without a name it could explain any event of a guest that goes on, also another disk's.
        new = [(mono, raw) for raw in dict.fromkeys(raws) if raw not in known and (left or raw.alias)]
        if new:
            self._findings.setdefault(uuid, []).extend(new)

    def explain(self, raw: RawIoError, case: Case | None, mono: float) -> bool:
        """Whether this is the event of a pause that was reported; it explains one event, not more.

        If it is the event of a later pause, that pause has none then, and is reported as a finding (see
        `Case.hinted_at`): each pause counts once in either case.
        """
        if raw.action_code != ACTION_PAUSE or (case is not None and case.needs_event(mono)):
            return False
        for noted in self._recent(raw.domain_uuid, mono):
            # Of the same run: one that was started again may fail at once, and that is an error of its own.
            if noted[1].domain_id == raw.domain_id and noted[1].alias in ("", raw.alias):
                self._findings[raw.domain_uuid].remove(noted)
                if case is not None:
                    case.explained(raw, mono)
                return True
        return False

    def _recent(self, uuid: str, mono: float) -> list[tuple[float, RawIoError]]:
        return [one for one in self._findings.get(uuid, ()) if mono - one[0] <= LATE_SECONDS]


class CrossCheck:
    """The pairing of pauses and events, one case per domain; memory is bounded by the domains in trouble.

    Not thread-safe: the observer holds its lock. `mono` is monotonic seconds, `ns` the wall clock.
    """

    def __init__(self, grace_seconds: float, connection: str = "") -> None:
        """`connection`: of the guests, where a source has several."""
        self._grace, self._connection = grace_seconds, connection
        self.slack_ns = STAMP_SLACK_NS  # 0 where the hypervisor's clock is ours
        self.cases = self._cases = Cases()
        self._unheard = Unheard()
        # Guests older than the connection whose disk errors have not been read yet.
        self._unsure: set[str] = set()

    def __len__(self) -> int:
        return len(self._cases)

    # ---- what libvirt says

    def event(self, raw: RawIoError, mono: float) -> Verdict:
        """An I/O-error event."""
        if self._unheard.explain(raw, self._cases.get(raw.domain_uuid), mono):
            return Verdict.KNOWN
        case = self._case(raw.domain_uuid, raw.domain_name, raw.domain_id)
        alias = raw.alias
        if not alias and not case.has_nameless():
            case.nameless = Nameless()
        pause = case.pauses[-1] if case.pauses and not case.pauses[-1].over else None
        if raw.action_code == ACTION_PAUSE and not case.synthesised and case.hold(raw, pause):
            if pause is None:
                case.expect(mono, self._grace)
            return Verdict.HOLD
        if raw.action_code != ACTION_PAUSE:
            return Verdict.HOLD if waits(case, raw, mono) else _reported(case, raw, mono)
        case.last_ns[alias] = raw.observed_at
        case.events[alias] = raw
        case.puzzled_at = -math.inf
        # "" is a finding that could not name its device; an event without a name is of any finding.
        names = (alias, "") if alias else tuple(case.synthesised)
        for name in () if case.needs_event(mono) else names:
            finding = case.synthesised.pop(name, None)
            if finding is not None and mono - finding.at <= LATE_SECONDS:
                if not alias and name:
                    case.events[name] = case.events.pop(alias)._replace(alias=name)
                return Verdict.KNOWN if finding.began < math.inf else Verdict.FOUND
        case.claim(raw, pause, mono, self._grace)
        if pause is None:
            case.expect(mono, self._grace)
        return Verdict.TELL

    def lifecycle(
        self, uuid: str, name: str, number: int | None, event: int, detail: int, now: Now
    ) -> list[Observation]:
        """A lifecycle callback → what it means: that the guest runs, stands still, or is gone."""
        said: list[Observation] = []
        if runs_again(event, detail):
            self.resumed(uuid, now.monotonic)
        elif event == SUSPENDED and detail in PAUSES:
            by_io_error = detail == SUSPENDED_IOERROR
            self.suspended(uuid, name, number, by_io_error=by_io_error, mono=now.monotonic, ns=now.wall_ns)
        elif event in (STOPPED, STARTED):
            case, found = self._cases.get(uuid), self.gone(uuid)
            self._unheard.note(uuid, case, found, now.monotonic, left=True)
            said += found
        if event in (RESUMED, STARTED):
            said.append(DomainResumed(uuid, now.wall_ns))
        elif event in (SUSPENDED, PMSUSPENDED_EVENT, CRASHED_EVENT):
            said.append(DomainHalted(uuid, now.wall_ns, STATE_AFTER[event]))
        elif event == STOPPED:
            said.append(self.left(uuid, now.wall_ns, left_by(detail)))
        return said

    def left(self, uuid: str, ns: int, cause: ResolutionCause = ResolutionCause.DOMAIN_STOPPED) -> DomainGone:
        """The word that a domain is not there any more."""
        return DomainGone(uuid, ns, cause, self._connection)

    def suspended(
        self, uuid: str, name: str, number: int | None, *, by_io_error: bool, mono: float, ns: int
    ) -> None:
        """A pause by I/O error, or one of unknown reason, which only a look can tell from an operator's."""
        case = self._case(uuid, name, number)
        case.suspended(by_io_error=by_io_error, grace=self._grace, mono=mono, ns=ns)

    def resumed(self, uuid: str, mono: float = float("-inf")) -> None:
        """The guest runs again: whatever fails from now on is new. `mono` where a callback said so."""
        case = self._cases.get(uuid)
        if case is not None:
            self._unheard.note(uuid, case, (), mono)
            case.resumed(mono)

    def gone(self, uuid: str) -> list[Burst]:
        """The domain left: what is still undecided is reported now, the rest is forgotten."""
        self._unsure.discard(uuid)
        case = self._cases.pop(uuid, None)
        if case is None:
            return []
        found = [b for pause in case.pauses for b in case.decide(pause, 0.0, {}) if b.count]
        return found + case.release_all() + release_waiting(case)

    def removed(self, uuid: str, *aliases: str) -> None:
        """Devices were unplugged: nothing is kept of them but what belongs to a pause that goes on."""
        case = self._cases.get(uuid)
        if case is not None:
            case.removed(aliases)

    def looked(self, uuid: str, look: Look, devices: Mapping[str, Device]) -> list[Burst]:
        """What a look found: kept for the undecided pause that it saw.

        What it says about errors without a pause, and about those of a pause that was reported before any
        look, is returned: bursts of no count, and devices of that pause that nobody reported.
        """
        case = self._cases.get(uuid)
        if case is None:
            return []
        seen = [pause for pause in case.pauses if pause.began <= look.asked_at and not complete(pause.look)]
        if seen:
            seen[-1].look = look
            seen[-1].wrong = disk_errors_by_alias(look.disk_errors or {}, devices)
        wanting = case.wanting
        if look.complete:  # else it is looked again
            case.wanting = set()
        found = [
            burst_of(raw, 0, Origin.EVENT, look, devices.get(alias), pause=False)
            for alias, raw in case.reports.items()
            if alias in wanting
        ]
        if case.paused and look.paused_by_io_error and not any(not pause.over for pause in case.pauses):
            found += _look_back(case, look, devices)
        return found

    def suspect(self, uuid: str, aliases: frozenset[str]) -> None:
        """Disks that have a block job, or had one until now: an event without a name may be of any."""
        if self.has_nameless(uuid):
            self._cases[uuid].nameless.busy |= aliases

    def has_nameless(self, uuid: str) -> bool:
        """Whether something was reported of the domain without a name, or waits for one."""
        case = self._cases.get(uuid)
        return case is not None and case.has_nameless()

    def described(self, uuid: str, only_disk: str, jobs: frozenset[str] | None, mono: float) -> list[Burst]:
        """The domain's disks were read: that may show whose an event without a name was."""
        return described(self._cases[uuid], only_disk, jobs, mono) if self.has_nameless(uuid) else []

    def baseline(self, uuid: str, name: str, number: int | None, wrong: Mapping[str, int]) -> None:
        """The disk errors (by alias) of a guest that runs: left over from before."""
        if wrong or uuid in self._cases:
            case = self._case(uuid, name, number)
            if case.paused or case.pauses:
                return
            case.stale, case.unsure = dict(wrong), False
        self._unsure.discard(uuid)

    def runs(self, uuid: str, look: Look) -> bool:
        """Whether a look found a guest running although an event had said that it was paused."""
        case = self._cases.get(uuid)
        if case is None or case.doubted_at is None or look.asked_at <= case.doubted_at:
            return False
        if look.state == RUNNING:
            self.resumed(uuid)
        else:
            case.ask_at = math.inf  # the pause itself is on its way to us
        return look.state == RUNNING

    # ---- what follows

    def next_due(self) -> float | None:
        """When `due` has something to say (monotonic), or None."""
        return min((at for case in self._cases.values() for at in case.due(self._grace)), default=None)

    def due(self, mono: float, devices: Mapping[str, Mapping[str, Device]]) -> list[Decision]:
        """The decisions about pauses whose grace is over; `devices` by domain, as far as they are known."""
        decisions = []
        for uuid, case in self._cases.items():
            for pause in [pause for pause in case.pauses if pause.due <= mono]:
                if pause.look is None and not pause.waited:
                    pause.waited, pause.due = True, mono + self._grace  # once: late is better than nameless
                    continue
                case.pauses.remove(pause)
                bursts = case.decide(pause, mono, devices.get(uuid, {}))
                self._unheard.note(uuid, None, bursts if pause.over else (), mono)
                decisions.append(Decision(bursts, not case.paused))
            if case.held and case.credit_at + self._grace <= mono:  # and no pause came
                decisions.append(Decision(case.release_all(), case.doubted_at is None and not case.paused))
            if case.nameless.waiting and case.nameless.since + self._grace <= mono:
                decisions.append(Decision(release_waiting(case), over=False))
        return decisions

    def next_doubt(self) -> float | None:
        """When `doubtful` has something to say (monotonic), or None."""
        asked = [c.ask_at for c in self._cases.values() if c.doubted_at is not None]
        return min((at for at in asked if at < math.inf), default=None)

    def doubtful(self, mono: float) -> list[str]:
        """The domains to look at now: an event reported a pause that did not come within the grace time."""
        found = [
            uuid for uuid, case in self._cases.items() if case.doubted_at is not None and case.ask_at <= mono
        ]
        for uuid in found:
            self._cases[uuid].ask_at = mono + LATE_SECONDS  # a look may fail
        return found

    def undecided_since(self, mono: float) -> float | None:
        """When the oldest pause began that waits for a decision, or for its event (monotonic), or None."""
        moments = (at for case in self._cases.values() for at in case.began(mono))
        return min((at for at in moments if at < math.inf), default=None)

    def undecided(self) -> list[str]:
        """The domains that wait for a decision."""
        return [uuid for uuid, case in self._cases.items() if case.pauses]

    def is_told(self, uuid: str) -> bool:
        """Whether an event reported the error that the domain is paused by; a look can only add to that."""
        case = self._cases.get(uuid)
        return case is not None and bool(case.pauses) and bool(case.pauses[-1].events)

    def out_of_space(self, uuid: str) -> frozenset[str]:
        """The aliases whose last error was reported with reason "enospc"."""
        case = self._cases.get(uuid)
        if case is None:
            return frozenset()
        last = {**case.reports, **case.events}
        return frozenset(alias for alias, raw in last.items() if raw.reason == ENOSPC)

    # ---- after a (re)connect

    def listed_running(self, uuid: str) -> None:
        """The listing shows a guest running: if it was paused, its resume fell into the time without us."""
        case = self._cases.get(uuid)
        if case is not None and case.paused:
            self.resumed(uuid)

    def listed(
        self, uuid: str, name: str, number: int | None, *, alias: str, mono: float, ns: int
    ) -> list[Burst]:
        """The listing shows a guest paused by an I/O error, and no look at it has been answered yet.

        `alias` is its only disk, or "": then the look that comes later names it, without a count.
        """
        case = self._case(uuid, name, number)
        if case.events or case.synthesised or case.held or any(not pause.over for pause in case.pauses):
            return []
        case.paused = case.found_ahead = True
        raw = raw_error((uuid, name, number), alias=alias, code=None, action=ACTION_PAUSE, ns=ns)
        case.synthesised[alias] = Finding(mono, raw)
        case.unseen.add(alias)
        seen = Evidence(EvidenceCheck.STATE, EvidenceVerdict.CONFIRMS, "listed as paused by an I/O error")
        return [Burst(raw, 1, ns, ns, Origin.RECONCILE, evidence=(seen,))]

    def reconcile(
        self,
        uuid: str,
        name: str,
        number: int | None,
        look: Look,
        devices: Mapping[str, Device],
        *,
        stamps: tuple[int, float] | None,
        mono: float,
        ns: int,
    ) -> list[Burst]:
        """What the look after a (re)connect found at one domain and no event reported.

        Errors that libvirt kept a message of count when they are newer than what was reported of the device,
        and of the time since the source's last sign of life: it has `stamps` behind the first and not behind
        the second (ns); None leaves messages alone.
        """
        case = self._cases.get(uuid)
        if case is not None and case.paused and look.state != PAUSED and not case.paused_since(look.asked_at):
            self.resumed(uuid)  # and nobody reported it
        last_told = {} if case is None else case.last_ns
        newer = newer_messages(look, stamps, last_told, devices, self.slack_ns, ns)
        if not look.paused_by_io_error and not newer:
            return []
        return self._case(uuid, name, number).reconcile(look, newer, devices, mono=mono, ns=ns)

    def keep_only(self, uuids: frozenset[str]) -> list[Burst]:
        """Forget the domains that are not there any more; what was undecided of them is reported.

        Of those that are there it is not known any more which disk errors are left over.
        """
        left = [uuid for uuid in self._cases if uuid not in uuids]
        found = [burst for uuid in left for burst in self.gone(uuid)]
        self._unsure = set(uuids)
        for case in self._cases.values():
            case.unsure = True
        return found

    # ---- inside

    def _case(self, uuid: str, name: str, number: int | None) -> Case:
        case = self._cases.get(uuid)
        if case is None:
            case = self._cases[uuid] = Case(uuid, name, number, unsure=uuid in self._unsure)
        elif case.number != number and number is not None:
            if case.number is not None:  # the domain was started again and nobody reported it
                case = self._cases[uuid] = Case(uuid, name, number)
            case.number = number
        return case
