"""One open incident as it is kept: in memory, as the JSON that survives a kill, and as its events."""

from __future__ import annotations

import json
from collections.abc import Iterable
from collections.abc import Set as AbstractSet
from dataclasses import replace

import msgspec

from virtbus.model import (
    Device,
    Domain,
    ErrorFacts,
    Evidence,
    Host,
    Hypervisor,
    Incident,
    IoError,
    IoErrorResolved,
    Now,
    Occurrences,
    OpenIncident,
    Resolution,
    ResolvedOccurrences,
    to_datetime,
)
from virtbus.observations import Burst
from virtbus.words import Action, DiskError, GuestState, Origin, Phase, Scope

FORMAT = 1  # of the states; another one is not read
PAUSES_KEPT = 16  # for the rate of a loop
CLOCKS_KEPT = 8  # that were set back, one after another

# A state's key: <kind><domain uuid>/<alias, empty when unknown>, <kind><domain uuid> for a whole domain,
# <kind>* for the whole host.
META = "incidents/meta"
LIVE = "incident/"
DRILL = "drill/"
SEEN = "seen/"

PAUSE_CODE, REPORT_CODE = 1, 2  # VIR_DOMAIN_EVENT_IO_ERROR_PAUSE, _REPORT


def uuid_in(key: str) -> str:
    """The domain's UUID in a key."""
    return key.split("/", 2)[1]


def clean(text: str) -> str:
    """Replace what can't be written as UTF-8 (a lone surrogate of a recording, say)."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


class Facts(msgspec.Struct, frozen=True, omit_defaults=True):
    """One error's own words."""

    action_code: int
    reason: str
    path: str
    message: str | None = None
    disk_error: DiskError | None = None
    evidence: tuple[Evidence, ...] = ()

    @classmethod
    def of(cls, burst: Burst) -> Facts:
        """The words of a burst."""
        raw = burst.raw
        return cls(
            raw.action_code,
            clean(raw.reason),
            clean(raw.path),
            burst.message and clean(burst.message),
            burst.disk_error,
            burst.evidence,
        )

    def filled(self, known: Facts) -> Facts:
        """These facts, with the path and reason known of the error where a look can't find them."""
        return msgspec.structs.replace(self, path=self.path or known.path, reason=self.reason or known.reason)

    def add_to(self, known: Facts) -> bool:
        """Whether they say anything about the error that was not known; numbers in texts are not news."""
        checks = {(one.check, one.verdict) for one in self.evidence}
        return (
            self.differ(known)
            or self.message not in (None, known.message)
            or self.disk_error not in (None, known.disk_error)
            or not checks <= {(one.check, one.verdict) for one in known.evidence}
        )

    def differ(self, other: Facts) -> bool:
        """Whether action or reason changed between the two: that is news."""
        return self.action_code != other.action_code or self.reason != other.reason

    def followed_by(self, newer: Facts) -> Facts:
        """The newer facts; what was found out about the same kind of error stays."""
        if self.differ(newer) or (self.message is None and self.disk_error is None and not self.evidence):
            return newer
        return Facts(
            newer.action_code,
            newer.reason,
            newer.path,
            newer.message or self.message,
            newer.disk_error or self.disk_error,
            newer.evidence or self.evidence,
        )


class Pending(msgspec.Struct):
    """Errors of one origin that no event has reported yet; `facts` are the last one's.

    A count of 0 is what a look found out about errors that were reported already.
    """

    origin: Origin
    facts: Facts
    count: int
    first_ns: int
    last_ns: int


