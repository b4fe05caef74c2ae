"""Up to when each of the source's connections was seen through, and whether it is seen now."""

from __future__ import annotations

from virtbus.model import Now, SourceLost, SourceReady, SourceSeen
from virtbus.seen import STANDSTILL_SECONDS, Blind, Moment, SeenThrough, earliest
from virtbus.words import SourceState


class Sight:
    """The connections of one source, by name. The intake thread changes it; any thread may ask."""

    def __init__(self, since: Moment, now: Now) -> None:
        """`since`: what an earlier run saw last, or the first one's start."""
        self.since = since
        self.unreached: Blind | None = None  # what the first snapshot of a further connection will end
        self.changed_ns = now.wall_ns  # when a connection was lost or came back
        self.connections: dict[str, SeenThrough] = {}

    def take(self, item: SourceReady | SourceLost | SourceSeen, now: Now) -> Blind | None:
        """One word of the source about itself → the blindness that it ended, if any."""
        seen = self.connections.get(item.connection)
        if seen is None:
            seen = self.connections[item.connection] = SeenThrough(self.since, self.unreached)
        if not isinstance(item, SourceSeen):
            self.changed_ns = item.at_ns
        return seen.take(item, now)

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
        """Whether every connection is up."""
        connections = list(self.connections.values())
        if not connections:
            return SourceState.STARTING
        connected = all(seen.connected for seen in connections)
        return SourceState.CONNECTED if connected else SourceState.DISCONNECTED

    def troubles(self, now: Now) -> list[str]:
        """Why the source is not seen now, a line each."""
        troubles = [] if self.state is SourceState.CONNECTED else [f"source is {self.state}"]
        for seen in list(self.connections.values()):
            silent = seen.silent_for(now)
            if silent is not None:
                troubles.append(f"source: no answer on the connection of the events for {silent:.0f} s")
        return troubles
