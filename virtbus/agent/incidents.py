"""Turns errors into incidents: told at once, then counted in widening windows, then resolved. Pure.

Guarantees, for any order of observations, clock jumps and restarts:
1. Every error applied is in the count of exactly one `IoError`, or in one pending count of the states
   that `changes()` gives; events and states committed together make the counts exact over SIGKILL.
2. One event speaks of one origin: errors of different origins are never added up.
3. An incident's first error goes out at once. After its first ten messages at least a second lies between
   two of them; only its end (what is pending, then the resolution) may come sooner.
4. One (domain, alias) has at most one open incident, and it ends in exactly one resolution.
5. Memory is bounded by `IncidentLimits.max_open`.

The windows. A message opens a window; errors in it are counted and told when it ends, and the next
window is twice as wide, up to the limit. An error after a silent window goes out at once; if it came within
another such time the errors go on and the window widens, else it stays as wide as it was: rare errors are
told without delay, and never more than one a window. A change of action or reason, or the start of
flapping, goes out at once where guarantee 3 allows it, else as soon as it does; what was counted by then goes
with it, under the newest action and reason.

A burst of count 0 is what was found out about errors that were told already (evidence, a text, the device's
name): it is told like an error of its incident, as an update of count 0, when it says anything new, but opens
none and does not disturb the quiet. What a look finds (origin `reconcile`) and an incident of this or an
earlier run tells of already is such a burst, whenever the look comes.

A guest that does not run, for whatever reason, proves nothing by its silence.

Errors of origin `replay` have incidents of their own: a drill never hides in a live incident, nor a live
error in a drill's.

The caller applies observations in the order in which they came: errors may be grouped into bursts only
between two other observations, else a resume could be taken for the state after a later pause.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

from virtbus.agent.incident import (
    DRILL,
    FORMAT,
    LIVE,
    META,
    PAUSE_CODE,
    REPORT_CODE,
    SEEN,
    Facts,
    IncidentState,
    Meta,
    Seen,
    any_counts,
    clean,
    freeze_other,
    read_state,
    uuid_in,
)
from virtbus.model import (
    Burst,
    Description,
    Device,
    DeviceRemoved,
    Domain,
    DomainGone,
    DomainHalted,
    DomainResumed,
    DomainState,
    Event,
    Host,
    HostKnown,
    Now,
    Observation,
    OpenIncident,
    RawIoError,
    Resolution,
    SourceLost,
    SourceReady,
    Surveyed,
    to_datetime,
)
from virtbus.seen import is_told
from virtbus.telemetry import Trouble, emit
from virtbus.words import GuestState, Origin, Phase, ResolutionCause, Scope

Describe: TypeAlias = Callable[[str], Description | None]
"""Domain UUID → what the cache knows of it, at once, or None."""

WHOLE_HOST = Domain(uuid="00000000-0000-0000-0000-000000000000", name="*")
"""The `domain` of an event whose incident has scope `host`: it speaks for guests that are not named."""

UNKNOWN_HOST = Host(name="unknown")
"""The `host` of an event before the first look at the hypervisor, ever."""

_FREE_MESSAGES = 10  # after these an incident waits between messages …
_MESSAGE_SPACING = 1.0  # … at least this many seconds
_PAUSED_GUESTS = 10_000  # at most so many are remembered by one incident (scope host)
_HALTED_STATES = frozenset({GuestState.PAUSED, GuestState.CRASHED, GuestState.PM_SUSPENDED})
_RUNNING_STATES = frozenset({GuestState.RUNNING, GuestState.BLOCKED})
_GONE_CAUSES = frozenset({ResolutionCause.DOMAIN_STOPPED, ResolutionCause.MIGRATED})


@dataclass(frozen=True)
class IncidentLimits:
    """How errors are folded; times in seconds.

    `fold=False` publishes each callback as an event of its own, without guarantee 3; callbacks that were
    folded before they came here (a `Burst`, when the queue was long) stay one event with their count.
    `max_open` bounds what is open together: three quarters for devices; beyond that one incident a
    domain (scope `domain`, alias null); when all is taken one for the whole host (scope `host`,
    domain `WHOLE_HOST`), and one for its drills. Flapping is `flapping_pauses` pauses within
    `flapping_window_seconds`.
    """

    fold: bool = True
    first_window_seconds: float = 1.0
    max_window_seconds: float = 60.0
    quiet_seconds: float = 300.0
    max_open: int = 1000
    flapping_pauses: int = 3
    flapping_window_seconds: float = 600.0

    def __post_init__(self) -> None:
        """Refuse limits that contradict each other (ValueError)."""
        if not 0 < self.first_window_seconds <= self.max_window_seconds < math.inf:
            raise ValueError(
                f"incidents: first_window_seconds={self.first_window_seconds} must be above 0 and at most "
                f"max_window_seconds={self.max_window_seconds}"
            )
        if not 0 < self.quiet_seconds < math.inf:
            raise ValueError(f"incidents: quiet_seconds={self.quiet_seconds} must be above 0")
        if self.max_open < 1:
            raise ValueError(f"incidents: max_open={self.max_open} must be at least 1")
        if self.flapping_pauses < 2 or not self.flapping_window_seconds > 0:
            raise ValueError(
                f"incidents: flapping_pauses={self.flapping_pauses} must be at least 2, and "
                f"flapping_window_seconds={self.flapping_window_seconds} above 0"
            )


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
        self._new_id = new_id
        self._host = host
        self._throttles = False
        self._blind = False  # to every guest that is not in `_sighted`
        self._sighted: set[str] = set()  # guests whose own connection has looked at them since
        self._unsighted: set[str] = set()  # guests whose own connection is lost
        self._now = Now(0, 0.0)
        self._open: dict[str, IncidentState] = {}
        self._of_domain: dict[str, list[IncidentState]] = {}  # those of scope device and domain
        self._halted: dict[str, GuestState] = {}  # guest that does not run → its state
        self._seen: dict[str, int] = {}  # oldest first
        self._changed: dict[str, None] = {}
        if host is not None:
            self._changed[META] = None
        self._wake = math.inf  # nothing is due before this; may be early, never late
        self._domains_limit = limits.max_open - 2  # the last are the host's and a drill's host's
        self._devices_limit = self._domains_limit * 3 // 4

    # ------------------------------------------------------------------------------------ the API

    @property
    def host(self) -> Host | None:
        """Whose errors these are; `SourceReady` sets it, and it survives a restart."""
        return self._host

    @host.setter
    def host(self, host: Host | None) -> None:
        if host != self._host:
            self._host = host
            self._changed[META] = None

    @property
    def open_count(self) -> int:
        """How many incidents are open, drills among them."""
        return len(self._open)

    @property
    def open_drills(self) -> int:
        """How many of them are drills. As safe as `open_count`."""
        return sum(key.startswith(DRILL) for key in list(self._open))

    def apply(self, observation: Observation, now: Now, describe: Describe) -> list[Event]:
        """Take one observation; the events that it causes, in order."""
        self._now = now
        if isinstance(observation, Burst):
            return self._error(observation, now, describe)
        if isinstance(observation, RawIoError):
            at = observation.observed_at
            return self._error(Burst(observation, 1, at, at), now, describe)
        if isinstance(observation, DomainResumed):
            return self._resume(observation.domain_uuid, observation.at_ns, now, describe)
        if isinstance(observation, DomainHalted):
            self._halt(observation.domain_uuid, observation.state)
            return []
        if isinstance(observation, HostKnown):
            self.host = observation.host
            return []
        if isinstance(observation, DomainGone):
            return self._gone(observation, now, describe)
        if isinstance(observation, DeviceRemoved):
            return self._removed(observation, now, describe)
        if isinstance(observation, SourceReady):
            return self._ready(observation, now, describe)
        if isinstance(observation, Surveyed):
            return self._surveyed(observation, now, describe)
        if isinstance(observation, SourceLost):
            self._lost(observation.domains)
        return []  # what else a source says of itself concerns gaps alone

    def tick(self, now: Now, describe: Describe = _unknown) -> list[Event]:
        """Windows that ended become updates, quiet incidents are resolved.

        With `describe` an incident that could not be described before is tried again.
        """
        self._now = now
        if now.monotonic < self._wake:
            return []
        events: list[Event] = []
        for incident in list(self._open.values()):
            if self._due(incident) > now.monotonic:
                continue
            if incident.pending:
                widen = not incident.urgent and any_counts(incident.pending)
                events += self._tell(incident, now, describe, widen=widen)
            if self._due(incident) <= now.monotonic:  # then it is quiet
                cause = ResolutionCause.RESUMED if incident.resumed else ResolutionCause.QUIET
                events += self._resolve(incident, cause, now.wall_ns, now, describe)
        self._wake = min(map(self._due, self._open.values()), default=math.inf)
        return events

    def next_due(self) -> float | None:
        """The monotonic time of the next tick, or None; such a tick may find that nothing is due yet."""
        return None if self._wake == math.inf else self._wake

    def changes(self) -> dict[str, bytes | None]:
        """Persistent states that changed since the last call, by key; None deletes the key."""
        out: dict[str, bytes | None] = {}
        for key in self._changed:
            if key in self._open:
                out[key] = self._open[key].freeze(self._now)
            elif key in self._seen:
                out[key] = freeze_other(Seen(FORMAT, self._seen[key]))
            elif key == META:
                out[key] = freeze_other(Meta(FORMAT, self._host, self._throttles))
            else:
                out[key] = None
        self._changed.clear()
        return out

    def restore(self, states: Mapping[str, bytes], now: Now) -> tuple[str, ...]:
        """Go on from the states of an earlier run; to be called once, before anything else.

        The time between counts as `max(0, wall difference)`. Nothing resolves before the next
        `SourceReady`. Keys of others are left alone. Returns a line for each state that could not be
        read, for a gap event: what it had pending is lost. Such a state is deleted by the next commit.
        """
        self._now = now
        problems: list[str] = []
        for key, state in states.items():
            try:
                self._restore_one(key, state, now)
            except (ValueError, OverflowError, RecursionError) as error:
                problems.append(f"state {key!r} can't be read and is given up: {error}")
                self._changed[key] = None
        self._open = dict(sorted(self._open.items(), key=lambda item: (item[1].opened_ns, item[0])))
        self._seen = dict(sorted(self._seen.items(), key=lambda item: item[1]))
        self._blind = True
        self._wake = min(map(self._due, self._open.values()), default=math.inf)
        return tuple(problems)

    def open_incidents(self, limit: int = 100) -> tuple[OpenIncident, ...]:
        """The open incidents, oldest first, at most `limit`; `total` includes what is pending.

        May be called from another thread than the rest; an incident that changes meanwhile may show
        one of its numbers from before.
        """
        return tuple(
            one.listed(flapping=self._flaps(one, self._now)) for one in list(self._open.values())[:limit]
        )

    # ------------------------------------------------------------------------------------- errors

    def _error(self, burst: Burst, now: Now, describe: Describe) -> list[Event]:
        """Count a burst into its incident, or open one; tell what can't wait for the window's end."""
        if burst.count and burst.origin is Origin.RECONCILE and self._tells_of(burst):
            burst = replace(burst, count=0)
        raw = burst.raw
        prefix = DRILL if burst.origin is Origin.REPLAY else LIVE
        incident = self._open.get(f"{prefix}{raw.domain_uuid}/{raw.alias}")
        if incident is None and burst.count:
            return self._error_elsewhere(burst, prefix, now, describe)
        if incident is None:
            # Facts about an error that was told without its device's name, or folded into its domain.
            nameless, whole = (self._open.get(f"{prefix}{raw.domain_uuid}{end}") for end in ("/", ""))
            incident = nameless or whole
            if nameless is not None:
                self._name(nameless, raw.alias)
        if incident is None:
            return []
        return self._count(incident, burst, now, describe)

    def _name(self, incident: IncidentState, alias: str) -> None:
        """The device of an incident that did not know it."""
        self._changed[incident.key] = None
        del self._open[incident.key]
        alias = clean(alias)
        incident.key += alias
        incident.device, incident.described = Device(alias), True
        self._open[incident.key] = incident

    def _error_elsewhere(self, burst: Burst, prefix: str, now: Now, describe: Describe) -> list[Event]:
        """An error of a device that has no incident: open one, of the device if there is room."""
        raw = burst.raw
        uuid, alias = clean(raw.domain_uuid), clean(raw.alias)
        room = len(self._open)
        for scope, key, limit in (
            (Scope.DEVICE, f"{prefix}{uuid}/{alias}", self._devices_limit),
            (Scope.DOMAIN, f"{prefix}{uuid}", self._domains_limit),
            (Scope.HOST, f"{prefix}*", self._limits.max_open),
        ):
            # An open incident of the domain keeps the domain's new devices, else the two would overlap.
            covered = scope is Scope.DEVICE and f"{prefix}{uuid}" in self._open
            if key in self._open:
                return self._count(self._open[key], burst, now, describe)
            if room < limit and not covered:
                break
        domain = WHOLE_HOST
        if scope is not Scope.HOST:
            domain = Domain(uuid, clean(raw.domain_name), raw.domain_id)
        incident = IncidentState(
            format=FORMAT,
            key=key,
            id=self._new_id(),
            scope=scope,
            domain=domain,
            device=Device((alias or None) if scope is Scope.DEVICE else None),
            enriched=False,
            facts=Facts.of(burst),
            opened_ns=min(burst.first_ns, burst.last_ns),
            opened_at=now.monotonic,
            first_ns=min(burst.first_ns, burst.last_ns),
            last_ns=max(burst.first_ns, burst.last_ns),
            lower_bound=self._throttles,
            width=self._limits.first_window_seconds,
            window_ends_at=now.monotonic,
            allowed_at=now.monotonic,
            quiet_since_at=now.monotonic,
        )
        self._open[key] = incident
        if scope is not Scope.HOST:
            self._of_domain.setdefault(uuid_in(key), []).append(incident)
        return self._count(incident, burst, now, describe)

    def _count(self, incident: IncidentState, burst: Burst, now: Now, describe: Describe) -> list[Event]:
        """Add a burst to what is pending, and tell it now if it can't wait and need not."""
        events: list[Event] = []
        facts = Facts.of(burst)
        if not burst.count:
            facts = facts.filled(incident.facts)
            if not self._says_more(incident, facts, describe):
                if burst.stamp_ns is not None:
                    incident.stamp_ns = max(incident.stamp_ns or 0, burst.stamp_ns)
                return []
        news = facts.differ(incident.facts)
        if news and incident.pending and incident.messages + 2 <= _FREE_MESSAGES:
            # What came before the change goes out under its own action and reason while that is cheap.
            events += self._tell(incident, now, describe, widen=False)
        had_counts = any_counts(incident.pending)
        incident.add(burst, facts)
        if burst.count:
            incident.quiet_since_at = now.monotonic
            incident.lower_bound = incident.lower_bound or self._throttles
            if facts.action_code == PAUSE_CODE:
                # Only a pause that was told late counts more than one: callbacks come several a pause.
                times = burst.count if burst.origin is Origin.LIFECYCLE else 1
                self._pause(incident, burst.raw.domain_uuid, times, now)
        self._changed[incident.key] = None

        news = news or (not incident.flapping and self._flaps(incident, now))
        window_over = now.monotonic >= incident.window_ends_at
        incident.urgent = incident.urgent or news
        if incident.urgent or window_over or not self._limits.fold:
            # Errors as far apart as a window (QEMU from 9.2 on lets one a second pass) go on, too.
            goes_on = had_counts or now.monotonic < incident.window_ends_at + incident.width
            widen = window_over and goes_on and bool(incident.messages) and not incident.urgent
            events += self._tell(incident, now, describe, widen=widen)
        self._schedule(incident)
        return events

    def _says_more(self, incident: IncidentState, facts: Facts, describe: Describe) -> bool:
        """Whether what was found out is worth an update: new facts, or another description than was told."""
        self._describe(incident, describe)
        return facts.add_to(incident.facts) or incident.described

    def _tell(
        self, incident: IncidentState, now: Now, describe: Describe, *, widen: bool, last: bool = False
    ) -> list[Event]:
        """Make an event of each pending count, as far as the message rate allows (`last`: all of them)."""
        events: list[Event] = []
        while incident.pending and (last or not self._limits.fold or now.monotonic >= incident.allowed_at):
            self._describe(incident, describe)
            pending = incident.pending.pop(0)
            phase = Phase.UPDATED if incident.messages else Phase.OPENED
            incident.described = False
            incident.told += pending.count
            incident.messages += 1
            wait = _MESSAGE_SPACING if incident.messages >= _FREE_MESSAGES else 0.0
            incident.allowed_at = now.monotonic + wait
            incident.flapping = self._flaps(incident, now)
            shown = incident.incident(phase, self._recent_pauses(incident, now))
            events.append(incident.io_error(self._host or UNKNOWN_HOST, pending, shown))
        if events:
            if widen:
                incident.width = min(incident.width * 2, self._limits.max_window_seconds)
            incident.window_ends_at = now.monotonic + incident.width
            # Counts of another origin may be left over; they wait for the rate alone.
            incident.urgent = bool(incident.pending)
            self._changed[incident.key] = None
        return events

    def _describe(self, incident: IncidentState, describe: Describe) -> None:
        """Take over what the cache knows now; what was known once is kept when it is gone."""
        if incident.scope is Scope.HOST:
            return
        try:
            description = describe(uuid_in(incident.key))
        except Exception as error:  # noqa: BLE001 - a broken look-up may cost the enrichment, never a count
            emit(Trouble("description of a domain", error))
            return
        if description is None:
            return
        incident.domain = description.domain
        if incident.scope is Scope.DOMAIN:
            incident.enriched = True
        elif incident.device.alias is not None:
            device = description.devices.get(incident.device.alias)
            if device is not None:
                incident.described = incident.described or device != incident.device
                incident.device, incident.enriched = device, True

    # --------------------------------------------------------------------------- pauses and the end

    def _pause(self, incident: IncidentState, domain_uuid: str, times: int, now: Now) -> None:
        if len(incident.paused) < _PAUSED_GUESTS:
            incident.pause(domain_uuid, times, now.monotonic, self._limits.flapping_pauses)

    def _recent_pauses(self, incident: IncidentState, now: Now) -> list[float]:
        return incident.pauses_since(now.monotonic - self._limits.flapping_window_seconds)

    def _flaps(self, incident: IncidentState, now: Now) -> bool:
        return (
            len(incident.paused_at) >= self._limits.flapping_pauses
            and len(self._recent_pauses(incident, now)) >= self._limits.flapping_pauses
        )

    def _halt(self, domain_uuid: str, state: GuestState) -> None:
        if len(self._halted) < _PAUSED_GUESTS or domain_uuid in self._halted:
            self._halted[domain_uuid] = state

    def _resume(self, domain_uuid: str, at_ns: int, now: Now, describe: Describe) -> list[Event]:
        """The guest runs: from now on its devices can prove that they are quiet; one that is gone has."""
        self._halted.pop(domain_uuid, None)
        if self._blind:
            self._sighted.add(domain_uuid)
        concerned = list(self._of_domain.get(domain_uuid, ()))
        concerned += [one for one in self._host_incidents() if domain_uuid in one.paused]
        for incident in concerned:
            if domain_uuid in incident.paused:
                incident.paused.discard(domain_uuid)
                incident.resumed = True
            incident.quiet_since_at = now.monotonic
            self._changed[incident.key] = None
        events: list[Event] = []
        for incident in concerned:  # only now: each one's due depends on the guest's other incidents
            if incident.removed:
                events += self._resolve(incident, ResolutionCause.DEVICE_REMOVED, at_ns, now, describe)
            else:
                self._schedule(incident)
        return events

    def _gone(self, gone: DomainGone, now: Now, describe: Describe) -> list[Event]:
        events: list[Event] = []
        for known in (self._sighted, self._unsighted):
            known.discard(gone.domain_uuid)
        self._halted.pop(gone.domain_uuid, None)
        for incident in list(self._of_domain.get(gone.domain_uuid, ())):
            events += self._resolve(incident, gone.cause, gone.at_ns, now, describe)
        for incident in self._host_incidents():
            if gone.domain_uuid in incident.paused:
                incident.paused.discard(gone.domain_uuid)
                incident.quiet_since_at = now.monotonic
                self._changed[incident.key] = None
                self._schedule(incident)
        self._forget(lambda uuid, _alias: uuid == gone.domain_uuid)
        return events

    def _removed(self, removed: DeviceRemoved, now: Now, describe: Describe) -> list[Event]:
        events: list[Event] = []
        for incident in list(self._of_domain.get(removed.domain_uuid, ())):
            if incident.scope is Scope.DEVICE and incident.device.alias == removed.alias:
                events += self._resolve_removed(incident, removed.at_ns, now, describe)
        self._forget(lambda uuid, alias: (uuid, alias) == (removed.domain_uuid, removed.alias))
        return events

    def _resolve_removed(
        self, incident: IncidentState, at_ns: int, now: Now, describe: Describe
    ) -> list[Event]:
        """The device is gone; the standstill that it caused is told until the guest runs or is gone."""
        if incident.paused:
            incident.removed = True
            self._changed[incident.key] = None
            return []
        return self._resolve(incident, ResolutionCause.DEVICE_REMOVED, at_ns, now, describe)

    def _resolve(
        self, incident: IncidentState, cause: ResolutionCause, at_ns: int, now: Now, describe: Describe
    ) -> list[Event]:
        """End an incident: first what is pending, then the resolution."""
        events = self._tell(incident, now, describe, widen=False, last=True)
        self._describe(incident, describe)
        incident.domain = self._domain_now(incident, cause)
        del self._open[incident.key]
        if incident.scope is not Scope.HOST:
            uuid = uuid_in(incident.key)
            self._of_domain[uuid] = [one for one in self._of_domain[uuid] if one is not incident]
            if not self._of_domain[uuid]:
                del self._of_domain[uuid]
        self._changed[incident.key] = None
        if not incident.drill and incident.scope is not Scope.HOST:
            last_ns = max(incident.last_ns, incident.stamp_ns or 0)
            self._remember(SEEN + incident.key.removeprefix(LIVE), last_ns)
        incident.flapping = self._flaps(incident, now)
        shown = incident.incident(Phase.RESOLVED, self._recent_pauses(incident, now))
        # Monotonic: wall time may have jumped since.
        seconds = round(max(0.0, now.monotonic - incident.opened_at), 6)
        resolution = Resolution(cause, to_datetime(at_ns), seconds)
        events.append(incident.resolved(self._host or UNKNOWN_HOST, shown, resolution))
        return events

    def _domain_now(self, incident: IncidentState, cause: ResolutionCause) -> Domain:
        """The domain as it is at the resolution; its description may be older than that."""
        if incident.scope is Scope.HOST or incident.drill:
            return incident.domain
        state = GuestState.SHUT_OFF if cause in _GONE_CAUSES else self._halted.get(incident.domain.uuid)
        if state is None:
            known = incident.domain.state
            state = GuestState.RUNNING if known is None or known in _HALTED_STATES else known
        return replace(incident.domain, state=state)

    def _remember(self, key: str, last_ns: int) -> None:
        """Keep the last error's time of a resolved incident, for as many devices as may be open."""
        self._seen.pop(key, None)
        self._seen[key] = last_ns
        self._changed[key] = None
        while len(self._seen) > self._limits.max_open:
            oldest = next(iter(self._seen))
            del self._seen[oldest]
            self._changed[oldest] = None

    def _forget(self, matches: Callable[[str, str | None], bool]) -> None:
        """Drop what was kept of resolved incidents of (domain, alias; None: the whole domain)."""
        for key in list(self._seen):
            _, uuid, *alias = key.split("/", 2)
            if matches(uuid, alias[0] if alias else None):
                del self._seen[key]
                self._changed[key] = None

    # ----------------------------------------------------------------------------------- the looks

    def _ready(self, ready: SourceReady, now: Now, describe: Describe) -> list[Event]:
        """Compare what is open with what was looked at, after a time of not seeing.

        1. Incidents whose domain or device is gone end (why it went can't be known any more:
           `domain_stopped`, `device_removed`).
        2. Findings that no incident tells of are errors; so is a pause by an error that nothing tells of.
        3. Guests run or are paused as they were found.
        4. No incident counts as quiet before we have watched it again for the widest window.
        """
        self.host = ready.host
        if not ready.whole:
            self._throttles = self._throttles or ready.throttles  # of any: a bound is lower, never wrong
        elif ready.throttles != self._throttles:
            self._throttles = ready.throttles
            self._changed[META] = None
        domains = {one.uuid: one for one in ready.domains if one.state != GuestState.SHUT_OFF}
        events: list[Event] = []
        for incident in list(self._open.values()):
            if incident.scope is Scope.HOST:
                incident.paused &= domains.keys() if ready.whole else incident.paused
                continue
            domain = domains.get(uuid_in(incident.key))
            if domain is None and not ready.whole:
                continue  # another connection's guest, or told gone by its own
            if domain is None:
                events += self._resolve(incident, ResolutionCause.DOMAIN_STOPPED, ready.at_ns, now, describe)
            elif domain.state in _RUNNING_STATES and incident.removed:
                events += self._resolve(incident, ResolutionCause.DEVICE_REMOVED, ready.at_ns, now, describe)
            elif (
                incident.scope is Scope.DEVICE
                and incident.enriched  # else the alias may never have been in the XML
                and domain.aliases is not None
                and incident.device.alias not in domain.aliases
            ):
                events += self._resolve_removed(incident, ready.at_ns, now, describe)
        if ready.whole:
            self._forget(lambda uuid, _alias: uuid not in domains)
            self._see_all()
            self._unsighted, self._halted = set(), {}
        self._sighted |= domains.keys()
        self._unsighted -= domains.keys()
        for uuid in domains:
            self._halted.pop(uuid, None)
        for domain in domains.values():
            if domain.state in _HALTED_STATES:
                self._halt(domain.uuid, GuestState(domain.state))
        # Devices that failed before last: a disk error that is kept explains no pause that another one does.
        for finding in sorted(ready.findings, key=lambda one: self._last_seen(one) >= 0):
            events += self._error(finding, now, describe)
        for domain in domains.values():
            if domain.state in _RUNNING_STATES:
                events += self._resume_if_paused(domain.uuid, ready.at_ns, now, describe)
            elif domain.paused_by_io_error:
                events += self._keep_paused(domain, ready.at_ns, now, describe)
        settle = min(self._limits.quiet_seconds, self._limits.max_window_seconds)
        for incident in self._open.values():
            if not ready.whole and incident.scope is not Scope.HOST and uuid_in(incident.key) not in domains:
                continue
            not_before = now.monotonic + settle - self._limits.quiet_seconds
            incident.quiet_since_at = max(incident.quiet_since_at, not_before)
            self._changed[incident.key] = None
            self._schedule(incident)
        return events

    def _surveyed(self, survey: Surveyed, now: Now, describe: Describe) -> list[Event]:
        """Every connection was looked at: guests that none of them has are gone."""
        self.host = self._host or survey.host
        known = survey.domains | self._sighted | self._unsighted
        events: list[Event] = []
        for incident in list(self._open.values()):
            if incident.scope is Scope.HOST:
                incident.paused &= known
            elif uuid_in(incident.key) not in known and not incident.drill:
                events += self._resolve(incident, ResolutionCause.DOMAIN_STOPPED, survey.at_ns, now, describe)
        self._forget(lambda uuid, _alias: uuid not in known)
        self._see_all()
        return events

    def _see_all(self) -> None:
        self._blind = False
        self._sighted.clear()
        self._wake = -math.inf  # what was blind may be due

    def _lost(self, domains: frozenset[str] | None) -> None:
        """Nothing is seen of these guests, or (None) of any."""
        if domains is None:
            self._blind = True
            self._sighted.clear()
        else:
            self._unsighted |= domains
            self._sighted -= domains

    def _is_blind(self, incident: IncidentState) -> bool:
        if incident.scope is Scope.HOST:
            return self._blind or bool(self._unsighted)
        uuid = uuid_in(incident.key)
        return uuid in self._unsighted or (self._blind and uuid not in self._sighted)

    def _tells_of(self, finding: Burst) -> bool:
        """Whether an incident of this or an earlier run told of a look's finding already.

        An error's own time is that of the message which the hypervisor kept of it: what has one is known if
        its device had an error at that time or later. A standing pause without one is known if an incident of
        its device (or of an unknown device of its guest) holds the guest paused; also if another incident
        does and the device failed before, because its disk error is kept.
        """
        uuid, alias = finding.raw.domain_uuid, finding.raw.alias
        live = [one for one in self._of_domain.get(uuid, ()) if not one.drill]
        own = [one for one in live if not alias or one.device.alias in (None, alias)]
        seen = self._last_seen(finding)
        if finding.raw.action_code != PAUSE_CODE:
            return any(self._is_told(finding, last) for last in (*map(_last_of, own), seen))
        if any(uuid in one.paused for one in own):
            if finding.stamp_ns is None and finding.message is None:
                return True
            return any(self._is_told(finding, _last_of(one)) for one in own if uuid in one.paused)
        if any(uuid in one.paused for one in live):
            failed = max([seen, *(_last_of(one) for one in own if alias and one.device.alias == alias)])
            return failed >= 0 and (finding.stamp_ns is None or self._is_told(finding, failed))
        whole_host = self._open.get(f"{LIVE}*")
        return whole_host is not None and uuid in whole_host.paused

    def _is_told(self, finding: Burst, last_ns: int) -> bool:
        return is_told(finding.last_ns, last_ns, self._now.wall_ns)

    def _last_seen(self, finding: Burst) -> int:
        """The last error of the finding's device in an incident that is over (ns), or -1."""
        uuid, alias = finding.raw.domain_uuid, finding.raw.alias
        return max(self._seen.get(f"{SEEN}{uuid}/{alias}", -1), self._seen.get(f"{SEEN}{uuid}", -1))

    def _resume_if_paused(self, domain_uuid: str, at_ns: int, now: Now, describe: Describe) -> list[Event]:
        concerned = [*self._of_domain.get(domain_uuid, ()), *self._host_incidents()]
        if any(domain_uuid in incident.paused for incident in concerned):
            return self._resume(domain_uuid, at_ns, now, describe)
        return []

    def _keep_paused(self, domain: DomainState, at_ns: int, now: Now, describe: Describe) -> list[Event]:
        """A guest was found paused by an error: an incident holds it, or one is opened."""
        incidents = [one for one in self._of_domain.get(domain.uuid, ()) if not one.drill]
        if any(domain.uuid in one.paused for one in (*incidents, *self._host_incidents()) if not one.drill):
            return []
        unclear = [one for one in incidents if one.facts.action_code not in (PAUSE_CODE, REPORT_CODE)]
        for incident in unclear:
            self._pause(incident, domain.uuid, 1, now)
        if unclear:
            return []
        # Named if there is one disk that it can be: else its event, when it comes, opens a second incident.
        alias = next(iter(domain.aliases)) if domain.aliases and len(domain.aliases) == 1 else ""
        raw = RawIoError(domain.uuid, domain.name, None, "", alias, PAUSE_CODE, "", at_ns)
        return self._error(Burst(raw, 1, at_ns, at_ns, Origin.RECONCILE), now, describe)

    # --------------------------------------------------------------------------------- small parts

    def _host_incidents(self) -> list[IncidentState]:
        return [self._open[key] for key in (f"{LIVE}*", f"{DRILL}*") if key in self._open]

    def _held(self, incident: IncidentState) -> bool:
        """Whether a guest of the incident stands still: then its silence says nothing."""
        if incident.scope is Scope.HOST:
            return bool(incident.paused)
        uuid = uuid_in(incident.key)
        if uuid in self._halted and not incident.drill:
            return True
        siblings = [*self._of_domain.get(uuid, ()), *self._host_incidents()]
        return any(uuid in one.paused for one in siblings if one.drill == incident.drill)

    def _due(self, incident: IncidentState) -> float:
        """When a tick has something to do for the incident."""
        if incident.pending:
            allowed = incident.allowed_at if self._limits.fold else -math.inf
            return allowed if incident.urgent else max(incident.window_ends_at, allowed)
        if self._is_blind(incident) or self._held(incident):
            return math.inf
        return incident.quiet_since_at + self._limits.quiet_seconds

    def _schedule(self, incident: IncidentState) -> None:
        self._wake = min(self._wake, self._due(incident))

    def _restore_one(self, key: str, state: bytes, now: Now) -> None:
        """Take over one state; raises as `read_state` does."""
        found = read_state(key, state)
        if isinstance(found, IncidentState):
            found.thaw(now)
            self._open[key] = found
            if found.scope is not Scope.HOST:
                self._of_domain.setdefault(uuid_in(key), []).append(found)
        elif isinstance(found, Seen):
            self._seen[key] = found.last_ns
        elif isinstance(found, Meta):
            self._host = self._host or found.host
            self._throttles = found.throttles


def _last_of(incident: IncidentState) -> int:
    """The incident's last error, by whichever clock says later (ns)."""
    return max(incident.last_ns, incident.stamp_ns or 0)
