"""The durable outbox: what is committed here is delivered, or named by number in a gap event.

Two threads meet here and nowhere else: the intake thread commits what `draft` has drawn up (`committing`),
the publisher thread takes and settles (`settling`), each on a connection of its own. One Python lock orders
the two writers (SQLite would make them sleep and poll); taking never waits for it. Both write to one file
(`files`), on which `opening` begins a run, and share one memory of it (`mirror`; `missing`: what was settled,
and what is to be named). `requests` are an operator's; at `faults` tests kill it.

On the disk the spool is bounded by `max_bytes` of pages holding events (`draft.disk_bytes`), by twice that
for the file as a whole (PRAGMA max_page_count: pages of a spool that was emptied here and there are part
full), by about 8 MiB of log (a checkpoint each 1,000 pages, under the lock, so it always ends), and by two
damaged files that were moved away. In memory it holds about ten bytes per event and no body.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path

from virtbus.config import SpoolLimits
from virtbus.errors import SpoolCorrupt, SpoolFull
from virtbus.model import Clock, Host
from virtbus.spool import files, opening
from virtbus.spool.committing import Committer
from virtbus.spool.draft import Scribe
from virtbus.spool.files import prepare_state_dir
from virtbus.spool.missing import count_events
from virtbus.spool.opening import Opening
from virtbus.spool.settling import Settler

__all__ = ["Opening", "Spool", "SpoolLimits", "SpoolStats", "prepare_state_dir"]


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
    3. what leaves without the broker's confirmation (evicted, refused, damaged, dropped) is named in a
       gap event, and that event is named again if it gets lost itself;
    4. a row that is not what was written is never taken.

    One thread calls `commit`, `alive` and `states` (see Committer), one `take`, `settle`, `give_back` and
    `wait` (see Settler); any calls `stats` and `wake`.
    """

    def __init__(
        self, state_dir: Path, limits: SpoolLimits, agent_id: str, clock: Clock, lock: files.Lock
    ) -> None:
        """Use `Spool.open`."""
        self.path = state_dir / files.DATABASE
        self._lock_file = lock
        self._mirror, self.opening, minor = opening.start(self.path, lock, limits, clock)
        lock.check(self.path)
        self.epoch = self._mirror.account.epoch
        self.format = f"{files.MAJOR}.{minor}"
        self._scribe = Scribe(self.epoch, agent_id)
        self._committer = committer = Committer(self._mirror, self._scribe)
        self._settler = settler = Settler(self._mirror)
        self.commit, self.alive, self.states = committer.commit, committer.alive, committer.states
        self.take, self.settle = settler.take, settler.settle
        self.give_back, self.wait = settler.give_back, settler.wait

    @classmethod
    def open(
        cls, state_dir: Path, *, limits: SpoolLimits, agent_id: str, clock: Clock | None = None
    ) -> Spool:
        """Take the folder's lock, check the file (rescue it when it is damaged) and begin a new epoch.

        Raises ConfigError (the folder can't be used), SpoolBusy (another process, named), SpoolFull (the
        disk does not take it now: try again), SpoolCorrupt (a file of an unknown major version).
        """
        prepare_state_dir(state_dir)
        lock = files.Lock(state_dir)
        path = state_dir / files.DATABASE
        try:
            return cls(state_dir, limits, agent_id, clock or Clock(), lock)
        except BaseException as error:
            lock.close()
            if isinstance(error, sqlite3.Error):
                raise files.translate(error, path) from error
            if isinstance(error, OSError):
                raise SpoolFull(f"{path} can't be made: {error.strerror}; check space and rights") from error
            if isinstance(error, files.Damaged):
                raise SpoolCorrupt(f"{path} can't be used ({error}), and no new one in its place") from error
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

    @property
    def refusal(self) -> SpoolFull | None:
        """Why the disk did not take what `alive` was given last; None when it did."""
        return self._committer.refusal

    def wake(self) -> None:
        """End a `wait` at once."""
        with self._mirror.changed:
            self._mirror.changed.notify_all()

    def stats(self) -> SpoolStats:
        """Numbers of this moment; any thread, no disk."""
        mirror = self._mirror
        now = mirror.clock().monotonic
        with mirror.memory:
            oldest = mirror.index.oldest_row()
            born = None if oldest is None else mirror.births.of(oldest)
            return SpoolStats(
                pending=mirror.index.pending,
                in_flight=mirror.index.taken,
                parked_keys=mirror.index.parked_keys,
                dead=mirror.dead,
                bytes=mirror.bytes,
                dead_bytes=mirror.dead_bytes,
                oldest_seconds=None if oldest is None else max(0.0, now - (now if born is None else born)),
                committed_sequence=mirror.account.last,
                confirmed_sequence=mirror.account.settled_through,
                unsettled=self._settler.unsettled,
                unnamed=sum(count_events(loss.ranges) for loss in mirror.losses.values()),
            )

    def close(self) -> None:
        """Settle what is left, sign off and let go of the folder; idempotent. Both threads have ended.

        Bounded also when they have not: while a commit hangs in the kernel the lock stays with this
        process, until it ends, for what hangs may still be written.
        """
        with self._mirror.changed:
            if self._mirror.closed:
                return
            self._mirror.closed = True
            self._mirror.changed.notify_all()
        self._settler.close()
        if self._committer.close():
            self._lock_file.close()
