"""What is to be done, stored before it is done: SQLite, one process, bounded."""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from virtbus.errors import ConfigError
from virtbus.integrations.base import Action
from virtbus.integrations.policy import Held

KEPT_ROWS = 200_000  # finished actions: what comes again is recognised by them, and the audit can be read

_SCHEMA = """
CREATE TABLE IF NOT EXISTS actions (
  number INTEGER PRIMARY KEY AUTOINCREMENT,
  key TEXT NOT NULL UNIQUE,
  target TEXT NOT NULL,
  topic TEXT NOT NULL,
  verb TEXT NOT NULL,
  why TEXT NOT NULL,
  body TEXT NOT NULL,
  state TEXT NOT NULL DEFAULT 'waiting',
  attempts INTEGER NOT NULL DEFAULT 0,
  stored_at REAL NOT NULL,
  ended_at REAL,
  result TEXT
);
CREATE INDEX IF NOT EXISTS waiting ON actions (number) WHERE state = 'waiting';
CREATE TABLE IF NOT EXISTS hosts (
  name TEXT PRIMARY KEY,
  held INTEGER NOT NULL DEFAULT 0,
  since REAL,
  times INTEGER NOT NULL DEFAULT 0,
  released_at REAL,
  condition TEXT
);
"""


class ActionStore:
    """The stored actions of one integration, and what it holds. Thread-safe.

    Guarantees:
    1. `add` is durable when it returns; an action's key is stored once, also over restarts;
    2. a waiting action is in `waiting` after a restart until `finish` has been told of it;
    3. one process at a time: a second one on the same file gets ConfigError.
    """

    def __init__(self, path: Path | None) -> None:
        """Open or make the file; None keeps all in memory (for a dry run)."""
        self._lock = threading.Lock()
        self._handle: int | None = None
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._handle = _claim(path.with_suffix(".lock"))
        try:
            self._db = sqlite3.connect(
                ":memory:" if path is None else path, isolation_level=None, check_same_thread=False
            )
            if path is not None:
                path.chmod(0o600)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.executescript(_SCHEMA)
            (self._finished,) = self._db.execute(
                "SELECT count(*) FROM actions WHERE state <> 'waiting'"
            ).fetchone()
        except (sqlite3.Error, OSError) as error:
            raise ConfigError(
                f"{path} can't be used: {error}; move it away (what is held will not be released)"
            ) from error

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    # ---- actions

    def add(self, actions: Sequence[Action], wall: float) -> list[tuple[int, Action]]:
        """Store them in one transaction; the new ones with their numbers."""
        with self._transaction() as db:
            return [entry for action in actions if (entry := _insert(db, action, wall)) is not None]

    def waiting(self) -> list[tuple[int, Action, int]]:
        """Number, action and attempts of all that is still to be done, oldest first."""
        with self._lock:
            rows = self._db.execute(
                "SELECT number, key, target, verb, why, body, topic, attempts FROM actions"
                " WHERE state = 'waiting' ORDER BY number"
            ).fetchall()
        return [
            (number, Action(key, target, verb, why, json.loads(body), topic), attempts)
            for number, key, target, verb, why, body, topic, attempts in rows
        ]

    def is_waiting(self, number: int) -> bool:
        """False once it was replaced by a newer one."""
        with self._lock:
            found = self._db.execute("SELECT state FROM actions WHERE number = ?", [number]).fetchone()
        return found is not None and found[0] == "waiting"

    def tried(self, number: int) -> None:
        """About to be executed: from now on nobody knows whether it had its effect, until `finish`."""
        with self._transaction() as db:
            db.execute("UPDATE actions SET attempts = attempts + 1 WHERE number = ?", [number])

    def finish(self, number: int, state: str, result: str, wall: float) -> None:
        """`state` is "done", "refused" or "replaced"."""
        with self._transaction() as db:
            db.execute(
                "UPDATE actions SET state = ?, result = ?, ended_at = ? WHERE number = ?",
                [state, result, wall, number],
            )
            self._finished += 1
            if self._finished > KEPT_ROWS:
                cut = KEPT_ROWS // 10
                db.execute(
                    "DELETE FROM actions WHERE number IN (SELECT number FROM actions"
                    " WHERE state <> 'waiting' ORDER BY number LIMIT ?)",
                    [cut],
                )
                self._finished -= cut

    # ---- hosts

    def held(self) -> dict[str, Held]:
        """The hosts that we hold, or are about to."""
        with self._lock:
            rows = self._db.execute("SELECT name, since, times FROM hosts WHERE held = 1").fetchall()
        return {name: Held(since, times) for name, since, times in rows}

    def last_hold(self, host: str) -> tuple[Held | None, float | None]:
        """How the host was last held, and when it was released."""
        with self._lock:
            row = self._db.execute(
                "SELECT since, times, released_at FROM hosts WHERE name = ? AND since IS NOT NULL", [host]
            ).fetchone()
        return (None, None) if row is None else (Held(row[0], row[1]), row[2])

    def hold(self, host: str, action: Action, times: int, wall: float) -> tuple[int, Action] | None:
        """Remember that we hold it and store the action, in one transaction."""
        with self._transaction() as db:
            db.execute(
                "INSERT INTO hosts (name, held, since, times) VALUES (?, 1, ?, ?) ON CONFLICT (name)"
                " DO UPDATE SET held = 1, since = excluded.since, times = excluded.times",
                [host, wall, times],
            )
            return _insert(db, action, wall)

    def release(self, host: str, action: Action | None, wall: float) -> tuple[int, Action] | None:
        """Remember that we no longer hold it and store the action (None: there is nothing to undo)."""
        with self._transaction() as db:
            db.execute("UPDATE hosts SET held = 0, released_at = ? WHERE name = ?", [wall, host])
            return None if action is None else _insert(db, action, wall)

    def conditions(self) -> dict[str, str]:
        """What was last stored to be shown of each host."""
        with self._lock:
            rows = self._db.execute(
                "SELECT name, condition FROM hosts WHERE condition IS NOT NULL"
            ).fetchall()
        return dict(rows)

    def show(self, entries: Sequence[tuple[str, str, Action]], wall: float) -> list[tuple[int, Action]]:
        """Host, condition and the action that shows it; in one transaction."""
        with self._transaction() as db:
            out = []
            for host, condition, action in entries:
                db.execute(
                    "INSERT INTO hosts (name, condition) VALUES (?, ?) ON CONFLICT (name)"
                    " DO UPDATE SET condition = excluded.condition",
                    [host, condition],
                )
                entry = _insert(db, action, wall)
                if entry is not None:
                    out.append(entry)
            return out

    def close(self) -> None:
        """Let go of the file and its lock."""
        with self._lock:
            self._db.close()
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None


def _insert(db: sqlite3.Connection, action: Action, wall: float) -> tuple[int, Action] | None:
    if action.topic:
        db.execute(
            "UPDATE actions SET state = 'replaced', ended_at = ? WHERE state = 'waiting' AND target = ?"
            " AND topic = ?",
            [wall, action.target, action.topic],
        )
    cursor = db.execute(
        "INSERT OR IGNORE INTO actions (key, target, topic, verb, why, body, stored_at)"
        " VALUES (?, ?, ?, ?, ?, ?, ?)",
        [action.key, action.target, action.topic, action.verb, action.why,
         json.dumps(dict(action.body), sort_keys=True), wall],
    )  # fmt: skip
    return (int(cursor.lastrowid or 0), action) if cursor.rowcount else None


def _claim(path: Path) -> int:
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.pread(handle, 32, 0).decode("ascii", "replace").strip()
        os.close(handle)
        raise ConfigError(
            f"{path}: another process{f' ({owner})' if owner else ''} runs this integration; end it first"
        ) from error
    os.ftruncate(handle, 0)
    os.pwrite(handle, str(os.getpid()).encode(), 0)
    return handle
