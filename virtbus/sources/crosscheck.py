"""Decides which errors libvirt or QEMU kept from us, and says each error once. Pure: the clock is passed in.

libvirt and QEMU lose I/O-error events (unnamed network disks up to libvirt 9.0, daemon restarts, merged
ones from QEMU 9.2 on); what they rarely lose is the pause that follows. So every pause by I/O error is
paired with an event; one that stays alone for a grace time becomes a finding. Guarantees, while no event is
later than the grace time:

1. an error whose event comes is told by its event, exactly once, whichever of event, pause and look is first;
2. a pause by I/O error whose event never comes is told exactly once, with the devices that a look found;
3. an event that comes after its finding is not counted again (it only adds what it knows);
4. where "twice" and "never" can't be told apart, it is twice: nothing is lost.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import Enum

from virtbus.model import Burst, Device, Evidence, Origin, RawIoError, to_ns
from virtbus.sources.link import (
    ACTION_PAUSE,
    ACTION_REPORT,
    DISK_ERROR_NO_SPACE,
    DISK_ERRORS,
    PAUSED,
    PAUSED_IOERROR,
    PAUSED_UNKNOWN,
    STATES,
    Space,
)

LATE_SECONDS = 10.0  # an event that is later than this after its finding is an error of its own
EVIDENCE_SECONDS = 60.0  # at most one look for evidence a device in this time
ACTION_UNKNOWN = -1  # the guest runs, and the policy does not tell whether it was ever paused
STAMP_SLACK_NS = 2_000_000_000  # between libvirt's own stamp of an error and our callback


# -------------------------------------------------------------------------- what a look at a domain found


@dataclass(frozen=True, slots=True)
class Message:
    """One "I/O error" line of virDomainGetMessages, as far as it could be read."""

    target: str
    at_ns: int | None
    text: str


@dataclass(frozen=True, slots=True)
class FreeSpace:
    """What the file system under an image has left (statvfs), on a host whose paths we see."""

    free_bytes: int
    path: str


@dataclass(frozen=True, slots=True)
class Look:
    """What was asked about a domain in trouble, and answered; None is "could not be had"."""

    state: int
    reason: int
    disk_errors: Mapping[str, int] | None = None
    messages: tuple[Message, ...] | None = None
    spaces: Mapping[str, Space] = field(default_factory=dict)
    free: Mapping[str, FreeSpace] = field(default_factory=dict)

    @property
    def paused_by_io_error(self) -> bool:
        """PAUSED/IOERROR, or a pause of unknown reason (STOP came first) with a disk in error."""
        if self.state != PAUSED:
            return False
        return self.reason == PAUSED_IOERROR or (self.reason == PAUSED_UNKNOWN and bool(self.disk_errors))


_MESSAGE = re.compile(r"^I/O error: disk='(?P<disk>[^']*)'")
_STAMP = re.compile(r"timestamp='(\d{4})-(\d\d)-(\d\d) (\d\d):(\d\d):(\d\d)\.(\d{1,6})\+0000'")
_TEXT = re.compile(r"message='(.*)'\s*$", re.DOTALL)


def read_messages(lines: Sequence[str]) -> tuple[Message, ...]:
    """The I/O errors among a domain's messages (libvirt 11.1 and later); other lines are left out."""
    found = []
    for line in lines:
        head = _MESSAGE.match(line)
        if head is None:
            continue
        stamp, text = _STAMP.search(line), _TEXT.search(line)
        at_ns = None
        if stamp is not None:
            *parts, fraction = stamp.groups()
            try:
                moment = datetime(*map(int, parts), int(fraction.ljust(6, "0")), tzinfo=UTC)  # type: ignore[arg-type, misc]
            except ValueError:
                moment = None
            at_ns = None if moment is None else to_ns(moment)
        found.append(Message(head["disk"], at_ns, text[1] if text else line))
    return tuple(found)


# ------------------------------------------------------------------------------------------ the decisions


