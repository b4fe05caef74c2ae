"""One domain in trouble: its errors and pauses as reported, and what a look says about them. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace

from virtbus.model import Device
from virtbus.observations import LATE_SECONDS, Burst, RawIoError
from virtbus.sources.evidence import Look, Message, disk_errors_by_alias, newest_by_alias
from virtbus.sources.findings import action_by_policy, burst_of, raw_error
from virtbus.sources.link import (
    ACTION_PAUSE,
    DISK_ERROR_NO_SPACE,
    DISK_ERROR_UNSPECIFIED,
    PAUSED,
    PAUSED_IOERROR,
)
from virtbus.words import ENOSPC, Origin


@dataclass(slots=True, eq=False)
class Pause:
    """One pause that is not decided yet."""

    ns: int
    began: float
    due: float
    certain: bool  # libvirt said that it is by an I/O error
    events: dict[str, RawIoError]  # the events of this pause, by alias
    over: bool = False
    look: Look | None = None
    wrong: dict[str, int] = field(default_factory=dict)  # what the look found: alias → disk error
    waited: bool = False
    held: list[RawIoError] = field(default_factory=list)  # events that wait for a look to name them
    hinted: bool = False  # its event may have been taken for that of an earlier one
    unplugged: dict[str, int] = field(default_factory=dict)  # the old disk errors of devices that left since

    def is_certain(self) -> bool:
        """Whether it is by an I/O error, as far as libvirt said so or no look shows that it is not."""
        return self.certain or (self.hinted and (self.look is None or self.look.paused_by_io_error))

    def is_unsaid(self) -> bool:
        """Whether it is taken for an operator's until an event comes, though no look has shown that."""
        seen = self.look is not None and not self.look.paused_by_io_error
        return not (self.certain or self.hinted or self.events or self.held or seen)

    def saw_another(self) -> bool:
        """Whether the look saw a later pause: libvirt says at once which ones are by an I/O error."""
        seen = None if self.look is None else (self.look.state, self.look.reason)
        return self.over and not self.certain and seen == (PAUSED, PAUSED_IOERROR)

    def may_lack(self, alias: str) -> bool:
        """Whether it is over and has no event, so that an event of `alias` may be its own."""
        if not self.over or self.events or self.held:
            return False
        return self.look is None or not alias or set(self.wrong) == {alias}


@dataclass(slots=True)
class Finding:
    """An error of the present pause that was reported without an event."""

    at: float  # monotonic
    raw: RawIoError
    began: float = math.inf  # its pause, if a callback reported that (monotonic)


@dataclass(slots=True)
class Nameless:
    """Who may have been a device that its event does not name: also those who do not look so any more."""

    left: set[str] = field(default_factory=set)  # unplugged since
    busy: set[str] = field(default_factory=set)  # with a block job then or since; "": nobody knows which
    waiting: list[RawIoError] = field(default_factory=list)  # without a pause: until the XML is read
    since: float = 0.0  # when the first of them came (monotonic)


