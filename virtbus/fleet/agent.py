"""What was heard of one agent: its runs in their order, its incidents, its clock against ours. Pure."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from enum import Enum

from virtbus.fleet.storage import Backend, Sharing
from virtbus.fleet.verdict import Trouble
from virtbus.model import Host, Now, SourceHealth
from virtbus.words import Action, SourceState

MAX_INTERVAL_SECONDS = 3600.0  # the schema's bound: no agent may ask for more patience
_MAX_ENDED = 1000
_MAX_INCIDENTS = 5000
_MAX_RUNS = 32
_PACE_SECONDS = 1.0  # two heartbeats that were made within less show nothing
_LIVE_SHARE = 0.5  # heartbeats that come in less than this share of the time between their making had waited
_CLOCK_SAMPLES = 3
_CLOCK_TRUSTED_SECONDS = 5.0  # a heartbeat's way to us: less than this is not a wrong clock

Version = tuple[str, int]  # (epoch, sequence): in the order of `Runs`, not of the text


class Rate:
    """Events a minute, forgotten exponentially."""

    __slots__ = ("_at", "_value")

    def __init__(self) -> None:
        self._value, self._at = 0.0, 0.0

    def add(self, count: int, now: float, constant: float) -> None:
        """`count` events now."""
        self._value = self._value * math.exp(-(now - self._at) / constant) + count
        self._at = now

    def per_minute(self, now: float, constant: float) -> float:
        """The rate now."""
        if not self._value:
            return 0.0
        return self._value * math.exp(-(now - self._at) / constant) * 60.0 / constant


class Pace(Enum):
    """Whether an agent's heartbeats come as fast as they are made; no clock is compared with another's."""

    UNKNOWN = "unknown"  # one alone may have waited in the broker for any time
    BEHIND = "behind"  # they come faster than they were made: they waited, and the agent may be dead by now
    LIVE = "live"


class Runs:
    """The runs (epochs) of one agent from the oldest to the newest. No clock of the host decides:

    - a gap event names the run before its own (`follows`);
    - a heartbeat is never stored, so a run that beats for the first time is the newest, and while a run goes
      on beating no other is newer than it (`beats`);
    - a run that is known from stored events alone is taken for the newest until one of these says otherwise;
    - a heartbeat that is delivered again, or that a later one of its run overtook, says nothing.
    """

    def __init__(self) -> None:
        self._order: list[str] = []
        # Runs that a heartbeat spoke for, in the order of their first one → the id of their last one.
        self._beating: dict[str, str] = {}
        self._doubts = 0  # heartbeats of the run before the last, one after the other

    @property
    def newest(self) -> str:
        """The newest run; "" when none was heard of."""
        return self._order[-1] if self._order else ""

    def rank(self, epoch: str) -> int:
        """Greater for a later run; -1 for one that was never heard of, or long ago."""
        try:
            return self._order.index(epoch)
        except ValueError:
            return -1

    def meets(self, epoch: str) -> None:
        """An event of this run came."""
        if epoch and epoch not in self._order:
            self._order.append(epoch)
            del self._order[:-_MAX_RUNS]

    def follows(self, epoch: str, previous: str) -> None:
        """A gap event of `epoch` says which run came before it."""
        if not epoch or not previous or epoch == previous:
            return
        self.meets(epoch)
        if previous not in self._order:
            self._order.insert(self._order.index(epoch), previous)
        elif self.rank(previous) > self.rank(epoch):
            if epoch not in self._beating:
                self._order.remove(epoch)
                self._order.insert(self._order.index(previous) + 1, epoch)
            elif previous not in self._beating:  # its events come behind a heartbeat that overtook them
                self._order.remove(previous)
                self._order.insert(self._order.index(epoch), previous)

    def has_counted(self, epoch: str, id_: str) -> bool:
        """Whether this heartbeat came before, or one that its run made later: a UUIDv7 grows within a run."""
        last = self._beating.get(epoch, "")
        return last != "" and (id_ == last or (id_ < last and _grows(id_) and _grows(last)))

    def beats(self, epoch: str, id_: str = "") -> bool:
        """A heartbeat of this run came; whether it speaks for the agent now (or is one that came late).

        `id_` is the event's, "" where none is known.
        """
        self.meets(epoch)
        if self.has_counted(epoch, id_):
            return False
        last = self._beating.get(epoch)
        if last is None or epoch != next(reversed(self._beating)):
            self._doubts += 1
            # One that overtakes the next run's comes once; a second in a row is an agent that lives.
            if last is not None and self._doubts < 2:
                self._beating[epoch] = id_
                return False
            self._beating.pop(epoch, None)
            while len(self._beating) >= _MAX_RUNS:
                del self._beating[next(iter(self._beating))]
        self._beating[epoch] = id_
        self._doubts = 0
        self._order.remove(epoch)
        self._order.append(epoch)
        return True


def _grows(id_: str) -> bool:
    """Whether it has the shape of a UUIDv7."""
    return len(id_) == 36 and id_[14] == "7"


@dataclass(slots=True)
class Incident:
    """One open incident as the last word of it says."""

    domain: str
    backend: Backend
    opened: float  # Unix seconds, by the host's clock
    onset: float  # Unix seconds, by ours; guessed again with each heartbeat until one is known to be live
    action: Action
    paused: bool
    flapping: bool
    full: bool
    unconfirmed: bool
    after_boot: bool
    version: Version
    total: int
    settled: bool = True  # its onset is
    recurs: bool = False  # errors were added while we listened

    def grows(self, total: int) -> bool:
        """Whether errors were added since we first heard of it."""
        return self.recurs or total > self.total

    def trouble(self, host: str, *, is_open: bool, listened_since: float) -> Trouble:
        """The incident as evidence; `listened_since` in Unix seconds."""
        witnessed = self.recurs or self.onset >= listened_since or self.backend.sharing is Sharing.LOCAL
        return Trouble(
            host, self.domain, self.backend, self.onset, is_open, self.full, self.unconfirmed,
            self.after_boot, witnessed,
        )  # fmt: skip


@dataclass(slots=True)
class Ended:
    """An incident that is over; None for one that is not ours to count (a drill)."""

    incident: Incident | None
    at: float  # monotonic
    version: Version | None  # None: nothing that comes later opens it again


@dataclass(slots=True)
class Agent:
    """One agent of the fleet, by its id."""

    id: str
    name: str | None = None
    host: Host | None = None
    heard: float = 0.0  # monotonic
    beat_at: float | None = None  # monotonic: its last heartbeat
    began_to_beat: float = 0.0  # monotonic: its first heartbeat under its present name
    pace: Pace = Pace.UNKNOWN
    sent: tuple[float, float] | None = None  # the last heartbeat: made (its host's clock), came (monotonic)
    first_sent: float = 0.0  # Unix seconds, by its host's clock
    has_lived: bool = False  # a heartbeat of it was live
    listened_since: float | None = None  # Unix seconds, ours: when what we first heard of it was made
    interval: float = 0.0  # its own, bounded
    blind: bool = False
    runs: Runs = field(default_factory=Runs)
    heartbeat: Version = ("", -1)
    complete: bool = False
    booted: float | None = None  # Unix seconds: when a new boot id was first seen
    incidents: dict[str, Incident] = field(default_factory=dict)
    ended: dict[str, Ended] = field(default_factory=dict)
    rate: Rate = field(default_factory=Rate)
    clock: deque[float] = field(default_factory=lambda: deque(maxlen=_CLOCK_SAMPLES))
    _settled: bool = True  # every onset is

    @property
    def fresh(self) -> bool:
        """Whether its newest run reported, by heartbeat, everything that is open."""
        return self.complete and self.heartbeat[0] == self.runs.newest

    def state(self, now: float, intervals: float, default: float) -> str:
        """See `HostHealth.state`: by its own heartbeats, and by nobody else's interval."""
        if self.beat_at is None or self.pace is Pace.BEHIND:
            return "silent"
        if now - self.beat_at > (self.interval or default) * intervals:
            return "silent"
        return "blind" if self.blind else "observing"

    def not_later(self, one: Version, other: Version) -> bool:
        """Whether `one` is not newer than `other`."""
        return (self.runs.rank(one[0]), one[1]) <= (self.runs.rank(other[0]), other[1])

    def beats(self, interval: float, source: SourceHealth, sent: float, now: Now) -> None:
        """Take a heartbeat's own facts; `sent` is when it was made, by the host's clock."""
        if self.beat_at is None:
            self.began_to_beat = now.monotonic
        self.beat_at = now.monotonic
        self.interval = min(max(interval, 0.0), MAX_INTERVAL_SECONDS)
        self.blind = source.state != SourceState.CONNECTED
        self.clock.append(now.wall_ns / 1e9 - sent)
        if self.sent is None:
            self.first_sent = sent
            self.sent = sent, now.monotonic
        made, came = sent - self.sent[0], now.monotonic - self.sent[1]
        # A clock that stood or was set back says nothing about how fast they were made: the interval does.
        expected = made if made > 0 else self.interval
        if came >= max(expected * _LIVE_SHARE, _PACE_SECONDS * _LIVE_SHARE):
            self.pace = Pace.LIVE
        elif made >= _PACE_SECONDS:
            self.pace = Pace.BEHIND
        if made >= _PACE_SECONDS or made < 0:
            self.sent = sent, now.monotonic
        if self.pace is not Pace.LIVE or not self._settled:
            self._guess_again(now)

    def _guess_again(self, now: Now) -> None:
        """The way to us, and so the host's clock, is known better with each heartbeat that waited less."""
        self._settled = self.pace is Pace.LIVE
        if self.listened_since is None or not self.has_lived:
            self.listened_since = self.ours(self.first_sent, now)
        self.has_lived = self.has_lived or self._settled
        over = (ended.incident for ended in self.ended.values() if ended.incident is not None)
        for incident in (*self.incidents.values(), *over):
            if not incident.settled:
                incident.onset = self.ours(incident.opened, now)
                incident.settled = self._settled

    def onset(self, opened: float, known: Incident | None, now: Now) -> tuple[float, bool]:
        """When an incident began, by our clock, and whether that is settled."""
        if known is not None:
            return known.onset, known.settled
        live = self.pace is Pace.LIVE
        self._settled = self._settled and live
        return self.ours(opened, now), live

    def ours(self, moment: float, now: Now) -> float:
        """A time of the host's clock in ours (the least way to us shows the clock's own part), never later
        than now.
        """
        offset = min(self.clock, key=abs) if self.clock else 0.0
        if abs(offset) < _CLOCK_TRUSTED_SECONDS:
            offset = 0.0
        return min(moment + offset, now.wall_ns / 1e9)

    def keep(self, id_: str, incident: Incident) -> None:
        """Keep an open incident, within bounds."""
        if id_ not in self.incidents and len(self.incidents) >= _MAX_INCIDENTS:
            del self.incidents[next(iter(self.incidents))]
        self.incidents[id_] = incident

    def end(self, id_: str, ended: Ended) -> None:
        """Remember that an incident is over, within bounds."""
        self.ended.pop(id_, None)
        self.ended[id_] = ended
        while len(self.ended) > _MAX_ENDED:
            del self.ended[next(iter(self.ended))]

    def ended_after(self, id_: str, version: Version) -> bool:
        """Whether it was over when this was said."""
        ended = self.ended.get(id_)
        return ended is not None and (ended.version is None or self.not_later(version, ended.version))
