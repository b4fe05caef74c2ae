"""The durable outbox: what is committed here is delivered, or named by number in a gap event.

Two threads meet here and nowhere else: the intake thread commits (`committing`), the publisher thread
takes and settles (`settling`), each on a connection of its own. One Python lock orders the two writers
(SQLite would make them sleep and poll); taking never waits for it.

On the disk the spool is bounded by `max_bytes` of pages holding events (`draft.disk_bytes`), by twice that
for the file as a whole (PRAGMA max_page_count: pages of a spool that was emptied here and there are part
full), by about 8 MiB of log (a checkpoint each 1,000 pages, under the lock, so it always ends), and by two
damaged files that were set aside. In memory it holds about ten bytes an event and no body.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path

from virtbus.errors import SpoolFull
from virtbus.model import Clock, Event, Host, Outcome, Record, Stamp
from virtbus.spool import files, opening
from virtbus.spool.committing import IntakeSide
from virtbus.spool.contents import Loss
from virtbus.spool.draft import Scribe
from virtbus.spool.ledger import count_events
from virtbus.spool.mirror import SharedState, SpoolLimits
from virtbus.spool.opening import Start
from virtbus.spool.settling import PublisherSide


@dataclass(frozen=True, slots=True)
class SpoolStats:
    """Numbers of one moment. Bytes are bytes on the disk, ages are measured on the monotonic clock."""

    pending: int
    in_flight: int
    parked_keys: int
    dead: int
    bytes: int
    dead_bytes: int
    oldest_seconds: float | None
    committed_sequence: int  # of this run
    confirmed_sequence: int  # everything up to it, of this run, was confirmed or named in a confirmed gap
    unsettled: int  # confirmed, and the file does not know it yet
    unnamed: int  # losses that the next commit names


class Spool:
    """One state folder's outbox, held exclusively.

    It guarantees:
    1. what `commit` returned for is on the disk, incident states and events together, or nothing is;
    2. each event keeps its id, epoch and sequence for ever, and no other event gets them;
    3. what leaves without the broker's confirmation (given way, refused, damaged, dropped) is named in a
       gap event, and that event is named again if it gets lost itself;
    4. a row that is not what was written is never taken.

    One thread calls commit, alive and states, one take, settle, give_back and wait; any calls stats and wake.
    """

    def __init__(
        self, path: Path, lock: files.Lock, start: Start, state: SharedState, scribe: Scribe
    ) -> None:
        """Use `Spool.open`."""
        self.path = path
        self.epoch = scribe.epoch
        self.opening = start.opening
        self.format = f"{files.MAJOR}.{start.minor}"
        self._lock_file = lock
        self._scribe = scribe
        self._state = state
        self._intake = IntakeSide(state, scribe)
        self._publisher = PublisherSide(state)

    @classmethod
    def open(
        cls, state_dir: Path, *, limits: SpoolLimits, agent_id: str, clock: Clock | None = None
    ) -> Spool:
        """Take the folder's lock, check the file (rescue it when it is damaged) and begin a new epoch.

        Raises ConfigError (the folder can't be used), SpoolBusy (another process, named), SpoolFull (the
        disk does not take it now: try again), SpoolCorrupt (a file of an unknown major version).
        """
        clock = clock or Clock()
        files.prepare_state_dir(state_dir)
        path = state_dir / files.DATABASE
        lock = files.Lock(state_dir)
        try:
            start = opening.start(path, lock, clock)
            lock.check(path)
            state = SharedState(path, limits, clock, start, lock)
            return cls(path, lock, start, state, Scribe(start.account.epoch, agent_id))
        except sqlite3.Error as error:
            lock.close()
            raise files.translate(error, path) from error
        except OSError as error:
            lock.close()
            raise SpoolFull(f"{path} can't be made: {error.strerror}; check space and rights") from error
        except BaseException:
            lock.close()
            raise

    @property
    def host(self) -> Host | None:
        """The host that gap events of the spool's own name; set it when it is known."""
        return self._scribe.host

    @host.setter
    def host(self, host: Host | None) -> None:
        self._scribe.host = host

    @property
    def agent_id(self) -> str:
        """Whose events these are; it may be set until the first of them is committed."""
        return self._scribe.agent_id

    @agent_id.setter
    def agent_id(self, agent_id: str) -> None:
        self._scribe.agent_id = agent_id

    def commit(
        self, events: Sequence[Event], states: Mapping[str, bytes | None] | None = None
    ) -> list[Stamp]:
        """See IntakeSide.commit."""
        return self._intake.commit(events, states)

    def alive(self, wall_ns: int) -> bool:
        """See IntakeSide.alive."""
        return self._intake.alive(wall_ns)

    @property
    def refusal(self) -> SpoolFull | None:
        """Why the disk did not take the last sign of life; None when it did."""
        return self._intake.refusal

    def states(self) -> dict[str, bytes]:
        """The incident states as last committed."""
        return self._intake.states()

    def take(self, limit: int, busy: AbstractSet[str]) -> list[Record]:
        """See PublisherSide.take and virtbus.bus.Feed."""
        return self._publisher.take(limit, busy)

    def settle(self, outcomes: Sequence[tuple[Record, Outcome]]) -> None:
        """See PublisherSide.settle."""
        self._publisher.settle(outcomes)

    def give_back(self, error: Exception) -> None:
        """See PublisherSide.give_back."""
        self._publisher.give_back(error)

    def wait(self, timeout: float, stop: threading.Event) -> bool:
        """See PublisherSide.wait."""
        return self._publisher.wait(timeout, stop)

    def wake(self) -> None:
        """End a `wait` at once."""
        with self._state.changed:
            self._state.changed.notify_all()

    def take_losses(self) -> list[Loss]:
        """What no gap event names yet. Whoever commits a gap event with these ranges has named them; the
        spool names by itself what is left, so calling this is only needed to choose the words.
        """
        with self._state.memory:
            return list(self._state.losses)

    def stats(self) -> SpoolStats:
        """Numbers of this moment; any thread, no disk."""
        state = self._state
        now = state.clock().monotonic
        with state.memory:
            oldest = state.index.oldest_row()
            born = None if oldest is None else state.births.of(oldest)
            return SpoolStats(
                pending=state.index.pending,
                in_flight=state.index.taken,
                parked_keys=state.index.parked_keys,
                dead=state.dead,
                bytes=state.bytes,
                dead_bytes=state.dead_bytes,
                oldest_seconds=None if oldest is None else max(0.0, now - (now if born is None else born)),
                committed_sequence=state.account.last,
                confirmed_sequence=state.account.settled_through,
                unsettled=self._publisher.unsettled,
                unnamed=sum(count_events(loss.ranges) for loss in state.losses),
            )

    def close(self) -> None:
        """Settle what is left, sign off and let go of the folder; idempotent. Both threads have ended.

        Bounded also when they have not: while a commit hangs in the kernel the lock stays with this
        process, until it ends, for what hangs may still be written.
        """
        with self._state.changed:
            if self._state.closed:
                return
            self._state.closed = True
            self._state.changed.notify_all()
        self._publisher.close()
        if self._intake.close():
            self._lock_file.close()