@dataclass(slots=True)
class Case:
    """A domain in trouble."""

    uuid: str
    name: str
    number: int | None
    unsure: bool = False  # disk errors may be left over from before we listened, and have not been read yet
    paused: bool = False
    paused_at: float = -math.inf  # the last pause and the last resume that callbacks reported
    resumed_at: float = -math.inf
    pauses: list[Pause] = field(default_factory=list)  # undecided, oldest first
    credit: dict[str, RawIoError] = field(default_factory=dict)  # events whose pause is still to come
    credit_at: float = 0.0
    held: list[RawIoError] = field(default_factory=list)  # as of a pause, whose pause is still to come
    found_ahead: bool = False  # a finding whose pause is still to come
    doubted_at: float | None = None  # an event reported a pause, and no pause came yet
    hinted_at: float = -math.inf  # an event came that explains an earlier pause, or is the next one's
    # Such a one, until more is heard of the guest, and its pause, or when that was taken for an operator's.
    lent: tuple[RawIoError, Pause | float] | None = None
    unsaid: list[float] = field(default_factory=list)  # when pauses were taken for an operator's
    puzzled_at: float = -math.inf  # a pause that nothing explained began, and goes on: its event may be late
    ask_at: float = 0.0  # when a look is to decide
    # Since the last resume: alias ("": not known) → its event, or its finding.
    events: dict[str, RawIoError] = field(default_factory=dict)
    synthesised: dict[str, Finding] = field(default_factory=dict)
    unseen: set[str] = field(default_factory=set)  # aliases reported before any look at their pause
    # Also before it:
    stale: dict[str, int] = field(default_factory=dict)  # alias → a disk error that may be an old one
    last_ns: dict[str, int] = field(default_factory=dict)  # alias → the last error reported
    reports: dict[str, RawIoError] = field(default_factory=dict)  # alias → the last one without a pause
    looked_for: dict[str, float] = field(default_factory=dict)  # alias → when evidence was last asked for
    wanting: set[str] = field(default_factory=set)  # aliases whose evidence is being looked for
    nameless: Nameless = field(default_factory=Nameless)
    unclear_at: float = -math.inf  # when the XML was read, and did not show whose such an event was

    def suspended(self, *, by_io_error: bool, grace: float, mono: float, ns: int) -> None:
        """The guest was paused: decided after `grace` seconds, unless a look was ahead of the callback."""
        # Its event came just now, or longer ago on a busy host, and no look has seen the guest run since.
        explained = self.doubted_at is not None or mono - self.credit_at <= grace
        self.paused, self.paused_at = True, mono
        self.doubted_at, self.puzzled_at = None, -math.inf
        if self.found_ahead:
            self.found_ahead = False
            self.credit = {}
            return
        events = self.credit if explained else {}
        if by_io_error and explained and not events:
            events = self._take_back()
        hinted = mono - self.hinted_at <= grace
        self.pauses.append(Pause(ns, mono, mono + grace, by_io_error, events, held=self.held, hinted=hinted))
        self.credit, self.held, self.lent = {}, [], None

    def _take_back(self) -> dict[str, RawIoError]:
        """What was lent: before libvirt calls a pause one by an I/O error, it has reported that error."""
        if self.lent is None:
            return {}
        raw, taker = self.lent
        if isinstance(taker, float):
            self.unsaid.insert(0, taker)
        elif taker in self.pauses:
            taker.events.clear()
        else:  # it was decided by it
            return {}
        return {raw.alias: raw}

    def resumed(self, mono: float) -> None:
        """The guest runs again: whatever fails from now on is new."""
        self.resumed_at = max(self.resumed_at, mono)
        self.paused = self.found_ahead = False
        self.doubted_at, self.puzzled_at = None, -math.inf
        for pause in self.pauses:
            pause.over = True
        self.credit, self.lent = {}, None
        self.keep_told()  # of a disk that failed behind the look, too
        self.events.clear()
        self.synthesised.clear()
        self.unseen.clear()

    def needs_event(self, mono: float) -> bool:
        """Whether there is a pause that is taken for an operator's if it has no event."""
        self.unsaid = [at for at in self.unsaid if mono - at <= LATE_SECONDS]
        return bool(self.unsaid) or any(each.is_unsaid() for each in self.pauses)

    def explained(self, raw: RawIoError, mono: float) -> None:
        """An event was taken for that of an earlier pause; it may be the next one's."""
        self.hinted_at = mono
        self.last_ns[raw.alias] = max(self.last_ns.get(raw.alias, 0), raw.observed_at)

    def claim(self, raw: RawIoError, pause: Pause | None, mono: float, grace: float) -> None:
        """Whose event it is: of a pause that needs it, of the present one, of an earlier or of the next."""
        unsaid = [each for each in self.pauses if each.is_unsaid()]
        if self.unsaid and pause not in unsaid:
            taken = self.unsaid.pop(0)  # it was not an operator's
            self.lent = (raw, taken) if pause is None else None
            return
        over = [each for each in self.pauses if each.may_lack(raw.alias)]
        present = [] if pause is None else [pause]
        for owner in [*(each for each in present if each in unsaid), *unsaid, *present, *over]:
            owner.events[raw.alias] = raw
            if owner is not pause:
                self.hinted_at = mono
            if pause is None:
                self.lent, owner.due = (raw, owner), max(owner.due, mono + grace)
            return
        self.credit[raw.alias] = raw

    def unheard(self, mono: float, *, seen: bool) -> list[RawIoError]:
        """What was reported without its event so lately that this may still come.

        `seen`: also of pauses that only a look found; their event may have come to an earlier run.
        """
        late = [one for one in self.synthesised.values() if mono - one.at <= LATE_SECONDS]
        return [one.raw for one in late if seen or one.began < math.inf]

    def removed(self, aliases: Iterable[str]) -> None:
        """Devices were unplugged; what came without a name may have been of one of them."""
        for alias in aliases:
            self.wanting.discard(alias)
            for pause in self.pauses if alias in self.stale else ():
                pause.unplugged[alias] = self.stale[alias]
            for kept in (self.stale, self.last_ns, self.reports, self.looked_for):
                kept.pop(alias, None)
            self.reports.pop("", None)
            if self.has_nameless():
                self.nameless.left.add(alias)

    def has_nameless(self) -> bool:
        """Whether something was reported without the name of its device."""
        is_told = any("" in each for each in (self.reports, self.events, self.synthesised))
        return self.holds() or bool(self.nameless.waiting) or is_told

    def holds(self) -> bool:
        """Whether events wait for a look to name them."""
        return bool(self.held) or any(pause.held for pause in self.pauses)

    def began(self, mono: float) -> list[float]:
        """When each thing came that is not decided yet (monotonic).

        One of unknown reason, of a disk that failed before, looks like an operator's until its event comes; a
        finding's may be late, and then say that there was more than one error.
        """
        moments = [pause.began for pause in self.pauses]
        moments += [one.began for one in self.synthesised.values() if mono - one.at <= LATE_SECONDS]
        moments += [self.puzzled_at] if mono - self.puzzled_at <= LATE_SECONDS else []
        moments += [self.credit_at] if self.held else []
        return moments + ([self.nameless.since] if self.nameless.waiting else [])

    def due(self, grace: float) -> list[float]:
        """When each of them is to be decided."""
        moments = [pause.due for pause in self.pauses]
        moments += [self.credit_at + grace] if self.held else []
        return moments + ([self.nameless.since + grace] if self.nameless.waiting else [])

    def paused_since(self, mono: float) -> bool:
        """Whether a pause came after `mono`, which what was asked before does not know."""
        return any(not pause.over and pause.began > mono for pause in self.pauses)

    def keep_told(self) -> None:
        """Mark this pause's errors as old: QEMU keeps them, and a later pause is not due to them."""
        self.stale = self.stale | _kept(self.events)

    def decide(self, pause: Pause, mono: float, devices: Mapping[str, Device]) -> list[Burst]:
        """What is reported of a pause whose grace is over: devices of no event, evidence for the others."""
        events = pause.events
        look, wrong = (None, {}) if pause.saw_another() else (pause.look, pause.wrong)
        wrong = {alias: code for alias, code in wrong.items() if pause.unplugged.get(alias) != code}
        fresh = [alias for alias, code in wrong.items() if self.stale.get(alias) != code]
        by_error = look is not None and look.paused_by_io_error
        synthesised = {} if pause.over else self.synthesised  # else they are of a later pause
        named: str | None = None
        if "" in events and by_error and (alias := suspect(self, wrong, events.keys(), devices)):
            named = alias  # first of all: what comes next may be of the same device
            events[alias] = events.pop("")._replace(alias=alias)
            self.last_ns[alias] = max(self.last_ns.get(alias, 0), events[alias].observed_at)
            if not pause.over:
                self.events[alias] = self.events.pop("", events[alias])._replace(alias=alias)
        missed: list[str] = []
        if pause.is_certain() or (by_error and fresh):
            known = events.keys() | synthesised.keys() | {raw.alias for raw in pause.held if raw.alias}
            missed = missed_devices(self, wrong if by_error else {}, known, devices)
        unsure = self.unsure
        looked = look is not None and look.disk_errors is not None
        # QEMU keeps what the events reported, behind the look too: a later pause is not due to it.
        self.stale = (wrong if looked else self.stale) | _kept(events)
        self.unsure = self.unsure and not looked
        found = [] if named is None else [self._facts_of(events[named], look, devices)]
        held, missed = _release(self, pause, missed, devices)
        found += held
        explained = bool(found or events or synthesised)
        for alias in missed:
            origin = Origin.RECONCILE if unsure and explained else Origin.LIFECYCLE
            found.append(self.found(alias, pause.ns, look, devices, wrong.get(alias), origin))
            explained = True
            if not pause.over:
                self.synthesised[alias] = Finding(mono, found[-1].raw, pause.began)
        if look is not None:
            found += [self._facts_of(raw, look, devices) for alias, raw in events.items() if alias != named]
        if not complete(look) and not pause.over:
            self.unseen |= {*events, *missed}
        if not (found or events or synthesised) and (look is None or by_error):
            # Of a disk that failed before: until its event comes an operator's.
            self.unsaid = [*(at for at in self.unsaid if mono - at <= LATE_SECONDS), mono]
            if not pause.over:
                self.puzzled_at = pause.began
        return found

    def _facts_of(self, raw: RawIoError, look: Look | None, devices: Mapping[str, Device]) -> Burst:
        """What a look says about an error that its event reported."""
        return burst_of(raw, 0, Origin.EVENT, look, devices.get(raw.alias), pause=True)

    def hold(self, raw: RawIoError, pause: Pause | None) -> bool:
        """Whether an event without a device waits for the look at its pause.

        The first one of a guest is reported at once; a further one may be of the same device, or not.
        """
        if raw.alias or ("" not in self.events and not any(self.last_ns)):
            return False
        (self.held if pause is None else pause.held).append(raw)
        return True

    def expect(self, mono: float, grace: float) -> None:
        """An event came whose pause is still to come; one that does not within the grace time is in doubt."""
        self.credit_at = mono
        if not self.paused:
            self.doubted_at, self.ask_at = mono, mono + grace

    def release_all(self) -> list[Burst]:
        """The events that were held and whose pause did not come."""
        held, self.held = self.held, []
        for raw in held:
            self.events[raw.alias] = raw
            self.last_ns[raw.alias] = raw.observed_at
        return [burst_of(raw, 1, Origin.EVENT, None, None, pause=False) for raw in held]

    def found(
        self,
        alias: str,
        ns: int,
        look: Look | None,
        devices: Mapping[str, Device],
        code: int | None,
        origin: Origin,
    ) -> Burst:
        """An error of a pause that no event reported.

        Of origin `reconcile` where another device explains the pause and this one's disk error may be older
        than we are: then whoever remembers an earlier run knows better.
        """
        whose = (self.uuid, self.name, self.number)
        raw = raw_error(whose, alias=alias, code=code, action=ACTION_PAUSE, ns=ns)
        self.last_ns[alias] = ns
        return burst_of(raw, 1, origin, look, devices.get(alias), pause=True)

    def reconcile(
        self, look: Look, newer: Mapping[str, Message], devices: Mapping[str, Device], *, mono: float, ns: int
    ) -> list[Burst]:
        """What the look after a (re)connect found and no event reported; see CrossCheck."""
        found, named = dict[str, Burst](), list[Burst]()
        domain = (self.uuid, self.name, self.number)
        # A pause whose beginning and end callbacks reported, or whose events wait for names, is theirs to
        # report, however late the look is; so is one that goes on, of a guest that they saw run before it.
        goes_on = any(not one.over and one.began <= look.asked_at for one in self.pauses)
        is_theirs = self.holds() or self.paused_at <= look.asked_at <= self.resumed_at
        is_theirs = is_theirs or (goes_on and self.resumed_at > -math.inf)
        if look.paused_by_io_error and not is_theirs:
            self.paused = True
            wrong = disk_errors_by_alias(look.disk_errors or {}, devices)
            suspects = wrong or dict.fromkeys(newer, DISK_ERROR_UNSPECIFIED)
            known = self.events.keys() | self.synthesised.keys()
            if self.unsure and len(suspects.keys() - known) > 1:
                # Which is left over and which was reported nameless whoever remembers an earlier run knows.
                self.events.pop("", None)
                self.synthesised.pop("", None)
            else:
                named = name_nameless(self, suspects, look, devices)
                known = self.events.keys() | self.synthesised.keys()
            missed = missed_devices(self, suspects, known, devices)
            fresh = [alias for alias in missed if alias not in known or alias in newer]
            fresh += [alias for alias in newer if alias in suspects and alias not in fresh]
            self.stale, self.unsure = wrong, self.unsure and look.disk_errors is None
            stamps = newest_by_alias(look, devices)
            rivals = frozenset(fresh)
            for alias in fresh:
                kept = stamps.get(alias)
                at = ns if kept is None or kept.at_ns is None else kept.at_ns
                burst = self.found(alias, at, look, devices, wrong.get(alias), Origin.RECONCILE)
                found[alias] = replace(burst, rivals=rivals - {alias})
                self.synthesised[alias] = Finding(mono, found[alias].raw)
            if fresh:
                # Its pause may still be on its way to us, unless it is the one that waits for its event.
                self.found_ahead = all(pause.over for pause in self.pauses)
                self.pauses = [pause for pause in self.pauses if pause.over]
        for alias, message in newer.items():
            if alias not in found:
                at, device = message.at_ns or ns, devices.get(alias)
                raw = raw_error(domain, alias=alias, code=None, action=action_by_policy(device), ns=at)
                burst = burst_of(raw, 1, Origin.RECONCILE, look, device, pause=False)
                found[alias] = replace(burst, message=message.text, stamp_ns=message.at_ns)
                self.last_ns[alias] = at
        return [*named, *found.values()]