class Verdict(Enum):
    """What becomes of an I/O-error event."""

    TELL = "tell"  # pass it on
    TELL_AND_LOOK = "tell and look"  # pass it on, and look for evidence
    KNOWN = "known"  # the same error was told as a finding: it adds facts, no count


@dataclass(slots=True)
class _Case:
    """A domain in trouble, since its last resume."""

    name: str
    number: int | None
    paused: bool = False
    credit: bool = False  # the next pause is already told
    unpaired: list[tuple[int, bool]] = field(default_factory=list)  # (wall ns, surely by I/O error)
    verify: bool = False  # look whether another device failed in the same pause
    due: float | None = None
    told: dict[str, RawIoError] = field(default_factory=dict)  # alias → its last event since the last resume
    synthesised: dict[str, float] = field(default_factory=dict)  # alias → when its finding was told
    last_ns: dict[str, int] = field(default_factory=dict)  # alias → last error told, also before a resume
    evidence_at: dict[str, float] = field(default_factory=dict)
    wanting: set[str] = field(default_factory=set)  # aliases whose evidence is being looked for
    look: Look | None = None
    waited: bool = False


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
        verdict = Verdict.TELL
        if raw.action_code != ACTION_PAUSE:
            if mono - case.evidence_at.get(alias, float("-inf")) >= EVIDENCE_SECONDS:
                case.evidence_at[alias] = mono
                case.wanting.add(alias)
                verdict = Verdict.TELL_AND_LOOK
            case.told[alias] = raw
            return verdict
        for told in (alias, ""):  # "": a finding that could not name its device
            at = case.synthesised.pop(told, None)
            if at is not None and mono - at <= LATE_SECONDS:
                verdict = Verdict.KNOWN
                break
        case.told[alias] = raw
        if case.unpaired and verdict is not Verdict.KNOWN:
            case.unpaired.pop(0)
            case.verify = True
        else:
            case.credit = True
        return verdict

    def suspended(
        self, uuid: str, name: str, number: int | None, *, by_io_error: bool, mono: float, ns: int
    ) -> None:
        """A pause by I/O error, or one of unknown reason, which only a look can tell from an operator's."""
        case = self._case(uuid, name, number)
        case.paused = True
        if case.credit:
            case.credit = False
            case.verify = True
        else:
            case.unpaired.append((ns, by_io_error))
        case.look = None
        case.waited = False
        case.due = mono + self._grace

    def resumed(self, uuid: str) -> None:
        """The guest runs again: whatever fails from now on is new."""
        case = self._cases.get(uuid)
        if case is None:
            return
        case.paused = case.credit = False
        case.synthesised.clear()
        if case.due is None:
            case.told.clear()

    def gone(self, uuid: str) -> list[Burst]:
        """The domain left: what is still undecided is told now, the rest is forgotten."""
        case = self._cases.get(uuid)
        if case is None:
            return []
        found = self._decide(uuid, case, 0.0, {}) if case.due is not None else []
        del self._cases[uuid]
        return found

    def looked(self, uuid: str, look: Look) -> None:
        """What a look at the domain found; counts only while the pause is undecided."""
        case = self._cases.get(uuid)
        if case is None:
            return
        if case.due is not None and case.look is None:
            case.look = look

    # ---- what follows

    def next_due(self) -> float | None:
        """When `due` has something to say (monotonic), or None."""
        return min((c.due for c in self._cases.values() if c.due is not None), default=None)

    def due(self, mono: float, aliases: Mapping[str, Mapping[str, Device]]) -> list[tuple[list[Burst], bool]]:
        """The decisions whose grace is over, a domain each: (findings and evidence, it runs again by now).

        `aliases` gives the devices of each domain by alias, as far as they are known.
        """
        decided = []
        for uuid, case in self._cases.items():
            if case.due is None or case.due > mono:
                continue
            if case.look is None and not case.waited:
                case.waited, case.due = True, mono + self._grace  # once: late is better than nameless
                continue
            found = self._decide(uuid, case, mono, aliases.get(uuid, {}))
            decided.append((found, not case.paused))
        return decided

    def undecided(self) -> list[str]:
        """The domains that wait for a decision."""
        return [uuid for uuid, case in self._cases.items() if case.due is not None]

    def evidence(self, uuid: str, look: Look, devices: Mapping[str, Device]) -> list[Burst]:
        """What a look says about errors that events told of without a pause: bursts of no count."""
        case = self._cases.get(uuid)
        if case is None:
            return []
        wanting, case.wanting = case.wanting, set()
        return [
            _burst(raw, 0, Origin.EVENT, look, devices.get(alias), pause=False)
            for alias, raw in case.told.items()
            if alias in wanting
        ]

    def out_of_space(self, uuid: str) -> frozenset[str]:
        """The aliases whose last error was told with reason "enospc"."""
        case = self._cases.get(uuid)
        return frozenset(
            () if case is None else (a for a, raw in case.told.items() if raw.reason == "enospc")
        )

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
            wrong = _aliases(look.disk_errors or {}, devices)
            fresh = [alias for alias in wrong if alias not in told or alias in newer]
            if not fresh and not told:
                fresh = [""]
            stamps = _stamps(look, devices)
            for alias in fresh:
                at = stamps.get(alias, ns)
                raw = _raw(
                    (uuid, name, number), alias=alias, code=wrong.get(alias), action=ACTION_PAUSE, ns=at
                )
                found[alias] = _burst(raw, 1, Origin.RECONCILE, look, devices.get(alias), pause=True)
                case.synthesised[alias] = mono
                case.last_ns[alias] = at
            if fresh:
                # Its pause may still be on its way to us. A pause that waits for its event is this one.
                case.credit = not case.unpaired
                case.unpaired.clear()
                case.due = None
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

    def _decide(self, uuid: str, case: _Case, mono: float, devices: Mapping[str, Device]) -> list[Burst]:
        look, told = case.look, dict(case.told)
        pauses = case.unpaired
        if look is not None and not look.paused_by_io_error:
            pauses = [pause for pause in pauses if pause[1]]  # an operator's pause, or it never was one
        elif look is None:
            pauses = [pause for pause in pauses if pause[1]]
        verify, ns = case.verify, pauses[0][0] if pauses else 0
        case.unpaired, case.verify, case.due, case.look = [], False, None, None
        if not case.paused:
            case.told.clear()

        wrong = _aliases(look.disk_errors or {}, devices) if look is not None else {}
        found = []
        untold = [a for a in wrong if a not in told and a not in case.synthesised] if pauses or verify else []
        if not untold and pauses:
            untold = [""]
        for alias in untold:
            at = ns or max((raw.observed_at for raw in told.values()), default=0)
            raw = _raw(
                (uuid, case.name, case.number), alias=alias, code=wrong.get(alias), action=ACTION_PAUSE, ns=at
            )
            last = pauses[-1][0] if pauses else at
            found.append(
                _burst(
                    raw,
                    max(1, len(pauses)),
                    Origin.LIFECYCLE,
                    look,
                    devices.get(alias),
                    pause=True,
                    last_ns=last,
                )
            )
            case.last_ns[alias] = last
            if case.paused:
                case.synthesised[alias] = mono
        if look is not None:
            found += [
                _burst(raw, 0, Origin.EVENT, look, devices.get(alias), pause=True)
                for alias, raw in told.items()
                if raw.action_code == ACTION_PAUSE
            ]
        return found