class IncidentState(msgspec.Struct, omit_defaults=True, kw_only=True):
    """One open incident; its JSON is the persistent state.

    Times in `*_at` are monotonic seconds of the process that wrote them; `saved_at` and `saved_ns`, the
    same moment on both clocks, carry them into another process.
    """

    format: int
    key: str
    id: str
    scope: Scope
    domain: Domain
    device: Device
    enriched: bool
    facts: Facts  # of the last error
    opened_ns: int
    opened_at: float
    first_ns: int
    last_ns: int
    lower_bound: bool  # whatever becomes known of the hypervisor
    width: float  # of the window, seconds
    window_ends_at: float
    allowed_at: float  # no message before this
    quiet_since_at: float  # the last error, or the guest's resume
    told: int = 0  # errors in messages
    messages: int = 0
    pending: list[Pending] = []
    urgent: bool = False  # what is pending goes out as soon as it is allowed
    paused: set[str] = set()  # guests that it paused and that do not run again
    resumed: bool = False  # a guest that it had paused ran again
    pauses: int = 0
    paused_at: list[float] = []  # the last pauses of a loop
    flapping: bool = False  # as last reported
    stamp_ns: int | None = None  # the hypervisor's own time of its newest error, where it kept one
    lasts: list[int] = []  # its last error by each wall clock that was set back since, and by the present one
    run: int | None = None  # the domain's id (virDomainGetID) at its last error: another start has another
    removed: bool = False  # its device was unplugged while the guest stood still
    connection: str = ""  # that has its domain, where the source has several and it is known
    hypervisor: Hypervisor | None = None  # of that connection
    described: bool = False  # its device's description changed since it was last reported
    saved_at: float = 0.0
    saved_ns: int = 0

    @property
    def drill(self) -> bool:
        """Whether its errors are of origin `replay`."""
        return self.key.startswith(DRILL)

    def is_of(self, connection: str) -> bool:
        """Whether its guest is, or may be, that of a connection ("": of any)."""
        return not connection or self.connection in ("", clean(connection))

    def lies_in(self, places: AbstractSet[str]) -> bool:
        """Whether its guest's connection is, or may be, one of these or in one of these folders."""
        mine = self.connection
        return not mine or any(mine == each or mine.startswith(f"{each}/") for each in places)

    @property
    def newest_ns(self) -> int:
        """Its last error, by whichever clock says later (ns)."""
        return max(self.last_ns, self.stamp_ns or 0)

    @property
    def told_ns(self) -> tuple[int, ...]:
        """Its last error by whichever clock says later, and by each of our own (ns)."""
        return (self.newest_ns, *self.lasts)

    def add(self, burst: Burst, facts: Facts) -> None:
        """Count a burst into what is pending, each origin by itself."""
        first, last = min(burst.first_ns, burst.last_ns), max(burst.first_ns, burst.last_ns)
        for pending in self.pending:
            if pending.origin is burst.origin or not burst.count:
                pending.facts = pending.facts.followed_by(facts)
                if burst.count:
                    pending.first_ns = min(pending.first_ns, first) if pending.count else first
                    pending.last_ns = max(pending.last_ns, last) if pending.count else last
                    pending.count += burst.count
                break
        else:
            self.pending.append(Pending(burst.origin, facts, burst.count, first, last))
        self.facts = self.facts.followed_by(facts) if not burst.count else facts
        if burst.stamp_ns is not None:
            self.stamp_ns = max(self.stamp_ns or 0, burst.stamp_ns)
        if burst.count:
            self.removed = False
            self.run = self.run if burst.raw.domain_id is None else burst.raw.domain_id
            self.first_ns = min(self.first_ns, first)
            self.last_ns = max(self.last_ns, last)
            self.lasts = [*(at for at in self.lasts if at > last), last][-CLOCKS_KEPT:]

    def pause(self, domain_uuid: str, times: int, at: float, keep: int) -> None:
        """Its error paused a guest; further errors of a paused guest do not count as pauses."""
        if domain_uuid in self.paused:
            return
        self.paused.add(clean(domain_uuid))
        self.pauses += times
        if self.scope is not Scope.HOST:  # pauses of many guests are not a loop
            keep = max(keep, PAUSES_KEPT)
            self.paused_at += [at] * min(times, keep)
            del self.paused_at[:-keep]

    def pauses_since(self, horizon: float) -> list[float]:
        """When it paused its guest, after a time."""
        return [at for at in self.paused_at if at > horizon]

    # ------------------------------------------------------------------------------------- as events

    def incident(self, phase: Phase, recent_pauses: list[float]) -> Incident:
        """The incident as an event shows it; the rate is that of the recent pauses (monotonic times)."""
        rate = None
        if len(recent_pauses) > 1 and recent_pauses[-1] > recent_pauses[0]:
            span = recent_pauses[-1] - recent_pauses[0]
            rate = round((len(recent_pauses) - 1) * 60 / span, 3)
        return Incident(
            id=self.id,
            phase=phase,
            opened_at=to_datetime(self.opened_ns),
            pauses=self.pauses,
            flapping=self.flapping,
            pauses_per_minute=rate,
            scope=self.scope,
        )

    def on(self, host: Host) -> Host:
        """The host with this guest's own hypervisor, where there are several."""
        return host if self.hypervisor is None else replace(host, hypervisor=self.hypervisor)

    def _is_lower_bound(self, host: Host) -> bool:
        """Also while it is not known whether errors are merged."""
        return self.lower_bound or host.hypervisor.merges is not False

    def io_error(self, host: Host, pending: Pending, incident: Incident) -> IoError:
        """The event of one pending count; `told` includes it already."""
        facts = pending.facts
        domain = self.domain
        if facts.action_code == PAUSE_CODE and self.paused:
            # The error comes before the lifecycle event: the cache does not know of the pause yet.
            domain = replace(domain, state=GuestState.PAUSED)
        host = self.on(host)
        return IoError(
            host=host,
            domain=domain,
            device=_at_image(self.device, facts.path),
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
                total=self.told,
                first=to_datetime(pending.first_ns),
                last=to_datetime(pending.last_ns),
                lower_bound=self._is_lower_bound(host),
            ),
            incident=incident,
            origin=pending.origin,
            enriched=self.enriched,
        )

    def resolved(self, host: Host, incident: Incident, resolution: Resolution) -> IoErrorResolved:
        """The event of its end; nothing is pending any more."""
        host = self.on(host)
        return IoErrorResolved(
            host=host,
            domain=self.domain,
            device=self.device,
            occurrences=ResolvedOccurrences(
                total=self.told,
                first=to_datetime(self.first_ns),
                last=to_datetime(self.last_ns),
                lower_bound=self._is_lower_bound(host),
            ),
            incident=incident,
            resolution=resolution,
        )

    def listed(self, *, flapping: bool) -> OpenIncident:
        """The incident as a heartbeat carries it; `total` includes what is pending."""
        return OpenIncident(
            id=self.id,
            domain_uuid=self.domain.uuid,
            domain_name=self.domain.name,
            device=self.device,
            action=Action.from_code(self.facts.action_code),
            reason=self.facts.reason,
            opened_at=to_datetime(self.opened_ns),
            last=to_datetime(self.last_ns),
            total=self.told + sum(pending.count for pending in self.pending),
            pauses=self.pauses,
            paused=bool(self.paused),
            flapping=flapping,
            scope=self.scope,
            drill=self.drill,
        )

    # ------------------------------------------------------------------------------- through a restart

    def freeze(self, now: Now) -> bytes:
        """The persistent state, with the moment that ties its times to the wall clock."""
        self.saved_ns, self.saved_at = now.wall_ns, now.monotonic
        return _encode(self)

    def thaw(self, now: Now) -> None:
        """Carry the times of another process into this one; a wall clock that went back counts as no time."""
        elapsed = max(0, now.wall_ns - self.saved_ns) / 1e9
        shift = now.monotonic - elapsed - self.saved_at
        self.opened_at += shift
        self.window_ends_at += shift
        self.allowed_at += shift
        self.quiet_since_at += shift
        self.paused_at = [at + shift for at in self.paused_at]

    def check(self) -> None:
        """Raise OverflowError when one of its wall-clock times is none that a clock could have read."""
        times = [self.opened_ns, self.first_ns, self.last_ns, self.saved_ns, *self.lasts]
        times += [at for pending in self.pending for at in (pending.first_ns, pending.last_ns)]
        if any(not -(2**63) <= at < 2**63 for at in times):
            raise OverflowError("its times are out of range")