def _release(
    case: Case, pause: Pause, missed: list[str], devices: Mapping[str, Device]
) -> tuple[list[Burst], list[str]]:
    """The held events, under the names of devices that nobody reported → (they, who is left)."""
    found, left = [], list(missed)
    only = next(iter(pause.wrong)) if len(pause.wrong) == 1 and not case.nameless.left else ""
    for event in pause.held:
        alias = event.alias or (left.pop(0) if left else only)
        raw = event._replace(alias=alias)
        found.append(burst_of(raw, 1, Origin.EVENT, pause.look, devices.get(alias), pause=True))
        case.last_ns[alias] = raw.observed_at
        if not pause.over:
            case.events[alias] = raw
    return found, left


def name_nameless(
    case: Case, wrong: Mapping[str, int], look: Look, devices: Mapping[str, Device]
) -> list[Burst]:
    """Name what was reported of this pause without a device, if the look can; a burst of no count."""
    known = case.events.keys() | case.synthesised.keys()
    if "" not in known:
        return []
    alias = suspect(case, wrong, known, devices)
    if not alias:
        return []
    raw = raw_of(case, "")._replace(alias=alias)
    if "" in case.events:
        case.events[alias] = raw
        del case.events[""]
    finding = case.synthesised.pop("", None)
    if finding is not None:
        if not raw.reason and wrong.get(alias) == DISK_ERROR_NO_SPACE:
            raw = raw._replace(reason=ENOSPC)
        case.synthesised[alias] = Finding(finding.at, raw, finding.began)
    case.last_ns[alias] = max(case.last_ns.get(alias, 0), raw.observed_at)
    case.unseen.discard("")
    return [burst_of(raw, 0, Origin.EVENT, look, devices.get(alias), pause=True)]


