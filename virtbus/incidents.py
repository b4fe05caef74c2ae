"""Turns errors into incidents: told at once, then counted in widening windows, then resolved. Pure.

Guarantees, for any order of observations, clock jumps and restarts:
1. Every error applied is in exactly one `IoError` (`occurrences.count`) or in one pending count of the
   states that `changes()` gives; events and states committed together make the counts exact over SIGKILL.
2. One event speaks of one origin: errors of different origins are never added up.
3. An incident's first error goes out at once. After its first ten messages at least a second lies between
   two of them; only its end (what is pending, then the resolution) may come sooner.
4. One (domain, alias) has at most one open incident, and it ends in exactly one resolution.
5. Memory is bounded by `IncidentLimits.max_open`.

The windows. A message opens a window; errors in it are counted and told when it ends, and the next
window is twice as wide, up to the limit. An error after a window without any goes out at once, and opens a
window of the same width: rare errors are told without delay, and never more than one a window. A change
of action or reason, or the start of flapping, goes out at once where guarantee 3 allows it, else
as soon as it does; what was counted by then goes with it, under the newest action and reason.

Errors of origin `replay` have incidents of their own: a drill never hides in a live incident, nor a live
error in a drill's.

The caller applies observations in the order in which they came: errors may be grouped into bursts only
between two other observations, else a resume could be taken for the state after a later pause.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import msgspec

from virtbus.model import (
    Action,
    Burst,
    Description,
    Device,
    DeviceRemoved,
    Domain,
    DomainGone,
    DomainResumed,
    DomainState,
    ErrorFacts,
    Event,
    Evidence,
    Host,
    Incident,
    IoError,
    IoErrorResolved,
    Now,
    Observation,
    Occurrences,
    OpenIncident,
    Origin,
    Phase,
    RawIoError,
    Resolution,
    ResolvedOccurrences,
    Scope,
    SourceLost,
    SourceReady,
    to_datetime,
)
from virtbus.telemetry import Trouble, emit

Describe: TypeAlias = Callable[[str], Description | None]
"""Domain UUID → what the cache knows of it, at once, or None."""

WHOLE_HOST = Domain(uuid="00000000-0000-0000-0000-000000000000", name="*")
"""The `domain` of an event whose incident has scope `host`: it speaks for guests that are not named."""

UNKNOWN_HOST = Host(name="unknown")
"""The `host` of an event before the first look at the hypervisor, ever."""

_FREE_MESSAGES = 10  # after these an incident waits between messages …
_MESSAGE_SPACING = 1.0  # … at least this many seconds
_PAUSED_GUESTS = 10_000  # at most so many are remembered by one incident (scope host)
_LATE_SECONDS = 10.0  # a pause without its event is told at most so late
_FORMAT = 1  # of the persistent states; a newer one is not read
_META = "incidents/meta"
_LIVE, _DRILL, _SEEN = "incident/", "drill/", "seen/"
_PAUSE_CODE = 1  # VIR_DOMAIN_EVENT_IO_ERROR_PAUSE
# libvirt's words for states; virsh writes two of them with a blank.
_STOPPED_STATES = frozenset({"shutoff", "shut off", "crashed"})
_RUNNING_STATES = frozenset({"running", "blocked", "idle"})


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


class _Facts(msgspec.Struct, frozen=True, omit_defaults=True):
    """One error's own words."""

    action_code: int
    reason: str
    path: str
    message: str | None = None
    disk_error: str | None = None
    evidence: tuple[Evidence, ...] = ()


class _Pending(msgspec.Struct):
    """Errors of one origin that no event has told yet; `facts` are the last one's."""

    origin: Origin
    facts: _Facts
    count: int
    first_ns: int
    last_ns: int


class _Incident(msgspec.Struct, omit_defaults=True, kw_only=True):
    """One open incident; its JSON is the persistent state.

    Times in `*_at` are monotonic seconds of the process that wrote them; `saved_at` and `saved_ns`, the
    same moment on both clocks, carry them into another process.
    """

    format: int = msgspec.field()
    key: str
    id: str
    scope: Scope
    domain: Domain
    device: Device
    enriched: bool
    facts: _Facts  # of the last error
    opened_ns: int
    opened_at: float
    first_ns: int
    last_ns: int
    lower_bound: bool
    width: float  # of the window, seconds
    window_ends_at: float
    allowed_at: float  # no message before this
    quiet_since_at: float  # the last error, or the guest's resume
    told: int = 0  # errors in messages
    messages: int = 0
    pending: list[_Pending] = []
    urgent: bool = False  # what is pending goes out as soon as it is allowed
    paused: set[str] = set()  # guests that it paused and that do not run again
    resumed: bool = False  # a guest that it had paused ran again
    pauses: int = 0
    paused_at: list[float] = []  # the last pauses
    flapping: bool = False  # as last told
    saved_at: float = 0.0
    saved_ns: int = 0


