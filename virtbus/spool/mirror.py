"""What the two sides of the spool share: one file, one memory, and the locks between them."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from virtbus.model import Clock
from virtbus.spool import files
from virtbus.spool.contents import Births
from virtbus.spool.opening import Start
from virtbus.telemetry import Trouble, emit

_READ_SIZES = (1, 8, 64, 256)  # rows a SELECT, so that few statements are cached


@dataclass(frozen=True, slots=True)
class SpoolLimits:
    """The spool's bounds. `max_age_seconds` counts time that passed, whatever a clock says."""

    max_bytes: int = 256 << 20
    max_age_seconds: float | None = None


class SharedState:
    """The file, the memory that mirrors it, and two locks, taken in this order: `writing`, `memory`."""

    def __init__(self, path: Path, limits: SpoolLimits, clock: Clock, start: Start, lock: files.Lock) -> None:
        """Of a run that has begun."""
        self.path = path
        self.lock = lock
        self.limits = limits
        self.clock = clock
        # Orders writing transactions; held while the disk syncs.
        self.writing = threading.Lock()
        # Guards everything below; held for microseconds only.
        self.memory = threading.Lock()
        self.changed = threading.Condition(self.memory)
        found = start.found
        self.account = start.account
        self.accounts = found.accounts
        self.index = found.index
        self.births = Births()
        now = clock()
        for position, created_ns in found.births:
            age = max(0.0, (now.wall_ns - created_ns) / 1e9)
            self.births.add(position, now.monotonic - age)
        self.bytes, self.dead, self.dead_bytes = found.bytes, found.dead, found.dead_bytes
        self.next_position = found.next_position
        self.losses = list(found.losses)
        self.reader_stale = False  # after a failure what the publisher holds may be another file
        self.closed = False

    def connect(self, sync: str) -> sqlite3.Connection:
        """A connection for one side; `sync` is PRAGMA synchronous."""
        connection = files.connect(self.path, sync=sync)
        connection.text_factory = files.decode_text
        pages = max(2 * self.limits.max_bytes // 4096, 1024)
        connection.execute(f"PRAGMA max_page_count={pages}").fetchall()
        return connection

    def check(self) -> None:
        """Raise what SQLite would raise when the file can't be written, or is not ours any more."""
        self.lock.check(self.path)
        files.check_writable(self.path)

    def begin(self, db: sqlite3.Connection) -> None:
        """Begin a writing transaction. Raises NotOurs: then nobody may commit it."""
        db.execute("BEGIN IMMEDIATE")
        self.lock.check(self.path)
        files.check_alone(db, self.account.run)

    def next_loss(self) -> int:
        """The number of the next loss; the caller holds `writing`."""
        return max((loss.number for loss in self.losses), default=0) + 1

    def suspect(self) -> None:
        """Leave word for the next start that SQLite found damage, which its check may not find again."""
        try:
            self.path.with_name(self.path.name + ".suspect").touch()
        except OSError as error:
            emit(Trouble("marking the spool as damaged", error))


def select_events(db: sqlite3.Connection, columns: str, rows: Sequence[int]) -> list[Any]:
    """Rows of table events by position, ascending, with few different statements."""
    ours = db.text_factory
    db.text_factory = str  # SQLite's own, a fifth faster; it raises for text that damage made no UTF-8
    try:
        return _select_events(db, columns, rows)
    except sqlite3.OperationalError as error:
        if hasattr(error, "sqlite_errorcode"):
            raise
        db.text_factory = ours
        return _select_events(db, columns, rows)
    finally:
        db.text_factory = ours


def _select_events(db: sqlite3.Connection, columns: str, rows: Sequence[int]) -> list[Any]:
    found: list[Any] = []
    at = 0
    while at < len(rows):
        size = next((each for each in _READ_SIZES if each >= len(rows) - at), _READ_SIZES[-1])
        part = list(rows[at : at + size])
        at += len(part)
        part += part[-1:] * (size - len(part))
        marks = ",".join("?" * size)
        sql = f"SELECT {columns} FROM events WHERE position IN ({marks}) ORDER BY position"  # noqa: S608
        found += db.execute(sql, part).fetchall()
    return found


def whole_events(db: sqlite3.Connection, rows: Sequence[int]) -> list[Any]:
    """Rows of table events, all columns; without those that are not what was written: `take` finds them."""
    columns = ",".join(files.EVENT)
    return [row for row in select_events(db, columns, rows) if files.is_whole("events", row)]
