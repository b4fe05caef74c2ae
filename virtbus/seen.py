"""Up to when everything that the source reported is committed: where every gap about unobserved time starts.

It moves on only with a proof that took the events' own path. The source asks the hypervisor something on the
connection that brings the events; the answer stands behind all that was reported before the question; a
marker goes into the queue behind those callbacks; the batch that holds the marker is committed. So it is
never later than the last time the queue was emptied, the loss of the source, or the beginning of a time in
which this process stood still. Pure: clocks are passed in.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from virtbus.model import Now
from virtbus.observations import SourceGone, SourceLost, SourceReady, SourceSeen, Surveyed
from virtbus.words import GapReason, SourceState

# What a proof does not cover: an error on its way from the guest's disk over QEMU to the daemon, and one that
# a source has stamped and not handed over yet. A gap that begins too early costs nothing.
MARGIN_SECONDS = 1.0
# The clock's own wander below this is not a step: a stamp is then shown as it was read.
STEP_NS = 100_000_000
STANDSTILL_SECONDS = 5.0  # a wait that takes so much longer than asked for: the process stood still
ANSWER_SECONDS = 20.0  # a connection that did not answer for so long is not ready
ANSWER_OF_MANY_SECONDS = 50.0  # … one of many, which is asked every 30 s where nothing happens


def boot_id() -> str | None:
    """The kernel's id of this boot (random(4)); None where it can't be read."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    except OSError:
        return None


class Moment(NamedTuple):
    """A time of this boot: as the wall clock said it, and what that clock would have said at the boot."""

    wall_ns: int
    booted_ns: int

    @classmethod
    def of(cls, now: Now, seconds_ago: float = 0.0) -> Moment:
        """The moment of a reading, or `seconds_ago` before it."""
        return cls(now.wall_ns - int(seconds_ago * 1e9), now.wall_ns - int(now.boot * 1e9))

    @classmethod
    def stamped(cls, wall_ns: int, now: Now) -> Moment:
        """A stamp that was read from the wall clock not long before `now`."""
        return cls(wall_ns, now.wall_ns - int(now.boot * 1e9))

    @property
    def boot_ns(self) -> int:
        """Nanoseconds since the boot: what moments are ordered by, whatever the wall clock did."""
        return self.wall_ns - self.booted_ns

    def at(self, now: Now) -> Moment:
        """The same moment as the wall clock as it is now would have said it; itself unless that was set."""
        step = now.wall_ns - int(now.boot * 1e9) - self.booted_ns
        return self if abs(step) < STEP_NS else Moment(self.wall_ns + step, self.booted_ns + step)

    def wall(self, now: Now) -> int:
        """The same moment in the wall clock as it is now, ns."""
        return self.at(now).wall_ns


class WallClocks:
    """What this host's wall clock said at the boot, over time: it may be set, and more than once.

    Not thread-safe: the source thread follows it, at least once in some seconds.
    """

    _MOST = 64

    def __init__(self) -> None:
        self._each: list[Moment] = []  # since when it said so, oldest first

    def follow(self, now: Now) -> None:
        """Notice whether it was set."""
        moment = Moment.of(now)
        if not self._each or abs(moment.booted_ns - self._each[-1].booted_ns) >= STEP_NS:
            self._each = [*self._each[1 - self._MOST :], moment]

    def stamps(self, since: Moment, now: Now, *, ours: bool = True) -> tuple[int, float]:
        """What another program has stamped since then is not older than the first, nor newer than the second.

        It may have done so by the clock of then, of now, or any between them. A newer stamp was made before
        the clock was set back. Where the clock is not this host's (`ours`) no stamp is too new.
        """
        self.follow(now)
        ends = [*self._each[1:], Moment.of(now)]
        used = [(one, end) for one, end in zip(self._each, ends, strict=True) if end.boot_ns > since.boot_ns]
        earliest = since.boot_ns + min([since.booted_ns, *(one.booted_ns for one, _ in used)])
        if not ours or since.boot_ns < self._each[0].boot_ns:
            return earliest, math.inf
        return earliest, STEP_NS + max([now.wall_ns, *(end.boot_ns + one.booted_ns for one, end in used)])


