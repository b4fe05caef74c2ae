"""Which hosts to hold back and which to release: pure; hysteresis and the limit on how many."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from virtbus.config import HoldRules
from virtbus.fleet import Answer, Blame, FleetView, HostHealth

_FLAP_SECONDS = 3600.0  # a host that is held again within this is held twice as long, each time
_MOST_DOUBLINGS = 4
_ABSENT_SECONDS = 3600.0  # the longest heartbeat interval: who was not heard for so long is not there


@dataclass(frozen=True, slots=True)
class Decision:
    """Hold or release one host."""

    host: str
    hold: bool
    why: str


class HoldPolicy:
    """Remembers since when each host is bad or well; everything that must outlive a restart is passed in.

    Guarantees:
    1. never more hosts are held than `max_share` of those in the fleet (one always may); one that has been
       out of the fleet for an hour no longer counts;
    2. only a host that is bad for `raise_seconds` on end is held: its agent reports and sees its hypervisor,
       it is not too early to tell (except with `when` = any), and not most agents are silent at once (that
       would rather be our own fault);
    3. this policy releases only a host that is well for `clear_seconds` on end: by heartbeats of its agent's
       present run, with none of its guests in trouble; doubled each time it comes back within an hour
       (`holds.orphaned` gives back hosts that left);
    4. two agents that claim one host name get nothing done for either.
    """

    def __init__(self, rules: HoldRules) -> None:
        """Nothing is known yet."""
        self._rules = rules
        self._bad_since: dict[str, float] = {}
        self._well_since: dict[str, float] = {}
        self._absent_since: dict[str, float] = {}  # held hosts that the fleet does not know
        self.left_alone: set[str] = set()  # see `leave_alone`; a host goes from it when it was well
        self.withheld: tuple[str, ...] = ()  # hosts that the limit keeps from being held, after `decide`

    def leave_alone(self, host: str) -> None:
        """Somebody else holds this host, or undid what we did: not ours until it has been well again."""
        self.left_alone.add(host)

    def decide(self, view: FleetView, held: Mapping[str, int], now: float) -> tuple[Decision, ...]:
        """What to change now (monotonic); `held` says of each host how often in a row it is held.

        A release is sent again until the host is no longer among `held`.
        """
        names: dict[str, list[HostHealth]] = {}
        for host in view.hosts:
            names.setdefault(host.name, []).append(host)
        out: list[Decision] = []
        candidates: list[tuple[float, HostHealth]] = []
        for name, claims in names.items():
            host, answer = self._answer(claims)
            bad_since = self._last(self._bad_since, name, answer is Answer.BAD, now)
            well_since = self._last(self._well_since, name, answer is Answer.WELL, now)
            if bad_since is not None and now - bad_since >= self._rules.raise_seconds:
                if name not in held and name not in self.left_alone:
                    candidates.append((bad_since, host))
            elif well_since is not None and now - well_since >= self._clear_seconds(held.get(name, 1)):
                self.left_alone.discard(name)
                if name in held:
                    out.append(Decision(name, False, f"well for {now - well_since:.0f} s"))
        for gone in (self._bad_since.keys() | self._well_since.keys()) - names.keys():
            self._bad_since.pop(gone, None)
            self._well_since.pop(gone, None)
        most = max(1, math.floor(self._rules.max_share * len(names)))
        room = max(0, most - self._counted(held, names, now))
        self.withheld = ()
        if view.suspect_ourselves:
            return tuple(out)
        candidates.sort(key=lambda item: (item[1].blame is not Blame.HOST, item[0]))
        for _, host in candidates[:room]:
            out.append(Decision(host.name, True, f"{host.blame.value}: {host.why or 'open incidents'}"))
        self.withheld = tuple(host.name for _, host in candidates[room:])
        return tuple(out)

    def times(self, before: int, released_at: float | None, wall: float) -> int:
        """How often in a row a host is now held, when it was last released at `released_at`."""
        return 1 if released_at is None or wall - released_at > _FLAP_SECONDS else before + 1

    def _answer(self, claims: Sequence[HostHealth]) -> tuple[HostHealth, Answer]:
        """The one agent that speaks for the name, and what there is to say; nothing when there are two."""
        speaking = [one for one in claims if one.state != "silent"]
        if len(speaking) != 1:
            return claims[0], Answer.CANT_TELL
        (host,) = speaking
        if host.answer is Answer.CANT_TELL and self._is_bad_enough(host):
            return host, Answer.BAD
        return host, host.answer

    def _is_bad_enough(self, host: HostHealth) -> bool:
        """Whether the operator has hosts held for less than their own fault (`when`)."""
        rules = self._rules
        if rules.when == "host" or host.state != "observing" or host.guests < max(1, rules.min_guests):
            return False
        if rules.when == "undetermined":
            return host.blame is Blame.UNDETERMINED and not host.full and not host.early
        return True

    def _last(self, since: dict[str, float], name: str, holds: bool, now: float) -> float | None:
        if not holds:
            since.pop(name, None)
            return None
        return since.setdefault(name, now)

    def _counted(self, held: Mapping[str, int], names: Mapping[str, object], now: float) -> int:
        """How many of the held hosts the limit counts: also those whose release is under way."""
        for known in [name for name in self._absent_since if name in names or name not in held]:
            del self._absent_since[known]
        for name in held.keys() - names.keys():
            self._absent_since.setdefault(name, now)
        return sum(now - self._absent_since.get(name, now) < _ABSENT_SECONDS for name in held)

    def _clear_seconds(self, times: int) -> float:
        return self._rules.clear_seconds * float(2 ** min(times - 1, _MOST_DOUBLINGS))
