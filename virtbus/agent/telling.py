"""Counts errors into incidents and decides what is reported when: windows, message rate, pauses, the end.

The windows. A message opens a window; errors in it are counted.

1. Errors that are pending at its end are reported then; the next window is twice as wide, up to the limit.
2. If none is pending, the next error goes out at once. If it came within the window's width after its end,
   the next window is twice as wide, too; else it keeps its width.

So rare errors are reported without delay, and never more than one a window. A change of action or reason, or
the start of flapping, goes out at once where the message rate allows it, else as soon as it does; what was
counted by then goes with it, under the newest action and reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

from virtbus.agent.book import PAUSED_GUESTS, Book, GuestWatch
from virtbus.agent.incident import (
    DRILL,
    FORMAT,
    LIVE,
    PAUSE_CODE,
    Facts,
    IncidentState,
    any_counts,
    clean,
    uuid_in,
)
from virtbus.config import IncidentLimits
from virtbus.model import Device, Domain, Event, Host, Incident, Now, Resolution, to_datetime
from virtbus.observations import Burst, Description
from virtbus.telemetry import Trouble, emit
from virtbus.words import GuestState, Origin, Phase, ResolutionCause, Scope

Describe: TypeAlias = Callable[[str], Description | None]
"""Domain UUID → what the cache knows of it, at once, or None."""

WHOLE_HOST = Domain(uuid="00000000-0000-0000-0000-000000000000", name="*")
"""The `domain` of an event whose incident has scope `host`: it speaks for guests that are not named."""

UNKNOWN_HOST = Host(name="unknown")
"""The `host` of an event before the first look at the hypervisor, ever."""

FREE_MESSAGES = 10  # after these an incident waits between messages …
MESSAGE_SPACING = 1.0  # … at least this many seconds
FLAPPING_PAUSES, FLAPPING_SECONDS = 3, 600.0  # so many pauses within so many seconds are a loop
HALTED_STATES = frozenset({GuestState.PAUSED, GuestState.CRASHED, GuestState.PM_SUSPENDED})
_GONE_CAUSES = frozenset({ResolutionCause.DOMAIN_STOPPED, ResolutionCause.MIGRATED})


class Teller:
    """Makes events of errors, resumes and ends; `now` and `describe` are those of the present call.

    Of `max_open` incidents three quarters are for devices; beyond that one per domain (scope `domain`,
    alias null), and when all is taken one for the whole host (scope `host`, domain `WHOLE_HOST`) and one for
    its drills. Without `fold` each callback is an event of its own; those that were folded before they came
    here (a `Burst`, when the queue was long) stay one event with their count.
    """

    def __init__(
        self, limits: IncidentLimits, book: Book, watch: GuestWatch, new_id: Callable[[], str]
    ) -> None:
        """`new_id` mints an incident's id."""
        self._limits, self._book, self._watch, self._new_id = limits, book, watch, new_id
        self.now = Now(0, 0.0)
        self.describe: Describe = lambda _uuid: None
        self.wake = math.inf  # nothing is due before this (monotonic); may be early, never late
        self._domains_limit = limits.max_open - 2  # the last are the host's and a drill's host's
        self._devices_limit = self._domains_limit * 3 // 4

    # ---- errors

    def error(self, burst: Burst) -> list[Event]:
        """Count a burst into its incident, or open one; report what can't wait for the window's end."""
        raw, opened = burst.raw, self._book.open
        prefix = DRILL if burst.origin is Origin.REPLAY else LIVE
        incident = opened.get(f"{prefix}{raw.domain_uuid}/{raw.alias}")
        if incident is None and burst.count:
            incident = self._incident_for(burst, prefix)
        elif incident is None:
            # Facts about an error that was reported without its device's name, or folded into its domain.
            nameless, whole = (opened.get(f"{prefix}{raw.domain_uuid}{end}") for end in ("/", ""))
            incident = nameless or whole
            if nameless is not None:
                self._book.name(nameless, raw.alias)
        return [] if incident is None else self._count(incident, burst)

    def _incident_for(self, burst: Burst, prefix: str) -> IncidentState:
        """The incident of a device that has none: a new one of its own if there is room, or a wider one."""
        raw, opened, at = burst.raw, self._book.open, self.now.monotonic
        uuid, alias = clean(raw.domain_uuid), clean(raw.alias)
        for scope, key, limit in (
            (Scope.DEVICE, f"{prefix}{uuid}/{alias}", self._devices_limit),
            (Scope.DOMAIN, f"{prefix}{uuid}", self._domains_limit),
            (Scope.HOST, f"{prefix}*", self._limits.max_open),
        ):
            # While an incident of the whole domain is open it also takes the domain's new devices, else the
            # two would overlap.
            covered = scope is Scope.DEVICE and f"{prefix}{uuid}" in opened
            if key in opened:
                return opened[key]
            if len(opened) < limit and not covered:
                break
        first_ns, last_ns = sorted((burst.first_ns, burst.last_ns))
        incident = IncidentState(
            format=FORMAT,
            key=key,
            id=self._new_id(),
            scope=scope,
            domain=WHOLE_HOST if scope is Scope.HOST else Domain(uuid, clean(raw.domain_name), raw.domain_id),
            device=Device((alias or None) if scope is Scope.DEVICE else None),
            enriched=False,
            facts=Facts.of(burst),
            opened_ns=first_ns,
            opened_at=at,
            first_ns=first_ns,
            last_ns=last_ns,
            lower_bound=False,
            width=self._limits.first_window_seconds,
            window_ends_at=at,
            allowed_at=at,
            quiet_since_at=at,
        )
        self._book.add(incident)
        return incident

    def _count(self, incident: IncidentState, burst: Burst) -> list[Event]:
        """Add a burst to what is pending.

        Report it now if it is urgent or its window is over, as far as the message rate allows.
        """
        at = self.now.monotonic
        facts = Facts.of(burst)
        if not burst.count:
            facts = facts.filled(incident.facts)
            self._describe(incident)
            if not (facts.add_to(incident.facts) or incident.described):  # all of it was reported
                if burst.stamp_ns is not None:
                    incident.stamp_ns = max(incident.stamp_ns or 0, burst.stamp_ns)
                return []
        events: list[Event] = []
        news = facts.differ(incident.facts)
        if news and incident.pending and incident.messages + 2 <= FREE_MESSAGES:
            # What came before the change goes out under its own action and reason while that is cheap.
            events += self.tell(incident, widen=False)
        had_counts = any_counts(incident.pending)
        incident.add(burst, facts)
        if burst.count:
            incident.quiet_since_at = at
            if facts.action_code == PAUSE_CODE:
                # A lifecycle burst may stand for several pauses; a pause may bring several event callbacks.
                self.pause(
                    incident, burst.raw.domain_uuid, burst.count if burst.origin is Origin.LIFECYCLE else 1
                )
        self._book.touch(incident)

        news = news or (not incident.flapping and self.flaps(incident))
        window_over = at >= incident.window_ends_at
        incident.urgent = incident.urgent or news
        if incident.urgent or window_over or not self._limits.fold:
            # Errors as far apart as a window (QEMU from 9.2 on lets one a second pass) go on, too.
            goes_on = had_counts or at < incident.window_ends_at + incident.width
            widen = window_over and goes_on and bool(incident.messages) and not incident.urgent
            events += self.tell(incident, widen=widen)
        self.schedule(incident)
        return events

    def tell(self, incident: IncidentState, *, widen: bool, last: bool = False) -> list[Event]:
        """Make an event of each pending count, as far as the message rate allows (`last`: all of them)."""
        at, events = self.now.monotonic, list[Event]()
        while incident.pending and (last or not self._limits.fold or at >= incident.allowed_at):
            self._describe(incident)
            pending = incident.pending.pop(0)
            phase = Phase.UPDATED if incident.messages else Phase.OPENED
            incident.described = False
            incident.told += pending.count
            incident.messages += 1
            incident.allowed_at = at + (MESSAGE_SPACING if incident.messages >= FREE_MESSAGES else 0.0)
            host = self._book.host or UNKNOWN_HOST
            merges = self._book.throttles or incident.on(host).hypervisor.merges is True
            incident.lower_bound = incident.lower_bound or merges
            events.append(incident.io_error(host, pending, self._shown(incident, phase)))
        if events:
            if widen:
                incident.width = min(incident.width * 2, self._limits.max_window_seconds)
            incident.window_ends_at = at + incident.width
            # Counts of another origin may be left over; they wait for the rate alone.
            incident.urgent = bool(incident.pending)
            self._book.touch(incident)
        return events

    def _shown(self, incident: IncidentState, phase: Phase) -> Incident:
        incident.flapping = self.flaps(incident)
        return incident.incident(phase, self._recent_pauses(incident))

    def _describe(self, incident: IncidentState) -> None:
        """Take over what the cache knows now; what was known once is kept when it is gone."""
        if incident.scope is Scope.HOST:
            return
        try:
            description = self.describe(uuid_in(incident.key))
        except Exception as error:  # noqa: BLE001 - a broken look-up may cost the enrichment, never a count
            emit(Trouble("description of a domain", error))
            return
        if description is None:
            return
        incident.domain, incident.connection = description.domain, clean(description.connection)
        found = description.hypervisor
        if found is not None and (found.version is not None or incident.hypervisor is None):
            incident.hypervisor = found
        device = description.devices.get(incident.device.alias or "")
        if incident.scope is Scope.DOMAIN:
            incident.enriched = True
        elif device is not None:
            incident.described = incident.described or device != incident.device
            incident.device, incident.enriched = device, True

    # ---- pauses and the end

    def pause(self, incident: IncidentState, domain_uuid: str, times: int = 1) -> None:
        """An error of the incident paused a guest, so many times."""
        if len(incident.paused) < PAUSED_GUESTS:
            incident.pause(domain_uuid, times, self.now.monotonic, FLAPPING_PAUSES)

    def _recent_pauses(self, incident: IncidentState) -> list[float]:
        return incident.pauses_since(self.now.monotonic - FLAPPING_SECONDS)

    def flaps(self, incident: IncidentState) -> bool:
        """Whether its guest is in a loop of pauses and resumes."""
        enough = FLAPPING_PAUSES
        return len(incident.paused_at) >= enough and len(self._recent_pauses(incident)) >= enough

    def resume(self, domain_uuid: str, at_ns: int) -> list[Event]:
        """The guest runs: from now on its devices' silence counts; incidents of removed devices end."""
        self._watch.runs(domain_uuid)
        concerned = self._book.of(domain_uuid)
        concerned += [one for one in self._book.of_host() if domain_uuid in one.paused]
        for incident in concerned:
            if domain_uuid in incident.paused:
                incident.paused.discard(domain_uuid)
                incident.resumed = True
            incident.quiet_since_at = self.now.monotonic
            self._book.touch(incident)
        events: list[Event] = []
        for incident in concerned:  # only now: each one's due depends on the guest's other incidents
            if incident.removed:
                events += self.resolve(incident, ResolutionCause.DEVICE_REMOVED, at_ns)
            else:
                self.schedule(incident)
        return events

    def devices(self, incident: IncidentState, aliases: frozenset[str], at_ns: int) -> list[Event]:
        """Its guest has these devices now: was the incident's own unplugged unseen?"""
        # Without a description the alias may never have been in the XML.
        if incident.scope is not Scope.DEVICE or not incident.enriched or incident.device.alias in aliases:
            return []
        return self.removed(incident, at_ns)

    def removed(self, incident: IncidentState, at_ns: int) -> list[Event]:
        """The device is gone; its incident stays open while the guest that it paused stands still."""
        if incident.paused:
            incident.removed = True
            self._book.touch(incident)
            return []
        return self.resolve(incident, ResolutionCause.DEVICE_REMOVED, at_ns)

    def resolve(self, incident: IncidentState, cause: ResolutionCause, at_ns: int) -> list[Event]:
        """End an incident: first what is pending, then the resolution."""
        events = self.tell(incident, widen=False, last=True)
        self._describe(incident)
        incident.domain = self._domain_now(incident, cause)
        self._book.close(incident)
        # Monotonic: wall time may have jumped since.
        seconds = round(max(0.0, self.now.monotonic - incident.opened_at), 6)
        resolution = Resolution(cause, to_datetime(at_ns), seconds)
        shown = self._shown(incident, Phase.RESOLVED)
        events.append(incident.resolved(self._book.host or UNKNOWN_HOST, shown, resolution))
        return events

    def _domain_now(self, incident: IncidentState, cause: ResolutionCause) -> Domain:
        """The domain as it is at the resolution; its description may be older than that."""
        if incident.scope is Scope.HOST or incident.drill:
            return incident.domain
        state = GuestState.SHUT_OFF if cause in _GONE_CAUSES else self._watch.halted.get(incident.domain.uuid)
        if state is None:
            known = incident.domain.state
            state = GuestState.RUNNING if known is None or known in HALTED_STATES else known
        return replace(incident.domain, state=state)

    # ---- when

    def _stands_still(self, incident: IncidentState) -> bool:
        """Whether a guest of the incident stands still: then its silence says nothing."""
        if incident.scope is Scope.HOST:
            return bool(incident.paused)
        uuid = uuid_in(incident.key)
        if uuid in self._watch.halted and not incident.drill:
            return True
        siblings = [*self._book.of(uuid), *self._book.of_host()]
        return any(uuid in one.paused for one in siblings if one.drill == incident.drill)

    def due(self, incident: IncidentState) -> float:
        """When a tick has something to do for the incident."""
        if incident.pending:
            allowed = incident.allowed_at if self._limits.fold else -math.inf
            return allowed if incident.urgent else max(incident.window_ends_at, allowed)
        if self._watch.is_unseen(incident) or self._stands_still(incident):
            return math.inf
        return incident.quiet_since_at + self._limits.quiet_seconds

    def schedule(self, incident: IncidentState) -> None:
        """It changed: a tick may be due sooner."""
        self.wake = min(self.wake, self.due(incident))

    def tick(self) -> list[Event]:
        """Windows that ended become updates, quiet incidents are resolved."""
        events: list[Event] = []
        at = self.now.monotonic
        if at < self.wake:
            return events
        for incident in list(self._book.open.values()):
            if self.due(incident) > at:
                continue
            if incident.pending:
                widen = not incident.urgent and any_counts(incident.pending)
                events += self.tell(incident, widen=widen)
            if self.due(incident) <= at:  # then it is quiet
                cause = ResolutionCause.RESUMED if incident.resumed else ResolutionCause.QUIET
                events += self.resolve(incident, cause, self.now.wall_ns)
        self.look_again()
        return events

    def look_again(self) -> None:
        """Recompute when the first incident is due."""
        self.wake = min(map(self.due, self._book.open.values()), default=math.inf)