class Cases(dict[str, Case]):
    """The domains in trouble, by their UUIDs."""

    def again(self, raw: RawIoError) -> bool:
        """Note an error, without a pause and of a named device, that equals one reported a moment ago.

        False where something has changed since, and it is to be judged like the first.
        """
        case = self.get(raw.domain_uuid)
        if case is None or raw.alias not in case.looked_for:
            return False
        case.last_ns[raw.alias], case.reports[raw.alias] = raw.observed_at, raw
        return True


def _kept(events: Mapping[str, RawIoError]) -> dict[str, int]:
    """What virDomainGetDiskErrors says, by alias, after these errors paused their guest."""
    return {
        alias: DISK_ERROR_NO_SPACE if raw.reason == ENOSPC else DISK_ERROR_UNSPECIFIED
        for alias, raw in events.items()
        if alias
    }


def complete(look: Look | None) -> bool:
    """Whether there was a look, and a complete one."""
    return look is not None and look.complete


def raw_of(case: Case, alias: str) -> RawIoError:
    """What was reported of a device in this pause."""
    return case.events[alias] if alias in case.events else case.synthesised[alias].raw


def suspect(
    case: Case, wrong: Mapping[str, int], known: AbstractSet[str], devices: Mapping[str, Device]
) -> str:
    """The device of an error that came without its name; "" when that is unclear."""
    return missed_devices(case, wrong, known - {""}, devices, nameless=True)[0]