def moment_of(item: SourceReady | SourceLost | Surveyed, now: Now) -> Moment:
    """When it was reported, also where the wall clock was set between then and `now`."""
    booted_ns = None if isinstance(item, Surveyed) else item.booted_ns
    return Moment.stamped(item.at_ns, now) if booted_ns is None else Moment(item.at_ns, booted_ns)


def is_told(at_ns: int, last_ns: int, now_ns: int) -> bool:
    """Whether an error of `at_ns` is not newer than the last one reported, by stamps of the wall clock.

    A last one that lies ahead of now was stamped before the clock was set back. What lies behind now can't be
    compared with it, and is reported.
    """
    return at_ns <= last_ns and (last_ns <= now_ns or at_ns > now_ns)


def stalled_words(seconds: float) -> str:
    """What a gap says of a standstill."""
    return f"the agent's process stood still for {seconds:.0f} s (stopped, suspended or swapped out)"


def earliest(*moments: Moment) -> Moment:
    """Whichever comes first, whatever the wall clock did between them."""
    return min(moments, key=lambda each: each.boot_ns)


class Blind(NamedTuple):
    """The source has not been seen since a moment, and why: the gap that its return ends."""

    since: Moment
    why: str
    reason: GapReason


class SeenThrough:
    """One connection's value. The intake thread feeds it with what it drained, and then asks it.

    `take` remembers what a batch proves, and `committed` makes it count. Nothing counts while the connection
    is lost. A source that proves nothing (a third party's) counts as seen up to a second before the queue was
    last emptied.
    """

    def __init__(self, since: Moment, blind: Blind | None = None) -> None:
        """`since`: what an earlier run saw last, or the first one's start; `blind`: since when this
        connection has not been seen.
        """
        self.moment = since
        self.blind = blind
        self.connected = False
        self.proves = False
        self._proven: Moment | None = None  # by what is not committed yet
        self._answered: float | None = None  # boot time of the last question that was answered

    def take(self, item: SourceReady | SourceLost | SourceSeen, now: Now) -> Blind | None:
        """One word of the source, in the queue's order → the blindness that it ended, if any."""
        if isinstance(item, SourceSeen):
            if self.blind is None and self.connected:
                self._proven = Moment.of(item.asked, MARGIN_SECONDS + item.undecided)
                self._answered = item.asked.boot
            return None
        if isinstance(item, SourceLost):
            self.lost(moment_of(item, now), item.why, item.reason)
            return None
        ended, self.blind = self.blind, None
        self.connected, self.proves = True, item.proves
        self._proven = moment_of(item, now)  # what lies before belongs to the gap that ends here
        self._answered = now.boot
        return ended

    def lost(self, at: Moment, why: str, reason: GapReason) -> None:
        """Nothing is seen from here on: at the latest since `at`, in truth since the last proof."""
        self.connected = False
        if self.blind is None:
            self.blind = Blind(earliest(at, self._proven or self.moment), why, reason)

    def drained(self, before: Now) -> None:
        """A batch was taken from the queue; `before` was read before that."""
        if self.connected and not self.proves and self._proven is None:
            self._proven = Moment.of(before, MARGIN_SECONDS)

    def committed(self) -> Moment:
        """All that was taken is on the disk → the moment up to which everything is."""
        proven, self._proven = self._proven, None
        if proven is not None and proven.boot_ns > self.moment.boot_ns:
            self.moment = proven
        return self.moment

    def silent_for(self, now: Now, most: float) -> float | None:
        """Seconds for which a connection that has to answer has not; None for `most` seconds after it did."""
        if not self.connected or not self.proves or self._answered is None:
            return None
        silent = now.boot - self._answered
        return silent if silent > most else None


