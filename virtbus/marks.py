"""What a consumer group remembers over a restart: which events had their effect, and how far it has read.

One SQLite file, one process at a time. Everything in it belongs to a scope, which is a group on a bus: two
groups that are given the same file never take each other's marks for their own.

    seen      (scope, source, id)                the effect of this event is done
    run       (scope, source, epoch) → state     the sequence check's baseline (virtbus.sequences)
    note      (scope, name) → value              a bus's own: how far it read each Kafka partition
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from virtbus import statefiles
from virtbus.errors import ConfigError, DedupeUnavailable, translating
from virtbus.telemetry import TelemetryEvent, emit

Mark = tuple[str, str]
"""(source, id) of an event."""

_FORMAT = 1  # PRAGMA user_version
_RECENT = 10_000  # marks kept in memory
_NAMES = {"scope", "seen", "run", "note"}
_TABLES = f"""
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS scope (number INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS seen (number INTEGER PRIMARY KEY AUTOINCREMENT, scope INTEGER NOT NULL,
  source TEXT NOT NULL, id TEXT NOT NULL, UNIQUE (scope, source, id));
CREATE TABLE IF NOT EXISTS run (number INTEGER PRIMARY KEY, scope INTEGER NOT NULL,
  source TEXT NOT NULL, epoch TEXT NOT NULL, state TEXT NOT NULL, UNIQUE (scope, source, epoch));
CREATE TABLE IF NOT EXISTS note (scope INTEGER NOT NULL, name TEXT NOT NULL, value TEXT NOT NULL,
  PRIMARY KEY (scope, name)) WITHOUT ROWID;
PRAGMA user_version = {_FORMAT};
COMMIT;
"""


class DedupeFileReplaced(TelemetryEvent, level="warning"):
    """the dedupe file was removed or replaced under its consumer and is made again; older marks are lost"""

    file: str
    marks_kept: int


class Marks:
    """The marks of one scope: bounded, the oldest are evicted; on disk when there is a path.

    Guarantee: `write` returns when all that it was given is on disk, or raises and has written none of it.
    """

    def __init__(self, path: Path | None, scope: str, rows: int) -> None:
        """`scope` names bus and group, `rows` bounds its marks.

        Raises ConfigError when the file can't be used, or another consumer uses it.
        """
        self._path, self._rows, self._name = path, rows, scope
        self._recent: OrderedDict[Mark, None] = OrderedDict()
        self._database: sqlite3.Connection | None = None
        self._inode: tuple[int, int] | None = None
        self._lock = -1
        self._count = self._scope = 0
        if path is not None:
            self._open(path)
            _LOCKED.add(self)

    def _open(self, path: Path) -> None:
        if not path.parent.is_dir():
            raise ConfigError(f"dedupe file {path}: there is no folder {path.parent}; create it")
        try:
            statefiles.check(_lock_path(path))
            statefiles.check_database(path)
        except statefiles.NotRegular as error:
            raise ConfigError(f"dedupe file {path}: {error.strerror}, or name another") from error
        try:
            self._lock = _lock(path)
            self._database = database = sqlite3.connect(
                path, isolation_level=None, timeout=5.0, check_same_thread=False
            )
            (version,) = database.execute("PRAGMA user_version").fetchone()
            found = database.execute("SELECT tbl_name FROM sqlite_schema WHERE tbl_name NOT LIKE 'sqlite_%'")
            tables = {name for (name,) in found}
            if tables and (version, tables) != (_FORMAT, _NAMES):
                raise ConfigError(
                    f"dedupe file {path} was made by another release or program; remove it, or name another"
                )
            path.chmod(0o600)
            self._inode = _inode(path)
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")
            database.executescript(_TABLES)
            name = [self._name]
            database.execute("INSERT OR IGNORE INTO scope (name) VALUES (?)", name)
            (self._scope,) = database.execute("SELECT number FROM scope WHERE name = ?", name).fetchone()
            own = "SELECT count(*) FROM seen WHERE scope = ?"
            (self._count,) = database.execute(own, [self._scope]).fetchone()
        except (sqlite3.Error, OSError) as error:
            self._let_go()
            raise ConfigError(
                f"dedupe file {path} can't be used: {error}; name a file of this consumer's own, or remove it"
            ) from error
        except ConfigError:
            self._let_go()
            raise

    def _file(self) -> sqlite3.Connection | None:
        """The database, if there is one; a file that was removed or replaced under us is opened again.

        SQLite would go on with the removed one, and no restart would find what it says is on disk.
        """
        path = self._path
        if path is None or (self._database is not None and _inode(path) == self._inode):
            return self._database
        self._let_go()
        try:
            self._open(path)
        except ConfigError as error:
            raise DedupeUnavailable(str(error)) from error
        database = self._database
        assert database is not None
        emit(DedupeFileReplaced(str(path), len(self._recent)))
        with self._translated(), database:
            database.execute("BEGIN IMMEDIATE")
            count = self._write(database, list(self._recent), (), {})
        self._count = count
        return database

    def has(self, mark: Mark) -> bool:
        """Whether the effect of this event is done."""
        if mark in self._recent:
            return True
        database = self._file()
        if database is None:
            return False
        with self._translated():
            found = database.execute(
                "SELECT 1 FROM seen WHERE scope = ? AND source = ? AND id = ?", (self._scope, *mark)
            ).fetchone()
        return found is not None

    def runs(self) -> list[tuple[str, str, str]]:
        """(source, epoch, state) of each run, as they were first written."""
        return self._all("SELECT source, epoch, state FROM run WHERE scope = ? ORDER BY number")

    def notes(self) -> dict[str, str]:
        """What the bus kept, by name."""
        return dict(self._all("SELECT name, value FROM note WHERE scope = ?"))

    def write(
        self,
        marks: Sequence[Mark],
        runs: Iterable[tuple[str, str, str | None]] = (),
        notes: Mapping[str, str] | None = None,
    ) -> None:
        """Add marks, and set states of runs (None: forget it) and notes; all in one synced transaction."""
        for mark in marks:
            self._recent[mark] = None
        while len(self._recent) > min(self._rows, _RECENT):
            self._recent.popitem(last=False)
        database = self._file()
        if database is not None:
            with self._translated(), database:  # commits, or rolls back
                database.execute("BEGIN IMMEDIATE")
                count = self._write(database, marks, runs, notes or {})
            self._count = count

    def close(self) -> None:
        """Let go of the file, for good."""
        self._path = None
        self._let_go()

    def _let_go(self) -> None:
        database, self._database = self._database, None
        if database is not None:
            with suppress(sqlite3.Error):
                database.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    # ---- within

    def _write(
        self,
        database: sqlite3.Connection,
        marks: Sequence[Mark],
        runs: Iterable[tuple[str, str, str | None]],
        notes: Mapping[str, str],
    ) -> int:
        """How many marks there are now."""
        scope = self._scope
        added = database.executemany(
            "INSERT OR IGNORE INTO seen (scope, source, id) VALUES (?, ?, ?)",
            [(scope, *mark) for mark in marks],
        )
        count = self._count + max(0, added.rowcount)
        if count > self._rows:
            # A tenth at a time, so that the bound costs little.
            over = count - self._rows + self._rows // 10
            database.execute(
                "DELETE FROM seen WHERE number IN "
                "(SELECT number FROM seen WHERE scope = ? ORDER BY number LIMIT ?)",
                [scope, over],
            )
            count -= over
        for source, epoch, state in runs:
            run = (scope, source, epoch)
            if state is None:
                database.execute("DELETE FROM run WHERE scope = ? AND source = ? AND epoch = ?", run)
                continue
            database.execute(
                "INSERT INTO run (scope, source, epoch, state) VALUES (?, ?, ?, ?) "
                "ON CONFLICT (scope, source, epoch) DO UPDATE SET state = excluded.state",
                (*run, state),
            )
        database.executemany(
            "INSERT OR REPLACE INTO note (scope, name, value) VALUES (?, ?, ?)",
            [(scope, name, value) for name, value in notes.items()],
        )
        return count

    def _all(self, query: str) -> list[Any]:
        if self._database is None:
            return []
        with self._translated():
            return self._database.execute(query, [self._scope]).fetchall()

    def _translated(self) -> AbstractContextManager[None]:
        def told(error: sqlite3.Error) -> DedupeUnavailable:
            damaged = getattr(error, "sqlite_errorcode", 0) & 0xFF in (
                sqlite3.SQLITE_CORRUPT,
                sqlite3.SQLITE_NOTADB,
            )
            advice = (
                "it is damaged: move it away, then call again"
                if damaged
                else "make room on its disk and let no other process use it, then call again"
            )
            return DedupeUnavailable(
                f"dedupe file {self._path} can't be used now: {error}; what is not in it is not "
                f"acknowledged yet: {advice}"
            )

        return translating({sqlite3.Error: told})


_LOCKED: weakref.WeakSet[Marks] = weakref.WeakSet()


def _in_forked_child() -> None:
    """A lock is its file's: a child that keeps it open would keep the file from whoever comes after us."""
    for marks in _LOCKED:
        if marks._lock >= 0:
            os.close(marks._lock)
            marks._lock = -1


os.register_at_fork(after_in_child=_in_forked_child)


def _inode(path: Path) -> tuple[int, int] | None:
    """Which file stands there; None: none, or one that can't be reached."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _lock_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _lock(path: Path) -> int:
    """A lock beside the file, for as long as it stays open; ConfigError while another consumer has it."""
    lock = os.open(_lock_path(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(lock, 20, 0).decode(errors="replace").strip()
        os.close(lock)
        raise ConfigError(
            f"dedupe file {path} is in use by process {holder or '(unknown)'}: "
            "give each consumer a file of its own"
        ) from None
    with suppress(OSError):  # no room: it is only told to others
        os.ftruncate(lock, 0)
        os.pwrite(lock, b"%d\n" % os.getpid(), 0)
    return lock