def missed_devices(
    case: Case,
    wrong: Mapping[str, int],
    known: AbstractSet[str],
    devices: Mapping[str, Device],
    *,
    nameless: bool = False,
) -> list[str]:
    """The devices of one pause that nobody reported; "" when the pause was not reported and nothing names it.

    `nameless`: something was reported without a name, so there is one more than those in `known`.
    """
    if "" in wrong and any(alias not in devices for alias in known):
        # A target that the description lacks is a reported device's, which it lacks too (or it was not read
        # yet).
        wrong = {alias: code for alias, code in wrong.items() if alias}
    fresh = [alias for alias, code in wrong.items() if alias not in known and case.stale.get(alias) != code]
    if fresh or (known and not nameless):
        return fresh
    wrong = {alias: code for alias, code in wrong.items() if alias not in known}
    # One that failed before failed again: the only one, or the only one whose events libvirt loses.
    for suspects in (list(wrong), [alias for alias in wrong if _is_unnamed(devices.get(alias))]):
        if len(suspects) == 1 and not case.nameless.left:
            return suspects
    return [""]


def _is_unnamed(device: Device | None) -> bool:
    """A network disk whose source has no name: libvirt up to 9.0 drops its I/O-error events."""
    source = None if device is None else device.source
    return source is not None and source.type == "network" and not source.path