def _aliases(disk_errors: Mapping[str, int], devices: Mapping[str, Device]) -> dict[str, int]:
    """Disk errors by alias, which libvirt gives by target; an alias nobody knows becomes ""."""
    by_target = {device.target: alias for alias, device in devices.items() if device.target}
    return {by_target.get(target, ""): code for target, code in disk_errors.items()}


def _stamps(look: Look, devices: Mapping[str, Device]) -> dict[str, int]:
    """When each device's last error was, as far as libvirt kept a message of it."""
    by_target = {device.target: alias for alias, device in devices.items() if device.target}
    return {by_target.get(m.target, ""): m.at_ns for m in look.messages or () if m.at_ns is not None}


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
    reason = "enospc" if code == DISK_ERROR_NO_SPACE else ""
    return RawIoError(*domain, path="", alias=alias, action_code=action, reason=reason, observed_at=ns)


# ------------------------------------------------------------------------------------------ evidence


def _burst(
    raw: RawIoError,
    count: int,
    origin: Origin,
    look: Look | None,
    device: Device | None,
    *,
    pause: bool,
    last_ns: int | None = None,
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
        last_ns=last_ns if last_ns is not None else raw.observed_at,
        origin=origin,
        message=message,
        disk_error=None if code is None else DISK_ERRORS.get(code, f"code {code}"),
        evidence=evidence,
    )


