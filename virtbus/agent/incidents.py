"""Turns errors into incidents: reported at once, then counted in widening windows, then resolved. Pure.

Guarantees, for any order of observations, clock jumps and restarts:
1. Every error applied is in the count of exactly one `IoError`, or in one pending count of the states
   that `changes()` gives; events and states committed together make the counts exact over SIGKILL.
2. One event speaks of one origin: errors of different origins are never added up.
3. An incident's first error goes out at once. After its first ten messages at least a second lies between
   two of them; only its end (what is pending, then the resolution) may come sooner.
4. One (domain, alias) has at most one open live incident, and one of a drill; each ends in exactly one
   resolution.
5. Memory is bounded by `IncidentLimits.max_open`.

A burst of count 0 carries facts found later about errors that were already reported (evidence, a text, the
device's name). If they are new, they become an update of count 0; they open no incident and do not restart
the quiet period. A look's finding (origin `reconcile`) that an incident of this or an earlier run already
covers becomes such a burst, whenever the look comes.

A guest that does not run, for whatever reason, proves nothing by its silence.

Errors of origin `replay` have incidents of their own: a drill never hides in a live incident, nor a live
error in a drill's.

The caller applies observations in the order in which they came, and never groups errors across another
observation: a resume between two pauses would seem to follow both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from virtbus.agent.book import Book, GuestWatch
from virtbus.agent.incident import DRILL, LIVE, PAUSE_CODE, REPORT_CODE, IncidentState, clean, uuid_in
from virtbus.agent.telling import HALTED_STATES, UNKNOWN_HOST, WHOLE_HOST, Describe, Teller
from virtbus.config import IncidentLimits
from virtbus.model import Event, Host, Now, OpenIncident
from virtbus.observations import (
    LATE_SECONDS,
    Burst,
    DeviceRemoved,
    DevicesKnown,
    DomainGone,
    DomainHalted,
    DomainResumed,
    DomainState,
    HostKnown,
    Observation,
    RawIoError,
    SourceLost,
    SourceReady,
    Surveyed,
)
from virtbus.seen import is_told
from virtbus.words import GuestState, Origin, ResolutionCause, Scope

__all__ = ["UNKNOWN_HOST", "WHOLE_HOST", "Describe", "IncidentLimits", "Incidents"]

_RUNNING_STATES = frozenset({GuestState.RUNNING, GuestState.BLOCKED})


def _unknown(_domain_uuid: str) -> None:
    """Describe nothing."""


class Incidents:
    """The state machine: observations and ticks in, events and persistent states out.

    Not thread-safe, but for `open_count`, `open_drills` and `open_incidents`. The caller commits events and
    `changes()` of one batch in one transaction; if the commit fails it keeps both, and merges what comes
    later (states: the later value of a key wins).
    """

    def __init__(
        self, limits: IncidentLimits, *, new_id: Callable[[], str], host: Host | None = None
    ) -> None:
        """Start with nothing open; `new_id` mints an incident's id."""
        self._limits = limits
        self._book = Book(host, limits.max_open)
        self._watch = GuestWatch()
        self._teller = Teller(limits, self._book, self._watch, new_id)

    # ---- the API

    @property
    def host(self) -> Host | None:
        """Whose errors these are; the source says it, and it survives a restart."""
        return self._book.host

    @property
    def open_count(self) -> int:
        """How many incidents are open, drills among them."""
        return len(self._book.open)

    @property
    def open_drills(self) -> int:
        """How many of them are drills. As safe as `open_count`."""
        return sum(key.startswith(DRILL) for key in list(self._book.open))

    def open_incidents(self, limit: int = 100) -> tuple[OpenIncident, ...]:
        """The open incidents, oldest first, at most `limit`; `total` includes what is pending.

        May be called from another thread than the rest; an incident that changes meanwhile may show
        one of its numbers from before.
        """
        shown = list(self._book.open.values())[:limit]
        return tuple(one.listed(flapping=self._teller.flaps(one)) for one in shown)

    def apply(self, observation: Observation, now: Now, describe: Describe) -> list[Event]:
        """Take one observation; the events that it causes, in order."""
        self._teller.now, self._teller.describe = now, describe
        match observation:
            case Burst():
                return self._error(observation)
            case RawIoError(observed_at=at):
                return self._error(Burst(observation, 1, at, at))
            case DomainResumed():
                return self._teller.resume(observation.domain_uuid, observation.at_ns)
            case DomainHalted():
                self._watch.halt(observation.domain_uuid, observation.state)
            case HostKnown():
                self._book.host = observation.host
            case DomainGone():
                return self._gone(observation)
            case DeviceRemoved():
                return self._removed(observation)
            case DevicesKnown(domain_uuid=uuid, aliases=aliases, at_ns=at):
                return [e for one in self._book.of(uuid) for e in self._teller.devices(one, aliases, at)]
            case SourceReady():
                return self._connected(observation)
            case Surveyed():
                return self._surveyed(observation)
            case SourceLost():
                self._watch.lost(observation.domains, clean(observation.connection))
        return []  # what else a source says of itself concerns gaps alone

    def tick(self, now: Now, describe: Describe = _unknown) -> list[Event]:
        """Windows that ended become updates, quiet incidents are resolved.

        With `describe` an incident that could not be described before is tried again.
        """
        self._teller.now, self._teller.describe = now, describe
        return self._teller.tick()

    def next_due(self) -> float | None:
        """The monotonic time of the next tick, or None; such a tick may find that nothing is due yet."""
        return None if self._teller.wake == math.inf else self._teller.wake

    def changes(self) -> dict[str, bytes | None]:
        """Persistent states that changed since the last call, by key; None deletes the key."""
        return self._book.changes(self._teller.now)

    def restore(self, states: Mapping[str, bytes], now: Now) -> tuple[str, ...]:
        """Go on from the states of an earlier run; to be called once, before anything else.

        The time between counts as `max(0, wall difference)`. Nothing resolves before the next
        `SourceReady`. Keys of others are left alone. Returns a line for each state that could not be
        read, for a gap event: what it had pending is lost. Such a state is deleted by the next commit.
        """
        self._teller.now = now
        problems = self._book.restore(states, now)
        self._watch.blind = True
        self._teller.look_again()
        return problems

    # ---- what happened

    def _error(self, burst: Burst) -> list[Event]:
        if burst.count and burst.origin is Origin.RECONCILE:
            if self._is_left_over(burst):
                return []
            known, its = self._tells_of(burst), self._book.of(burst.raw.domain_uuid)
            burst = replace(burst, count=0) if known else _dated(burst, its, self._teller.now.wall_ns)
        elif burst.late and self._is_another(burst):
            burst = replace(burst, count=1)
        return self._teller.error(burst)

    def _gone(self, gone: DomainGone) -> list[Event]:
        uuid, events = gone.domain_uuid, list[Event]()
        incidents = self._book.of(uuid)
        ended = [one for one in incidents if one.is_of(gone.connection)]
        for incident in ended:
            events += self._teller.resolve(incident, gone.cause, gone.at_ns)
        if len(ended) < len(incidents):  # another connection has a guest of this UUID, which is in trouble
            return events
        self._watch.gone(uuid)
        for incident in self._book.of_host():
            if uuid in incident.paused:
                incident.paused.discard(uuid)
                incident.quiet_since_at = self._teller.now.monotonic
                self._book.touch(incident)
                self._teller.schedule(incident)
        self._book.forget(lambda domain, _alias: domain == uuid)
        return events

    def _removed(self, removed: DeviceRemoved) -> list[Event]:
        events: list[Event] = []
        for incident in self._book.of(removed.domain_uuid):
            if incident.scope is Scope.DEVICE and incident.device.alias == removed.alias:
                events += self._teller.removed(incident, removed.at_ns)
        self._book.forget(lambda *device: device == (removed.domain_uuid, removed.alias))
        return events

    # ---- what a look found

    def _connected(self, ready: SourceReady) -> list[Event]:
        """Compare what is open with what was looked at, after a time of not seeing.

        1. Incidents whose domain or device is gone, or whose domain was started again, end (why it went
           can't be known any more: `domain_stopped`, `device_removed`).
        2. Findings that no incident covers are errors; so is a pause by an error that no incident covers.
        3. Guests run, or are paused, as the look found them.
        4. No incident counts as quiet before we have watched it again for the widest window.
        """
        self._book.host, self._book.throttles = ready.host, ready.throttles
        domains = {one.uuid: one for one in ready.domains if one.state != GuestState.SHUT_OFF}
        events: list[Event] = []
        restarted: set[str] = set()
        for incident in list(self._book.open.values()):
            if incident.scope is Scope.HOST:
                incident.paused &= domains.keys() if ready.whole else incident.paused
            elif domain := domains.get(uuid_in(incident.key)):
                renumbered = None not in (incident.run, domain.number) and incident.run != domain.number
                # Behind another socket a guest is another process, with whatever number.
                elsewhere = not (ready.whole or incident.is_of(ready.connection))
                if renumbered or (elsewhere and self._watch.is_unseen(incident)):
                    restarted.add(domain.uuid)
                    events += self._teller.resolve(incident, ResolutionCause.DOMAIN_STOPPED, ready.at_ns)
                elif domain.state in _RUNNING_STATES and incident.removed:
                    events += self._teller.resolve(incident, ResolutionCause.DEVICE_REMOVED, ready.at_ns)
                elif domain.aliases is not None:
                    events += self._teller.devices(incident, domain.aliases, ready.at_ns)
            elif ready.whole:  # else it is another connection's guest, or reported gone by its own
                events += self._teller.resolve(incident, ResolutionCause.DOMAIN_STOPPED, ready.at_ns)
        self._book.forget(lambda uuid, _alias: uuid in restarted or (ready.whole and uuid not in domains))
        if ready.whole:
            self._teller.wake = -math.inf  # what was unseen may be due
        self._watch.looked_at(set(domains), whole=ready.whole)
        for domain in domains.values():
            if domain.state in HALTED_STATES:
                self._watch.halt(domain.uuid, GuestState(domain.state))
        # Devices that failed before last: a disk error that is kept explains no pause that another one does.
        for finding in sorted(ready.findings, key=lambda one: bool(self._book.last_seen(one))):
            events += self._error(finding)
        for domain in domains.values():
            if domain.state in _RUNNING_STATES:
                if self._is_paused(domain.uuid, drills=True):
                    events += self._teller.resume(domain.uuid, ready.at_ns)
            elif domain.paused_by_io_error and not self._is_paused(domain.uuid, drills=False):
                events += self._keep_paused(domain, ready.at_ns)
        settled = min(self._limits.quiet_seconds, self._limits.max_window_seconds)
        not_before = self._teller.now.monotonic + settled - self._limits.quiet_seconds
        for incident in self._book.open.values():
            if ready.whole or incident.scope is Scope.HOST or uuid_in(incident.key) in domains:
                incident.quiet_since_at = max(incident.quiet_since_at, not_before)
                self._book.touch(incident)
                self._teller.schedule(incident)
        return events

    def _surveyed(self, survey: Surveyed) -> list[Event]:
        """Every connection was looked at: guests that none of them has are gone.

        A guest whose connection was not reached, or is not known while one was not, is unseen until a later
        survey decides. That one speaks of such guests alone: all others' ends are reported as they come.
        """
        self._book.host = self._book.host or survey.host
        watch = self._watch
        known = survey.domains | watch.sighted | (watch.unsighted.keys() - watch.unreached)
        asked = None if watch.blind or not watch.unreached else frozenset(watch.unreached)
        unreached = frozenset(map(clean, survey.unreached))
        waiting: set[str] = set()
        events: list[Event] = []
        for incident in list(self._book.open.values()):
            if incident.scope is Scope.HOST:
                incident.paused &= incident.paused if survey.unreached else known
                continue
            uuid = uuid_in(incident.key)
            if incident.drill or uuid in known or (asked is not None and uuid not in asked):
                continue
            if survey.unreached and incident.lies_in(unreached):
                waiting.add(uuid)
            else:
                events += self._teller.resolve(incident, ResolutionCause.DOMAIN_STOPPED, survey.at_ns)
        if not survey.unreached:
            self._book.forget(lambda uuid, _alias: uuid not in known)
        watch.see_all(but=waiting)
        self._teller.wake = -math.inf  # what was unseen may be due
        return events

    def _tells_of(self, finding: Burst) -> bool:
        """Whether an incident of this or an earlier run already covers a look's finding.

        An error's own time is that of the message which the hypervisor kept of it: what has one is known if
        its device had an error at that time or later. A standing pause without one is known if an incident of
        its device (or of an unknown device of its guest) holds the guest paused. It is also known if another
        device's incident holds the guest paused and this device failed before: libvirt keeps old disk errors.
        """
        uuid, alias = finding.raw.domain_uuid, finding.raw.alias
        live = [one for one in self._book.of(uuid) if not one.drill]
        own = [one for one in live if not alias or one.device.alias in (None, alias)]
        seen = self._book.last_seen(finding)

        def told(*last_ns: int) -> bool:
            now_ns = self._teller.now.wall_ns
            return any(is_told(finding.last_ns, last, now_ns) for last in last_ns)

        if finding.raw.action_code != PAUSE_CODE:
            return told(*seen, *(at for one in own for at in one.told_ns))
        holding = [one for one in own if uuid in one.paused]
        if holding:
            if finding.stamp_ns is None and finding.message is None:
                return True
            return told(*(at for one in holding for at in one.told_ns))
        if any(uuid in one.paused for one in live):
            its = [one for one in own if alias and one.device.alias == alias]
            failed = (*seen, *(at for one in its for at in one.told_ns))
            return bool(failed) and (finding.stamp_ns is None or told(*failed))
        whole_host = self._book.open.get(f"{LIVE}*")
        return whole_host is not None and uuid in whole_host.paused

    def _is_another(self, late: Burst) -> bool:
        """Whether what a look found was an older error, which an earlier run reported, and this a new one."""
        uuid, alias = late.raw.domain_uuid, late.raw.alias
        holding = [one for one in self._book.of(uuid) if not one.drill and uuid in one.paused]
        # What a listing found has no name: the incident that made it known may be another device's.
        own = [one for one in holding if one.device.alias in (None, alias)] or holding
        latest = max((one.newest_ns for one in own), default=None)
        return latest is not None and late.first_ns - latest > LATE_SECONDS * 1e9

    def _is_left_over(self, finding: Burst) -> bool:
        """Whether a disk error is an old one, because the look found another device that had never failed.

        That one explains the pause, in whichever order the two come.
        """
        if finding.raw.action_code != PAUSE_CODE or finding.stamp_ns is not None or not finding.rivals:
            return False
        uuid, alias = finding.raw.domain_uuid, finding.raw.alias
        live = {one.device.alias: one for one in self._book.of(uuid) if not one.drill}
        if alias in live and uuid in live[alias].paused:
            return False

        def failed(device: str) -> bool:
            return device in live or self._book.has_seen(uuid, device)

        return failed(alias) and not all(map(failed, finding.rivals))

    def _is_paused(self, uuid: str, *, drills: bool) -> bool:
        """Whether an incident says that the guest is paused."""
        concerned = [*self._book.of(uuid), *self._book.of_host()]
        return any(uuid in one.paused for one in concerned if drills or not one.drill)

    def _keep_paused(self, domain: DomainState, at_ns: int) -> list[Event]:
        """A guest was found paused by an error, and no incident says so: mark one that may, or open one."""
        known = (PAUSE_CODE, REPORT_CODE)
        incidents = [one for one in self._book.of(domain.uuid) if not one.drill]
        unclear = [one for one in incidents if one.facts.action_code not in known]
        for incident in unclear:
            self._teller.pause(incident, domain.uuid)
        if unclear:
            return []
        # Named if there is one disk that it can be: else its event, when it comes, opens a second incident.
        alias = next(iter(domain.aliases)) if domain.aliases and len(domain.aliases) == 1 else ""
        raw = RawIoError(domain.uuid, domain.name, None, "", alias, PAUSE_CODE, "", at_ns)
        return self._error(Burst(raw, 1, at_ns, at_ns, Origin.RECONCILE))


def _dated(finding: Burst, incidents: Iterable[IncidentState], now_ns: int) -> Burst:
    """A pause that nobody reported is newer than an error that was: its message is the earlier one's."""
    own = [one for one in incidents if one.device.alias == finding.raw.alias and not one.drill]
    if finding.raw.action_code != PAUSE_CODE or finding.stamp_ns is None:
        return finding
    older = any(is_told(finding.last_ns, one.newest_ns, now_ns) for one in own)
    return replace(finding, first_ns=now_ns, last_ns=now_ns) if older else finding