class Sight:
    """The connections of one source, by name. The intake thread changes it; any thread may ask."""

    def __init__(self, since: Moment, now: Now) -> None:
        """`since`: what an earlier run saw last, or the first one's start."""
        self.since = since
        self.unreached: Blind | None = None  # the gap that a connection first seen later will end
        self.changed_ns = now.wall_ns  # when a connection was lost or came back
        self.connections: dict[str, SeenThrough] = {}
        self._surveyed = False  # a source of many connections has looked at all that were there
        self._unreached = False  # but for some that do not answer

    def take(self, item: SourceReady | SourceLost | SourceSeen, now: Now) -> Blind | None:
        """One word of the source about itself → the blindness that it ended, if any."""
        seen = self.connections.get(item.connection)
        if seen is None:
            if isinstance(item, SourceSeen):
                return None  # an old word of a connection that has ended
            seen = self.connections[item.connection] = self._first_seen(item, now)
        if not isinstance(item, SourceSeen):
            self.changed_ns = item.at_ns
        return seen.take(item, now)

    def _first_seen(self, item: SourceReady | SourceLost, now: Now) -> SeenThrough:
        """A connection that is new. One of many may have come later than the agent, with its guest."""
        one_of_many = not item.whole if isinstance(item, SourceReady) else item.domains is not None
        if self.unreached is None or not one_of_many:
            return SeenThrough(self.since, self.unreached)
        since = self.unreached.since  # what came up before lies in the start's own gap
        if not isinstance(item, SourceReady):
            return SeenThrough(since)
        if item.appeared_ns is not None:
            appeared = moment_of(item, now)._replace(wall_ns=min(item.appeared_ns, item.at_ns))
            since = max(since, appeared, key=lambda each: each.boot_ns)
        why = f"{item.connection} was not reached before"
        return SeenThrough(since, Blind(since, why, GapReason.SOURCE_LOST) if item.domains else None)

    def gone(self, item: SourceGone) -> Blind | None:
        """A connection ended for good → what was not seen of guests whose end it did not report, if any."""
        seen = self.connections.pop(item.connection, None)
        if seen is None or not item.domains:
            return None
        blind = seen.blind or Blind(seen.moment, "its socket is gone", GapReason.SOURCE_LOST)
        return blind._replace(why=f"{item.connection} ended: {blind.why}")

    def surveyed(self, item: Surveyed) -> None:
        """All connections of the start were looked at: from now on each is a guest's own."""
        self._surveyed, self._unreached, self.changed_ns = True, bool(item.unreached), item.at_ns

    def drained(self, before: Now) -> None:
        """All that was queued at `before` was taken."""
        for seen in self.connections.values():
            seen.drained(before)

    def committed(self) -> None:
        """All that was taken is on the disk."""
        for seen in self.connections.values():
            seen.committed()

    @property
    def through(self) -> Moment:
        """Up to when everything that every connection reported is on the disk."""
        if not self.connections:
            return self.since
        return earliest(*(seen.moment for seen in self.connections.values()))

    @property
    def trusts(self) -> bool:
        """Whether a connection is up that proves nothing, and can't notice a standstill of this process."""
        return any(seen.connected and not seen.proves for seen in list(self.connections.values()))

    @property
    def state(self) -> SourceState:
        """Whether every connection is up; of many, whether one is: each loss is reported by its own gap."""
        each = [seen.connected for seen in list(self.connections.values())]
        if not each:
            idle = self._surveyed and not self._unreached  # no guest, so nothing to be connected to
            return SourceState.CONNECTED if idle else SourceState.STARTING
        connected = any(each) if self._surveyed else all(each)
        return SourceState.CONNECTED if connected else SourceState.DISCONNECTED

    def troubles(self, now: Now) -> list[str]:
        """Why the source is not seen now, a line each."""
        troubles = [] if self.state is SourceState.CONNECTED else [f"source is {self.state}"]
        connected = [seen for seen in list(self.connections.values()) if seen.connected]
        if self._surveyed:  # one that is silent concerns its own guests; all of them are: so is our process
            silent = [seen.silent_for(now, ANSWER_OF_MANY_SECONDS) for seen in connected]
            shown = min((each for each in silent if each is not None), default=None)
            if shown is not None and None not in silent:
                troubles.append(f"source: no answer on any of {len(silent)} connections for {shown:.0f} s")
            return troubles
        for seen in connected:
            alone = seen.silent_for(now, ANSWER_SECONDS)
            if alone is not None:
                troubles.append(f"source: no answer on the connection of the events for {alone:.0f} s")
        return troubles