class _Seen(msgspec.Struct):
    """The last error of a device whose incident is over: a later look must not tell it again."""

    format: int
    last_ns: int


class _Meta(msgspec.Struct):
    """What belongs to no incident and is needed before the first look after a restart."""

    format: int
    host: Host | None
    throttles: bool


_encode = msgspec.json.Encoder().encode
_read_incident = msgspec.json.Decoder(_Incident).decode
_read_seen = msgspec.json.Decoder(_Seen).decode
_read_meta = msgspec.json.Decoder(_Meta).decode


def _unknown(_domain_uuid: str) -> None:
    """Describe nothing."""


def _clean(text: str) -> str:
    """Replace what can't be written as UTF-8 (a lone surrogate of a recording, say)."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _facts(burst: Burst) -> _Facts:
    raw = burst.raw
    return _Facts(
        raw.action_code,
        _clean(raw.reason),
        _clean(raw.path),
        burst.message and _clean(burst.message),
        burst.disk_error,
        burst.evidence,
    )


def _carry_over(old: _Facts, new: _Facts) -> _Facts:
    """The newer facts of one pending count; what was found out about the same kind of error stays."""
    if (
        (old.message is None and old.disk_error is None and not old.evidence)
        or old.action_code != new.action_code
        or old.reason != new.reason
    ):
        return new
    return _Facts(
        new.action_code,
        new.reason,
        new.path,
        new.message or old.message,
        new.disk_error or old.disk_error,
        new.evidence or old.evidence,
    )


def _uuid_in(key: str) -> str:
    """The domain's UUID in an incident's key."""
    return key.split("/", 2)[1]


class Incidents:
    """The state machine: observations and ticks in, events and persistent states out.

    Not thread-safe, but for `open_count` and `open_incidents`. The caller commits events and `changes()`
    of one batch in one transaction; if the commit fails it keeps both, and merges what comes later
    (states: the later value of a key wins).
    """

    def __init__(
        self, limits: IncidentLimits, *, new_id: Callable[[], str], host: Host | None = None
    ) -> None:
        """Start with nothing open; `new_id` mints an incident's id."""
        self._limits = limits
        self._new_id = new_id
        self._host = host
        self._throttles = False
        self._blind = False
        self._now = Now(0, 0.0)
        self._open: dict[str, _Incident] = {}
        self._of_domain: dict[str, list[_Incident]] = {}  # those of scope device and domain
        self._seen: dict[str, int] = {}  # oldest first
        self._resumed_at: dict[str, tuple[int, float]] = {}  # guest → wall, monotonic; oldest first
        self._changed: dict[str, None] = {}
        if host is not None:
            self._changed[_META] = None
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
            self._changed[_META] = None

    @property
    def open_count(self) -> int:
        """How many incidents are open."""
        return len(self._open)

    def apply(self, observation: Observation, now: Now, describe: Describe) -> list[Event]:
        """Take one observation; the events that it causes, in order."""
        self._now = now
        if isinstance(observation, Burst):
            return self._error(observation, now, describe)
        if isinstance(observation, RawIoError):
            at = observation.observed_at
            return self._error(Burst(observation, 1, at, at), now, describe)
        if isinstance(observation, DomainResumed):
            self._resumed_at.pop(observation.domain_uuid, None)
            self._resumed_at[observation.domain_uuid] = (observation.at_ns, now.monotonic)
            if len(self._resumed_at) > self._limits.max_open:
                del self._resumed_at[next(iter(self._resumed_at))]
            self._resume(observation.domain_uuid, now)
            return []
        if isinstance(observation, DomainGone):
            return self._gone(observation, now, describe)
        if isinstance(observation, DeviceRemoved):
            return self._removed(observation, now, describe)
        if isinstance(observation, SourceReady):
            return self._ready(observation, now, describe)
        assert isinstance(observation, SourceLost)
        self._blind = True
        return []

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
                events += self._tell(incident, now, describe, widen=not incident.urgent)
            if self._due(incident) <= now.monotonic:  # then it is quiet
                cause = "resumed" if incident.resumed else "quiet"
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
            incident = self._open.get(key)
            if incident is not None:
                incident.saved_ns, incident.saved_at = self._now.wall_ns, self._now.monotonic
                out[key] = _encode(incident)
            elif key in self._seen:
                out[key] = _encode(_Seen(_FORMAT, self._seen[key]))
            elif key == _META:
                out[key] = _encode(_Meta(_FORMAT, self._host, self._throttles))
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
            except (msgspec.MsgspecError, ValueError) as error:
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
            OpenIncident(
                id=one.id,
                domain_uuid=one.domain.uuid,
                domain_name=one.domain.name,
                device=one.device,
                action=Action.from_code(one.facts.action_code),
                reason=one.facts.reason,
                opened_at=to_datetime(one.opened_ns),
                last=to_datetime(one.last_ns),
                total=one.told + sum(pending.count for pending in one.pending),
                pauses=one.pauses,
                paused=bool(one.paused),
                flapping=self._flaps(one, self._now),
                scope=one.scope,
            )
            for one in list(self._open.values())[:limit]
        )

    # ------------------------------------------------------------------------------------- errors

    def _error(self, burst: Burst, now: Now, describe: Describe) -> list[Event]:
        """Count a burst into its incident, or open one; tell what can't wait for the window's end."""
        if burst.count < 1:
            return []
        raw = burst.raw
        prefix = _DRILL if burst.origin is Origin.REPLAY else _LIVE
        incident = self._open.get(f"{prefix}{raw.domain_uuid}/{raw.alias}")
        if incident is None:
            return self._error_elsewhere(burst, prefix, now, describe)
        return self._count(incident, burst, now, describe)

    def _error_elsewhere(self, burst: Burst, prefix: str, now: Now, describe: Describe) -> list[Event]:
        """An error of a device that has no incident: open one, of the device if there is room."""
        raw = burst.raw
        uuid, alias = _clean(raw.domain_uuid), _clean(raw.alias)
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
            domain = Domain(uuid, _clean(raw.domain_name), raw.domain_id)
        incident = _Incident(
            format=_FORMAT,
            key=key,
            id=self._new_id(),
            scope=scope,
            domain=domain,
            device=Device((alias or None) if scope is Scope.DEVICE else None),
            enriched=False,
            facts=_facts(burst),
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
            self._of_domain.setdefault(uuid, []).append(incident)
        return self._count(incident, burst, now, describe)

    def _count(self, incident: _Incident, burst: Burst, now: Now, describe: Describe) -> list[Event]:
        """Add a burst to what is pending, and tell it now if it can't wait and need not."""
        events: list[Event] = []
        facts = _facts(burst)
        changed = facts.action_code != incident.facts.action_code or facts.reason != incident.facts.reason
        if changed and incident.pending and incident.messages + 2 <= _FREE_MESSAGES:
            # What came before the change goes out under its own action and reason while that is cheap.
            events += self._tell(incident, now, describe, widen=False)
        had_pending = bool(incident.pending)
        first, last = min(burst.first_ns, burst.last_ns), max(burst.first_ns, burst.last_ns)
        for pending in incident.pending:
            if pending.origin is burst.origin:
                pending.facts = _carry_over(pending.facts, facts)
                pending.count += burst.count
                pending.first_ns = min(pending.first_ns, first)
                pending.last_ns = max(pending.last_ns, last)
                break
        else:
            incident.pending.append(_Pending(burst.origin, facts, burst.count, first, last))
        incident.facts = facts
        incident.first_ns = min(incident.first_ns, first)
        incident.last_ns = max(incident.last_ns, last)
        incident.quiet_since_at = now.monotonic
        if self._throttles:
            incident.lower_bound = True
        if facts.action_code == _PAUSE_CODE:
            self._pause(incident, burst.raw.domain_uuid, now)
            if burst.origin is Origin.LIFECYCLE and self._ran_since(burst, now):
                self._resume(burst.raw.domain_uuid, now)
        self._changed[incident.key] = None

        news = changed or (not incident.flapping and self._flaps(incident, now))
        window_over = now.monotonic >= incident.window_ends_at
        incident.urgent = incident.urgent or news
        if incident.urgent or window_over or not self._limits.fold:
            widen = window_over and had_pending and not incident.urgent
            events += self._tell(incident, now, describe, widen=widen)
        self._schedule(incident)
        return events

    def _tell(
        self, incident: _Incident, now: Now, describe: Describe, *, widen: bool, last: bool = False
    ) -> list[Event]:
        """Make an event of each pending count, as far as the message rate allows (`last`: all of them)."""
        events: list[Event] = []
        while incident.pending and (last or not self._limits.fold or now.monotonic >= incident.allowed_at):
            self._describe(incident, describe)
            pending = incident.pending.pop(0)
            phase = Phase.UPDATED if incident.messages else Phase.OPENED
            incident.told += pending.count
            incident.messages += 1
            wait = _MESSAGE_SPACING if incident.messages >= _FREE_MESSAGES else 0.0
            incident.allowed_at = now.monotonic + wait
            incident.flapping = self._flaps(incident, now)
            events.append(self._io_error(incident, pending, phase, now))
        if events:
            if widen:
                incident.width = min(incident.width * 2, self._limits.max_window_seconds)
            incident.window_ends_at = now.monotonic + incident.width
            # Counts of another origin may be left over; they wait for the rate alone.
            incident.urgent = bool(incident.pending)
            self._changed[incident.key] = None
        return events

    def _describe(self, incident: _Incident, describe: Describe) -> None:
        """Take over what the cache knows now; what was known once is kept when it is gone."""
        if incident.scope is Scope.HOST:
            return
        try:
            description = describe(_uuid_in(incident.key))
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
                incident.device, incident.enriched = device, True

    # --------------------------------------------------------------------------- pauses and the end

    def _pause(self, incident: _Incident, domain_uuid: str, now: Now) -> None:
        """The incident's error paused a guest; further errors of a paused guest are no further pause."""
        if domain_uuid in incident.paused or len(incident.paused) >= _PAUSED_GUESTS:
            return
        incident.paused.add(_clean(domain_uuid))
        incident.pauses += 1
        if incident.scope is not Scope.HOST:  # pauses of many guests are no loop
            del incident.paused_at[: -max(self._limits.flapping_pauses, 16) + 1]
            incident.paused_at.append(now.monotonic)

    def _recent_pauses(self, incident: _Incident, now: Now) -> list[float]:
        horizon = now.monotonic - self._limits.flapping_window_seconds
        return [at for at in incident.paused_at if at > horizon]

    def _flaps(self, incident: _Incident, now: Now) -> bool:
        return (
            len(incident.paused_at) >= self._limits.flapping_pauses
            and len(self._recent_pauses(incident, now)) >= self._limits.flapping_pauses
        )

    def _ran_since(self, burst: Burst, now: Now) -> bool:
        """Whether the guest was resumed after this pause, which is told late: its event was awaited."""
        at_ns, at = self._resumed_at.get(burst.raw.domain_uuid, (-1, -math.inf))
        # Wall times compare only over a short time: a clock may have been set in between.
        return burst.last_ns <= at_ns and now.monotonic - at < _LATE_SECONDS

    def _resume(self, domain_uuid: str, now: Now) -> None:
        """The guest runs: from now on its devices can prove that they are quiet."""
        concerned = list(self._of_domain.get(domain_uuid, ()))
        concerned += [one for one in self._host_incidents() if domain_uuid in one.paused]
        for incident in concerned:
            if domain_uuid in incident.paused:
                incident.paused.discard(domain_uuid)
                incident.resumed = True
            incident.quiet_since_at = now.monotonic
            self._changed[incident.key] = None
        for incident in concerned:  # only now: each one's due depends on the guest's other incidents
            self._schedule(incident)

    def _gone(self, gone: DomainGone, now: Now, describe: Describe) -> list[Event]:
        events: list[Event] = []
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
        siblings = self._of_domain.get(removed.domain_uuid, [])
        for incident in siblings:
            if incident.scope is Scope.DEVICE and incident.device.alias == removed.alias:
                for other in siblings:
                    # The guest stands still as before; its other incidents must not grow quiet by that.
                    if incident.paused and incident.key.startswith(_DRILL) == other.key.startswith(_DRILL):
                        other.paused |= incident.paused
                        self._changed[other.key] = None
                events += self._resolve(incident, "device_removed", removed.at_ns, now, describe)
        self._forget(lambda uuid, alias: (uuid, alias) == (removed.domain_uuid, removed.alias))
        return events

    def _resolve(
        self, incident: _Incident, cause: str, at_ns: int, now: Now, describe: Describe
    ) -> list[Event]:
        """End an incident: first what is pending, then the resolution."""
        events = self._tell(incident, now, describe, widen=False, last=True)
        del self._open[incident.key]
        if incident.scope is not Scope.HOST:
            uuid = _uuid_in(incident.key)
            self._of_domain[uuid] = [one for one in self._of_domain[uuid] if one is not incident]
            if not self._of_domain[uuid]:
                del self._of_domain[uuid]
        self._changed[incident.key] = None
        if incident.key.startswith(_LIVE) and incident.scope is not Scope.HOST:
            self._remember(_SEEN + incident.key.removeprefix(_LIVE), incident.last_ns)
        events.append(
            IoErrorResolved(
                host=self._host or UNKNOWN_HOST,
                domain=incident.domain,
                device=incident.device,
                occurrences=ResolvedOccurrences(
                    total=incident.told,
                    first=to_datetime(incident.first_ns),
                    last=to_datetime(incident.last_ns),
                    lower_bound=incident.lower_bound,
                ),
                incident=self._incident(incident, Phase.RESOLVED, now),
                resolution=Resolution(
                    cause=cause,
                    resolved_at=to_datetime(at_ns),
                    # Monotonic: wall time may have jumped since.
                    duration_seconds=round(max(0.0, now.monotonic - incident.opened_at), 6),
                ),
            )
        )
        return events

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
        2. Findings that no incident tells of are errors.
        3. Guests run or are paused as they were found.
        4. No incident counts as quiet before we have watched it again for the widest window.
        """
        self.host = ready.host
        if ready.throttles != self._throttles:
            self._throttles = ready.throttles
            self._changed[_META] = None
        domains = {one.uuid: one for one in ready.domains if one.state not in _STOPPED_STATES}
        events: list[Event] = []
        for incident in list(self._open.values()):
            if incident.scope is Scope.HOST:
                incident.paused &= domains.keys()
                continue
            domain = domains.get(_uuid_in(incident.key))
            if domain is None:
                events += self._resolve(incident, "domain_stopped", ready.at_ns, now, describe)
            elif (
                incident.scope is Scope.DEVICE
                and incident.enriched  # else the alias may never have been in the XML
                and domain.aliases is not None
                and incident.device.alias not in domain.aliases
            ):
                events += self._resolve(incident, "device_removed", ready.at_ns, now, describe)
        self._forget(lambda uuid, _alias: uuid not in domains)
        self._blind = False
        for finding in ready.findings:
            if not self._tells_of(finding, domains.get(finding.raw.domain_uuid)):
                events += self._error(finding, now, describe)
        for domain in domains.values():
            if domain.state in _RUNNING_STATES:
                self._resume_if_paused(domain.uuid, now)
            elif domain.paused_by_io_error:
                self._keep_paused(domain.uuid, now)
        settle = min(self._limits.quiet_seconds, self._limits.max_window_seconds)
        for incident in self._open.values():
            not_before = now.monotonic + settle - self._limits.quiet_seconds
            incident.quiet_since_at = max(incident.quiet_since_at, not_before)
            self._changed[incident.key] = None
            self._schedule(incident)
        return events

    def _tells_of(self, finding: Burst, domain: DomainState | None) -> bool:
        """Whether an event told of this finding already.

        An error with the hypervisor's text has the time at which it happened: it is known if its device
        had an error since. A pause without one has only the time of the look: it is known if an
        incident of the device, or of an unknown device of that guest, holds the guest paused.
        """
        uuid, alias = finding.raw.domain_uuid, finding.raw.alias
        timeless = (
            finding.raw.action_code == _PAUSE_CODE
            and finding.message is None
            and (domain is None or domain.paused_by_io_error)
        )
        for incident in self._of_domain.get(uuid, ()):
            if incident.key.startswith(_DRILL):
                continue
            same_device = not alias or incident.device.alias is None or incident.device.alias == alias
            known = finding.last_ns <= incident.last_ns or (timeless and uuid in incident.paused)
            if same_device and known:
                return True
        whole_host = self._open.get(f"{_LIVE}*")
        if timeless and whole_host is not None and uuid in whole_host.paused:
            return True
        told = max(self._seen.get(f"{_SEEN}{uuid}/{alias}", -1), self._seen.get(f"{_SEEN}{uuid}", -1))
        return finding.last_ns <= told

    def _resume_if_paused(self, domain_uuid: str, now: Now) -> None:
        concerned = [*self._of_domain.get(domain_uuid, ()), *self._host_incidents()]
        if any(domain_uuid in incident.paused for incident in concerned):
            self._resume(domain_uuid, now)

    def _keep_paused(self, domain_uuid: str, now: Now) -> None:
        """A guest was found paused by an error: what is open of it must not grow quiet."""
        incidents = self._of_domain.get(domain_uuid, ())
        if any(domain_uuid in one.paused for one in (*incidents, *self._host_incidents())):
            return
        pausing = [one for one in incidents if one.facts.action_code == _PAUSE_CODE]
        for incident in pausing or incidents:
            self._pause(incident, domain_uuid, now)

    # --------------------------------------------------------------------------------- small parts

    def _host_incidents(self) -> list[_Incident]:
        return [self._open[key] for key in (f"{_LIVE}*", f"{_DRILL}*") if key in self._open]

    def _held(self, incident: _Incident) -> bool:
        """Whether a guest of the incident stands still: then its silence says nothing."""
        if incident.scope is Scope.HOST:
            return bool(incident.paused)
        uuid, drill = _uuid_in(incident.key), incident.key.startswith(_DRILL)
        siblings = [*self._of_domain.get(uuid, ()), *self._host_incidents()]
        return any(uuid in one.paused for one in siblings if one.key.startswith(_DRILL) == drill)

    def _due(self, incident: _Incident) -> float:
        """When a tick has something to do for the incident."""
        if incident.pending:
            allowed = incident.allowed_at if self._limits.fold else -math.inf
            return allowed if incident.urgent else max(incident.window_ends_at, allowed)
        if self._blind or self._held(incident):
            return math.inf
        return incident.quiet_since_at + self._limits.quiet_seconds

    def _schedule(self, incident: _Incident) -> None:
        self._wake = min(self._wake, self._due(incident))

    def _restore_one(self, key: str, state: bytes, now: Now) -> None:
        """Read one state; raises msgspec.MsgspecError or ValueError."""
        if key == _META:
            meta = _read_meta(state)
            _check_format(meta.format)
            self._host = self._host or meta.host
            self._throttles = meta.throttles
        elif key.startswith(_SEEN):
            seen = _read_seen(state)
            _check_format(seen.format)
            self._seen[key] = seen.last_ns
        elif key.startswith((_LIVE, _DRILL)):
            incident = _read_incident(state)
            _check_format(incident.format)
            incident.key = key
            elapsed = max(0, now.wall_ns - incident.saved_ns) / 1e9
            shift = now.monotonic - elapsed - incident.saved_at
            incident.opened_at += shift
            incident.window_ends_at += shift
            incident.allowed_at += shift
            incident.quiet_since_at += shift
            incident.paused_at = [at + shift for at in incident.paused_at]
            self._open[key] = incident
            if incident.scope is not Scope.HOST:
                self._of_domain.setdefault(_uuid_in(key), []).append(incident)

    def _incident(self, incident: _Incident, phase: Phase, now: Now) -> Incident:
        recent = self._recent_pauses(incident, now)
        rate = None
        if len(recent) > 1 and recent[-1] > recent[0]:
            rate = round((len(recent) - 1) * 60 / (recent[-1] - recent[0]), 3)
        return Incident(
            id=incident.id,
            phase=phase,
            opened_at=to_datetime(incident.opened_ns),
            pauses=incident.pauses,
            flapping=self._flaps(incident, now),
            pauses_per_minute=rate,
            scope=incident.scope,
        )

    def _io_error(self, incident: _Incident, pending: _Pending, phase: Phase, now: Now) -> IoError:
        facts = pending.facts
        return IoError(
            host=self._host or UNKNOWN_HOST,
            domain=incident.domain,
            device=incident.device,
            error=ErrorFacts(
                action=Action.from_code(facts.action_code),
                action_code=facts.action_code,
                reason=facts.reason,
                path=facts.path,
                message=facts.message,
                disk_error=facts.disk_error,
                occurred_at=to_datetime(pending.last_ns),
                evidence=facts.evidence,
            ),
            occurrences=Occurrences(
                count=pending.count,
                total=incident.told,
                first=to_datetime(pending.first_ns),
                last=to_datetime(pending.last_ns),
                lower_bound=incident.lower_bound,
            ),
            incident=self._incident(incident, phase, now),
            origin=pending.origin,
            enriched=incident.enriched,
        )


def _check_format(number: int) -> None:
    if number != _FORMAT:
        raise ValueError(f"its format is {number}, this release reads {_FORMAT}")
