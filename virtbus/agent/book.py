"""What is known of incidents and guests: what is open, what was resolved lately, who is seen and who runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Set as AbstractSet

from virtbus.agent.incident import (
    DRILL,
    FORMAT,
    LIVE,
    META,
    SEEN,
    IncidentState,
    Meta,
    Seen,
    clean,
    freeze_other,
    read_state,
    uuid_in,
)
from virtbus.model import Device, Host, Now
from virtbus.observations import Burst
from virtbus.words import GuestState, Scope

PAUSED_GUESTS = 10_000  # at most so many are remembered


class GuestWatch:
    """Which guests are seen, and which stand still; one that does proves nothing by its silence."""

    def __init__(self) -> None:
        self.blind = False  # to every guest that is not in `sighted`
        self.sighted: set[str] = set()  # guests whose own connection has looked at them since
        self.unsighted: dict[str, str] = {}  # guest whose own connection is lost → that ("": not known)
        self.unreached: set[str] = set()  # those among them whose connection was not reached since the start
        self.halted: dict[str, GuestState] = {}  # guest that does not run → its state

    def halt(self, uuid: str, state: GuestState) -> None:
        """It stands still, for whatever reason."""
        if len(self.halted) < PAUSED_GUESTS or uuid in self.halted:
            self.halted[uuid] = state

    def runs(self, uuid: str) -> None:
        """It was seen running."""
        self.halted.pop(uuid, None)
        if self.blind:
            self.sighted.add(uuid)

    def gone(self, uuid: str) -> None:
        """It left the host."""
        self.sighted.discard(uuid)
        self.unsighted.pop(uuid, None)
        self.unreached.discard(uuid)
        self.halted.pop(uuid, None)

    def lost(self, uuids: frozenset[str] | None, connection: str) -> None:
        """Nothing is seen of these guests of a connection, or (None) of any."""
        if uuids is None:
            self.blind = True
            self.sighted.clear()
        else:
            self.unsighted |= dict.fromkeys(uuids, connection)
            self.sighted -= uuids

    def looked_at(self, uuids: set[str], *, whole: bool) -> None:
        """A look found these guests; a `whole` one found all that there are."""
        if whole:
            self.see_all()
            self.unsighted, self.unreached, self.halted = {}, set(), {}
        self.sighted |= uuids
        self.unreached -= uuids
        for uuid in uuids:
            self.unsighted.pop(uuid, None)
            self.halted.pop(uuid, None)

    def see_all(self, but: AbstractSet[str] = frozenset()) -> None:
        """Every guest that there is has been looked at, `but` those whose connection was not reached."""
        self.blind = False
        self.sighted.clear()
        lost = {uuid: name for uuid, name in self.unsighted.items() if uuid not in self.unreached}
        self.unsighted = lost | dict.fromkeys(but, "")
        self.unreached = set(but)

    def is_unseen(self, incident: IncidentState) -> bool:
        """Whether a guest of the incident is not seen."""
        if incident.scope is Scope.HOST:
            return self.blind or bool(self.unsighted)
        uuid = uuid_in(incident.key)
        lost = self.unsighted.get(uuid)  # another connection may have a guest of this UUID, and see it
        return (lost is not None and incident.is_of(lost)) or (self.blind and uuid not in self.sighted)


class Book:
    """The open incidents by key, the last errors of those that are over, and which of it has changed."""

    def __init__(self, host: Host | None, kept: int) -> None:
        """`kept`: of so many devices the last error is remembered."""
        self._host = host
        self._throttles = False
        self._kept = kept
        self.open: dict[str, IncidentState] = {}
        self._of_domain: dict[str, list[IncidentState]] = {}  # those of scope device and domain
        self._seen: dict[str, tuple[int, ...]] = {}  # the last error of what is over (ns), oldest first
        self._changed: dict[str, None] = {} if host is None else {META: None}

    @property
    def host(self) -> Host | None:
        """Whose errors these are; it survives a restart."""
        return self._host

    @host.setter
    def host(self, host: Host | None) -> None:
        if host != self._host:
            self._host = host
            self._changed[META] = None

    @property
    def throttles(self) -> bool:
        """Whether the source says that errors are merged, whatever its hypervisor's version says."""
        return self._throttles

    @throttles.setter
    def throttles(self, throttles: bool) -> None:
        if throttles != self._throttles:
            self._throttles = throttles
            self._changed[META] = None

    def of(self, uuid: str) -> list[IncidentState]:
        """The domain's own incidents, drills among them."""
        return list(self._of_domain.get(uuid, ()))

    def of_host(self) -> list[IncidentState]:
        """Those of scope host."""
        return [self.open[key] for key in (f"{LIVE}*", f"{DRILL}*") if key in self.open]

    def add(self, incident: IncidentState) -> None:
        """It is open."""
        self.open[incident.key] = incident
        if incident.scope is not Scope.HOST:
            self._of_domain.setdefault(uuid_in(incident.key), []).append(incident)

    def touch(self, incident: IncidentState) -> None:
        """It changed: its state is to be kept."""
        self._changed[incident.key] = None

    def name(self, incident: IncidentState, alias: str) -> None:
        """The device of an incident that did not know it."""
        self.touch(incident)
        del self.open[incident.key]
        incident.key += clean(alias)
        incident.device, incident.described = Device(clean(alias)), True
        self.open[incident.key] = incident

    def close(self, incident: IncidentState) -> None:
        """It is over: its last error is remembered, for a later look must not report it again."""
        del self.open[incident.key]
        self.touch(incident)
        if incident.scope is Scope.HOST:
            return
        uuid = uuid_in(incident.key)
        left = [one for one in self._of_domain.pop(uuid) if one is not incident]
        if left:
            self._of_domain[uuid] = left
        if not incident.drill:
            key = SEEN + incident.key.removeprefix(LIVE)
            self._seen.pop(key, None)
            self._seen[key] = incident.told_ns
            self._changed[key] = None
            while len(self._seen) > self._kept:
                oldest = next(iter(self._seen))
                del self._seen[oldest]
                self._changed[oldest] = None

    def forget(self, matches: Callable[[str, str | None], bool]) -> None:
        """Drop what is remembered of resolved incidents of (domain, alias; None: the whole domain)."""
        for key in list(self._seen):
            _, uuid, *alias = key.split("/", 2)
            if matches(uuid, alias[0] if alias else None):
                del self._seen[key]
                self._changed[key] = None

    def has_seen(self, uuid: str, alias: str) -> bool:
        """Whether a device had an incident that is over."""
        return f"{SEEN}{uuid}/{alias}" in self._seen

    def last_seen(self, finding: Burst) -> tuple[int, ...]:
        """The last error of the finding's device in an incident that is over: `IncidentState.told_ns`."""
        uuid, alias = finding.raw.domain_uuid, finding.raw.alias
        return (*self._seen.get(f"{SEEN}{uuid}/{alias}", ()), *self._seen.get(f"{SEEN}{uuid}", ()))

    # ---- through a restart

    def changes(self, now: Now) -> dict[str, bytes | None]:
        """Persistent states that changed since the last call, by key; None deletes the key."""
        out: dict[str, bytes | None] = {}
        for key in self._changed:
            if key in self.open:
                out[key] = self.open[key].freeze(now)
            elif key in self._seen:
                last_ns, *lasts = self._seen[key]
                out[key] = freeze_other(Seen(FORMAT, last_ns, lasts))
            elif key == META:
                out[key] = freeze_other(Meta(FORMAT, self._host, self._throttles))
            else:
                out[key] = None
        self._changed.clear()
        return out

    def restore(self, states: Mapping[str, bytes], now: Now) -> tuple[str, ...]:
        """Take over the states of an earlier run → a line for each that could not be read, and is deleted."""
        problems: list[str] = []
        for key, state in states.items():
            try:
                found = read_state(key, state)
                if isinstance(found, IncidentState):
                    found.thaw(now)
                    self.add(found)
                elif isinstance(found, Seen):
                    self._seen[key] = (found.last_ns, *found.lasts)
                elif isinstance(found, Meta):
                    self._host = self._host or found.host
                    self._throttles = found.throttles
            except (ValueError, OverflowError, RecursionError) as error:
                problems.append(f"state {key!r} can't be read and is given up: {error}")
                self._changed[key] = None
        self.open = dict(sorted(self.open.items(), key=lambda item: (item[1].opened_ns, item[0])))
        self._seen = dict(sorted(self._seen.items(), key=lambda item: item[1]))
        return tuple(problems)