class Seen(msgspec.Struct, omit_defaults=True):
    """The last error of a device whose incident is over: a later look must not report it again."""

    format: int
    last_ns: int  # the later one of our time and the hypervisor's own
    lasts: list[int] = []  # as in IncidentState


class Meta(msgspec.Struct):
    """What belongs to no incident and is needed before the first look after a restart."""

    format: int
    host: Host | None
    throttles: bool


_encoder = msgspec.json.Encoder()
_decoders: dict[str, msgspec.json.Decoder[IncidentState] | msgspec.json.Decoder[Seen]] = {
    LIVE: msgspec.json.Decoder(IncidentState),
    DRILL: msgspec.json.Decoder(IncidentState),
    SEEN: msgspec.json.Decoder(Seen),
}
_meta_decoder = msgspec.json.Decoder(Meta)


def _encode(state: IncidentState | Seen | Meta) -> bytes:
    try:
        return _encoder.encode(state)
    except UnicodeEncodeError:  # a lone surrogate in what a source described
        return json.dumps(msgspec.to_builtins(state), ensure_ascii=False).encode("utf-8", "replace")


def freeze_other(state: Seen | Meta) -> bytes:
    """The persistent state of what is not an incident."""
    return _encode(state)


def read_state(key: str, state: bytes) -> IncidentState | Seen | Meta | None:
    """A persistent state by its key; None when the key is not ours.

    Raises ValueError, OverflowError or RecursionError (not ours to read).
    """
    kind, slash, _ = key.partition("/")
    decoder = _meta_decoder if key == META else _decoders.get(kind + slash)
    if decoder is None:
        return None
    found: IncidentState | Seen | Meta = decoder.decode(state)  # msgspec's errors are ValueErrors
    if found.format != FORMAT:
        raise ValueError(f"its format is {found.format}, this release reads {FORMAT}")
    if isinstance(found, IncidentState):
        found.check()
        found.key = key
    return found


def any_counts(pending: Iterable[Pending]) -> bool:
    """Whether errors are pending, and not only what was found out about older ones."""
    return any(one.count for one in pending)


def _at_image(device: Device, path: str | None) -> Device:
    """The device with the place in its backing chain that a path names: 0 is the top, None is unknown.

    Of a network image libvirt gives the name alone, its server not.
    """
    source = device.source
    if source is None or not path:
        return device
    names = [image.partition("://")[2].partition("/")[2] or image for image in source.backing]
    chain = [(source.path, source.data_file), *zip(source.backing, names, strict=True)]
    found = next((index for index, images in enumerate(chain) if path in images), None)
    return device if found is None else replace(device, chain_index=found)
