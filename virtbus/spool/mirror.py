"""What the spool's two threads share: one file, the memory that mirrors it, and the locks between them."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from virtbus.config import SpoolLimits
from virtbus.model import Clock
from virtbus.spool import files
from virtbus.spool.files import EventRow, NotOurs
from virtbus.spool.index import Births, Index
from virtbus.spool.missing import Account, Missing, put_loss
from virtbus.telemetry import Trouble, emit


class Mirror:
    """The one owner of what is counted: pending rows, bytes, dead letters, losses and accounts.

    Two locks, taken in this order: `writing`, `memory`.
    """

    def __init__(self, path: Path, lock: files.Lock, limits: SpoolLimits, clock: Clock) -> None:
        """Empty; `opening` fills it from the file."""
        self.path, self.lock, self.limits, self.clock = path, lock, limits, clock
        # Orders writing transactions; held while the disk syncs.
        self.writing = threading.Lock()
        # Guards everything below; held for microseconds only.
        self.memory = threading.Lock()
        self.changed = threading.Condition(self.memory)
        self.account = Account(0, "", 0, 0)  # this run's
        # How much older than its `alive_ns` a stamp can be of what came later: the clock was set forward, ns.
        self.earlier_ns = 0
        self.accounts: dict[str, Account] = {}  # by epoch
        self.index = Index()
        self.births = Births()
        self.bytes = self.dead = self.dead_bytes = 0
        self.next_position = 1
        self.losses: dict[int, Missing] = {}  # what no gap event names yet, by its row in the file
        self.connections: list[Connection] = []
        self.closed = False

    def add(self, row: EventRow, born: float) -> None:
        """A row is in the file. The caller holds `memory`, as for all that follows."""
        self.index.add(row.position, row.key, row.rank)
        self.births.add(row.position, born)
        self.bytes += row.size
        self.next_position = max(self.next_position, row.position + 1)

    def remove(self, rows: Iterable[EventRow]) -> None:
        """Rows are in the file no longer."""
        for row in rows:
            self.index.remove(row.position, row.key)
            self.bytes -= row.size

    def bury(self, size: int, count: int = 1) -> None:
        """Dead letters were added or, with a count below 0, removed."""
        self.dead += count
        self.dead_bytes += size

    def add_losses(self, losses: Iterable[Missing], db: sqlite3.Connection) -> dict[int, Missing]:
        """Write losses, a range each, into the caller's transaction; what to add to `losses` after it."""
        number = max(self.losses, default=0)
        added = {number + at: loss for at, loss in enumerate(losses, 1)}
        for number, loss in added.items():
            put_loss(db, number, loss)
        return added

    def check(self) -> None:
        """Raise what SQLite would raise when the file can't be written, or is not ours any more."""
        self.lock.check(self.path)
        files.check_writable(self.path)

    def begin(self, db: sqlite3.Connection) -> None:
        """Begin a writing transaction. Raises NotOurs: then nobody may commit it."""
        db.execute("BEGIN IMMEDIATE")
        self.lock.check(self.path)
        (last,) = db.execute("SELECT max(run) FROM runs").fetchone()
        if last is not None and last > self.account.run:
            # Its process has read the file: what we wrote now would be overwritten or never be seen.
            raise NotOurs("another agent has begun to write here")


class Connection:
    """One thread's connection to the file: transactions of ours alone, and a new one after a failure."""

    def __init__(self, mirror: Mirror, sync: str) -> None:
        """`sync` is PRAGMA synchronous."""
        self._mirror, self._sync = mirror, sync
        self.error: BaseException | None = None  # since which it can't be trusted
        self.db = self._connect()
        mirror.connections.append(self)

    def _connect(self) -> sqlite3.Connection:
        db = files.connect(self._mirror.path, sync=self._sync)
        pages = max(2 * self._mirror.limits.max_bytes // 4096, 1024)
        db.execute(f"PRAGMA max_page_count={pages}").fetchall()
        return db

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A writing transaction: on any error nothing of it stays. The caller holds `writing`."""
        try:
            self._mirror.begin(self.db)
            yield self.db
            self.db.execute("COMMIT")
        except BaseException as error:
            failed = isinstance(error, sqlite3.Error) and not isinstance(error, NotOurs)
            try:
                if self.db.in_transaction:
                    files.check_writable(self._mirror.path)
                    self.db.execute("ROLLBACK")
            except sqlite3.Error:
                failed = True  # and closing it rolls back
            if failed:
                self.failed(error)
            raise

    def failed(self, error: BaseException) -> None:
        """Reconnect before the next use. Damage leaves a marker file: a later check may not find it again."""
        self.error = error
        if isinstance(error, sqlite3.Error) and files.is_damage(error):
            try:
                self._mirror.path.with_name(self._mirror.path.name + ".suspect").touch()
            except OSError as refusal:
                emit(Trouble("marking the spool as damaged", refusal))

    def refresh(self) -> BaseException | None:
        """Before each use: raise what SQLite would raise; reconnect after a failure, and return that one."""
        self._mirror.check()
        error, self.error = self.error, None
        if error is not None:
            try:
                self.db.close()
            except sqlite3.Error as trouble:
                emit(Trouble("closing the spool after a failure", trouble))
            try:
                self.db = self._connect()
            except BaseException:
                self.error = error
                raise
        return error

    def close(self) -> None:
        """Let go of the file."""
        try:
            files.close(self.db, self._mirror.path)
        except sqlite3.Error:
            return  # left to the end of the process
