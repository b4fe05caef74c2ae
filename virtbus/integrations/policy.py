"""Which hosts to hold back and which to release: pure; hysteresis and the limit on how many."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from virtbus.fleet import Blame, FleetView, HostHealth

_FLAP_SECONDS = 3600.0  # a host that is held again within this is held twice as long, each time
_MOST_DOUBLINGS = 4


@dataclass(frozen=True, slots=True)
class Held:
    """A host that we hold, as it is stored."""

    since: float  # Unix seconds
    times: int  # how often in a row, each within an hour of the last


@dataclass(frozen=True, slots=True)
class Decision:
    """Hold or release one host."""

    host: str
    hold: bool
    why: str


@dataclass(frozen=True, slots=True)
class HoldRules:
    """See `virtbus.config.React`, where each is a setting."""

    when: str = "undetermined"  # "host", "undetermined" or "any"
    min_guests: int = 2
    raise_seconds: float = 30.0
    clear_seconds: float = 300.0
    max_share: float = 0.1


class HoldPolicy:
    """Remembers since when each host is bad or well; everything that must outlive a restart is passed in.

    Guarantees:
    1. never more hosts are held than `max_share` of those in the fleet (one always may);
    2. a host is held only while its agent reports, and when not most agents are silent at once (that
       would rather be our own fault);
    3. a host is released only after a heartbeat of this run has told that it is well, for
       `clear_seconds`, doubled each time it comes back within an hour;
    4. two agents that claim one host name get nothing done for either.
    """

    def __init__(self, rules: HoldRules) -> None:
        """Nothing is known yet."""
        self._rules = rules
        self._bad_since: dict[str, float] = {}
        self._well_since: dict[str, float] = {}
        self.left_alone: set[str] = set()  # see `leave_alone`; a host goes from it when it was well
        self.withheld: tuple[str, ...] = ()  # hosts that the limit keeps from being held, after `decide`

    def leave_alone(self, host: str) -> None:
        """Somebody else holds this host, or undid what we did: not ours until it has been well again."""
        self.left_alone.add(host)

    def decide(
        self, view: FleetView, held: Mapping[str, Held], now: float, wall: float
    ) -> tuple[Decision, ...]:
        """What to change now; `now` is monotonic and `wall` Unix seconds."""
        claims = Counter(host.name for host in view.hosts if host.state != "silent")
        out: list[Decision] = []
        candidates: list[tuple[float, HostHealth]] = []
        for host in view.hosts:
            if claims[host.name] > 1:
                continue
            if self._is_bad(host):
                self._well_since.pop(host.name, None)
                since = self._bad_since.setdefault(host.name, now)
                ready = now - since >= self._rules.raise_seconds and host.state == "observing"
                if ready and host.name not in held and host.name not in self.left_alone:
                    candidates.append((since, host))
                continue
            self._bad_since.pop(host.name, None)
            if host.state != "observing" or not host.fresh:
                self._well_since.pop(host.name, None)
                continue
            since = self._well_since.setdefault(host.name, now)
            needed = self._clear_seconds(held.get(host.name))
            if now - since >= needed:
                self.left_alone.discard(host.name)
                if host.name in held:
                    out.append(Decision(host.name, False, f"well for {now - since:.0f} s"))
        room = max(1, math.floor(self._rules.max_share * len(view.hosts))) - len(
            held
        )  # also those whose release is under way
        self.withheld = ()
        if view.suspect_ourselves:
            return tuple(out)
        candidates.sort(key=lambda item: (item[1].blame is not Blame.HOST, item[0]))
        for _, host in candidates[: max(0, room)]:
            out.append(Decision(host.name, True, f"{host.blame.value}: {host.why or 'open incidents'}"))
        self.withheld = tuple(host.name for _, host in candidates[max(0, room) :])
        return tuple(out)

    def times(self, before: Held | None, released_at: float | None, wall: float) -> int:
        """How often in a row a host is now held, when it was last released at `released_at`."""
        if before is None or released_at is None or wall - released_at > _FLAP_SECONDS:
            return 1
        return before.times + 1

    def _clear_seconds(self, held: Held | None) -> float:
        doublings = 0 if held is None else min(held.times - 1, _MOST_DOUBLINGS)
        return self._rules.clear_seconds * float(2**doublings)

    def _is_bad(self, host: HostHealth) -> bool:
        rules = self._rules
        if host.blame is Blame.HOST:
            return True
        if host.incidents == 0 or rules.when == "host" or host.guests < rules.min_guests:
            return False
        if rules.when == "undetermined":
            return host.blame is Blame.UNDETERMINED and not host.full
        return True
