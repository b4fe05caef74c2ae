"""Up to when each of the source's connections was seen through, and whether it is seen now."""

from __future__ import annotations

from virtbus.model import Now, SourceGone, SourceLost, SourceReady, SourceSeen, Surveyed
from virtbus.seen import STANDSTILL_SECONDS, Blind, Moment, SeenThrough, earliest
from virtbus.words import GapReason, SourceState


class Sight:
    """The connections of one source, by name. The intake thread changes it; any thread may ask."""

    def __init__(self, since: Moment, now: Now) -> None:
        """`since`: what an earlier run saw last, or the first one's start."""
        self.since = since
        self.unreached: Blind | None = None  # what the first snapshot of a further connection will end
        self.changed_ns = now.wall_ns  # when a connection was lost or came back
        self.connections: dict[str, SeenThrough] = {}
        self._surveyed = False  # a source of many connections has looked at all that were there

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
        if item.appeared_ns is not None and item.appeared_ns > since.wall(now):
            since = Moment.stamped(min(item.appeared_ns, item.at_ns), now)
        why = f"{item.connection} was not reached before"
        return SeenThrough(since, Blind(since, why, GapReason.SOURCE_LOST) if item.domains else None)

    def gone(self, item: SourceGone) -> Blind | None:
        """A connection ended for good → what was not seen of guests whose end it did not tell, if any."""
        seen = self.connections.pop(item.connection, None)
        if seen is None or not item.domains:
            return None
        blind = seen.blind or Blind(seen.moment, "its socket is gone", GapReason.SOURCE_LOST)
        return blind._replace(why=f"{item.connection} ended: {blind.why}")

    def surveyed(self, item: Surveyed) -> None:
        """All connections of the start were looked at: from now on each is a guest's own."""
        self._surveyed, self.changed_ns = True, item.at_ns

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
        """Up to when everything that every connection told is on the disk."""
        if not self.connections:
            return self.since
        return earliest(*(seen.moment for seen in self.connections.values()))

    def blinded(self, before: Now, now: Now, timeout: float) -> tuple[float, list[Moment]]:
        """A wait of at most `timeout` seconds is over: did this process stand still (stopped, suspended)?

        → (for how many seconds, since when the connections that can't notice by themselves are unseen).
        """
        stood = now.boot - before.boot - timeout
        if stood < STANDSTILL_SECONDS:
            return 0.0, []
        blind = [seen.moment for seen in self.connections.values() if seen.connected and not seen.proves]
        return stood, blind

    @property
    def state(self) -> SourceState:
        """Whether every connection is up; of many, whether one is: another's loss is told by its own gap."""
        each = [seen.connected for seen in list(self.connections.values())]
        if not each:
            return SourceState.CONNECTED if self._surveyed else SourceState.STARTING
        connected = any(each) if self._surveyed else all(each)
        return SourceState.CONNECTED if connected else SourceState.DISCONNECTED

    def troubles(self, now: Now) -> list[str]:
        """Why the source is not seen now, a line each."""
        troubles = [] if self.state is SourceState.CONNECTED else [f"source is {self.state}"]
        for seen in [] if self._surveyed else list(self.connections.values()):
            silent = seen.silent_for(now)
            if silent is not None:
                troubles.append(f"source: no answer on the connection of the events for {silent:.0f} s")
        return troubles
