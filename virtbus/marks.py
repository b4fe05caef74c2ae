"""What a consumer group remembers over a restart: which events had their effect, and how far it has read.

One SQLite file, one process at a time. Everything in it belongs to a scope, which is a group on a bus: two
groups that are given the same file never take each other's marks for their own.

    seen      (scope, source, id)                the effect of this event is done
    run       (scope, source, epoch) → state     the sequence check's baseline (virtbus.sequences)
    note      (scope, name) → value              a bus's own: how far it read each Kafka partition
"""

from __future__ import annotations

import sqlite3
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
        self._identity: tuple[int, int] | None = None
        self._lock: statefiles.LockFile | None = None
        self._count = self._scope = 0
        if path is not None:
            self._open(path)

    def _open(self, path: Path) -> None:
        try:
            if not path.parent.is_dir():
                raise ConfigError(f"dedupe file {path}: there is no folder {path.parent}; create it")
            statefiles.check_database(path)
            self._lock = statefiles.claim(path.with_name(f"{path.name}.lock"))
        except statefiles.NotRegular as error:
            raise ConfigError(f"dedupe file {path}: {error.strerror}, or name another") from error
        except statefiles.Claimed as holder:
            raise ConfigError(
                f"dedupe file {path} is in use by process {holder}: give each consumer a file of its own"
            ) from None
        except (OSError, ValueError) as error:  # not a file's name: longer than one, or with a NUL
            raise self._unusable(error) from error
        try:
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
            self._identity = statefiles.identity(path)
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
            raise self._unusable(error) from error
        except ConfigError:
            self._let_go()
            raise

    def _unusable(self, error: Exception) -> ConfigError:
        then = "name a file of this consumer's own, or remove it"
        return ConfigError(f"dedupe file {self._path} can't be used: {error}; {then}")

    def _file(self) -> sqlite3.Connection | None:
        """The database, if there is one; a file that was removed or replaced under us is opened again.

        SQLite would go on with the removed one, and no restart would find what it says is on disk.
        """
        path = self._path
        if path is None:
            return None
        with suppress(OSError):  # gone, or out of reach
            if self._database is not None and statefiles.identity(path) == self._identity:
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
        lock, self._lock = self._lock, None
        if lock is not None:
            lock.close()

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