CONFIRMS, CONTRADICTS, INCONCLUSIVE, UNAVAILABLE = "confirms", "contradicts", "inconclusive", "unavailable"
FULL_BELOW_BYTES = 1 << 20  # less than a guest's single write: full for it


def gather(
    look: Look | None, device: Device | None, reason: str, *, lifecycle: bool, pause: bool
) -> tuple[Evidence, ...]:
    """What was looked at and what it says, in the order of the checks."""
    out = []
    if lifecycle:
        out.append(Evidence("lifecycle", CONFIRMS, "the guest was suspended by an I/O error"))
    if look is None:
        return (*out, Evidence("state", UNAVAILABLE, "the look-up did not end in time"))
    if pause:
        verdict = CONFIRMS if look.paused_by_io_error else INCONCLUSIVE
        out.append(Evidence("state", verdict, f"{STATES.get(look.state, look.state)}, reason {look.reason}"))
    target = None if device is None else device.target
    if look.disk_errors is None:
        if look.state == PAUSED:
            out.append(Evidence("disk_errors", UNAVAILABLE))
    elif target is not None:
        code = look.disk_errors.get(target)
        name = None if code is None else DISK_ERRORS.get(code, f"code {code}")
        verdict = INCONCLUSIVE if code is None else CONFIRMS
        out.append(Evidence("disk_errors", verdict, f"{target}: {name or 'none'}"))
    if look.messages is not None and target is not None:
        texts = [m.text for m in look.messages if m.target == target]
        out.append(Evidence("messages", CONFIRMS if texts else INCONCLUSIVE, texts[-1] if texts else None))
    no_space = reason == "enospc" or (
        target is not None and (look.disk_errors or {}).get(target) == DISK_ERROR_NO_SPACE
    )
    if no_space and target is not None:
        out += _space_evidence(look, device, target)
    return tuple(out)


def _space_evidence(look: Look, device: Device | None, target: str) -> list[Evidence]:
    """Is there really no space? A stale device says so too."""
    out = []
    space = look.spaces.get(target)
    kind = device.source.type if device is not None and device.source is not None else None
    if space is None:
        out.append(Evidence("block_info", UNAVAILABLE))
    else:
        verdict, found = INCONCLUSIVE, "says nothing about the space below"
        if kind == "block" and space.physical:
            left = space.physical - space.allocation
            verdict = CONFIRMS if left < FULL_BELOW_BYTES else INCONCLUSIVE
            found = f"{left} bytes of the block device were never written"
        elif kind == "file" and space.capacity and space.allocation >= space.capacity:
            verdict, found = CONTRADICTS, "the image is wholly allocated: it needs no more space"
        out.append(
            Evidence(
                "block_info",
                verdict,
                found,
                capacity_bytes=space.capacity,
                allocation_bytes=space.allocation,
                physical_bytes=space.physical,
            )
        )
    free = look.free.get(target)
    if free is None:
        out.append(Evidence("file_system", UNAVAILABLE, "the image's file system is not visible here"))
    else:
        verdict = CONFIRMS if free.free_bytes < FULL_BELOW_BYTES else CONTRADICTS
        out.append(Evidence("file_system", verdict, f"{free.free_bytes} bytes free at {free.path}"))
    return out
