"""The embedded bus's file: messages, a cursor for each group, and leases, in one SQLite database.

Many processes of one host share it; nothing here knows CloudEvents. Guarantees:

1. `append` returns after the messages are on disk (WAL, synchronous=FULL), in order.
2. A message is leased to one member of a group at a time. The lease ends with the verdict, when the member's
   process is gone (its file lock goes with it, which others see within about a second), or when the member
   has not called for `LEASE_SECONDS`; then somebody gets the message again.
3. Within a group a message is not leased while an earlier one of its key is with another member.
4. The log never grows above `max_bytes`. Only what every group has settled is evicted to make room.

Verdicts are not synced one by one: a power cut can undo the last of them, and then a message comes twice.
It never undoes an append, a dead letter or a new group.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from virtbus import statefiles
from virtbus.errors import BusDenied, BusUnavailable, VirtbusError, translating

LEASE_SECONDS = 600.0
ROW_OVERHEAD_BYTES = 128
# Messages of a key that is out elsewhere are skipped so that other keys can pass; at most so many per group.
LOOK_AHEAD = 10_000

_BUSY_SECONDS = 10.0
_REAP_SECONDS = 1.0
_IDLE_SECONDS, _POLL_SECONDS = 0.2, 0.02
_EXCLUSIVE = 1 << 32  # lock bytes from here on: a group's exclusive member; below: a member
_APPLICATION_ID = 0x76627573  # "vbus"
_FORMAT = 3

_SCHEMA = """
CREATE TABLE used (bytes INTEGER NOT NULL);
INSERT INTO used VALUES (0);
CREATE TABLE messages (
    pos INTEGER PRIMARY KEY AUTOINCREMENT, -- never used twice
    key TEXT NOT NULL, content_type TEXT NOT NULL, headers TEXT NOT NULL, body BLOB NOT NULL,
    size INTEGER NOT NULL);
CREATE TABLE members (
    id INTEGER PRIMARY KEY AUTOINCREMENT,  -- and the byte of the lock file that it keeps locked
    called REAL NOT NULL);                 -- CLOCK_MONOTONIC
CREATE TABLE groups (
    id INTEGER PRIMARY KEY, name TEXT UNIQUE NOT NULL,
    cursor INTEGER NOT NULL,               -- up to here messages are settled, or stand in `pending`
    owner INTEGER REFERENCES members ON DELETE CASCADE); -- set: goes with this member
CREATE TABLE pending (
    grp INTEGER NOT NULL REFERENCES groups ON DELETE CASCADE, pos INTEGER NOT NULL, key TEXT NOT NULL,
    owner INTEGER REFERENCES members ON DELETE SET NULL, -- who holds the lease
    attempts INTEGER NOT NULL,             -- deliveries that have ended without a verdict
    reason TEXT,                           -- set: a dead letter
    PRIMARY KEY (grp, pos)) WITHOUT ROWID;
CREATE INDEX pending_key ON pending (grp, key, pos);
CREATE TRIGGER message_in AFTER INSERT ON messages BEGIN UPDATE used SET bytes = bytes + new.size; END;
CREATE TRIGGER message_out AFTER DELETE ON messages BEGIN UPDATE used SET bytes = bytes - old.size; END;
"""
_STORED = """
SELECT pos, p.key, content_type, headers, body, attempts, reason FROM pending p JOIN messages m USING (pos)
"""
_ELIGIBLE = f"""{_STORED}
WHERE grp = :group AND owner IS NULL AND reason IS NULL AND NOT EXISTS (
    SELECT 1 FROM pending e WHERE e.grp = p.grp AND e.key = p.key AND e.pos < p.pos AND e.reason IS NULL
    AND e.owner IS NOT NULL AND e.owner IS NOT :me)
ORDER BY pos LIMIT :limit
"""  # noqa: S608 - constants only
# Of what every group has settled the oldest, `?` bytes or a little more. Without a durable group nothing.
_EVICT = """
DELETE FROM messages WHERE pos IN (SELECT pos FROM (
    SELECT pos, sum(size) OVER (ORDER BY pos) - size AS before FROM messages
    WHERE pos <= (SELECT min(cursor) FROM groups) AND EXISTS (SELECT 1 FROM groups WHERE owner IS NULL)
    AND pos NOT IN (SELECT pos FROM pending)
) WHERE before < ?)
"""
_GROUPS = """
SELECT name, (SELECT count(*) FROM messages WHERE pos > cursor)
    + (SELECT count(*) FROM pending WHERE grp = groups.id AND owner IS NULL AND reason IS NULL) AS waiting
FROM groups ORDER BY waiting DESC, name
"""


class Stored(NamedTuple):
    """A message as it stands in the log; `attempts`: how often it may have been seen before."""

    pos: int
    key: str
    content_type: str
    headers: Mapping[str, str]
    body: bytes
    attempts: int = 0
    reason: str | None = None  # of a dead letter

    @classmethod
    def of_row(cls, row: Sequence[Any]) -> Stored:
        """From _STORED; ValueError when it is damaged."""
        return cls(*row)._replace(headers=json.loads(row[3]))

    @property
    def size(self) -> int:
        """What it counts towards `max_bytes`."""
        headers = sum(len(name) + len(value.encode()) for name, value in self.headers.items())
        return len(self.body) + headers + ROW_OVERHEAD_BYTES


class Log:
    """One process's door to the file. Thread-safe; not to be carried over a fork."""

    def __init__(
        self,
        path: Path,
        *,
        max_bytes: int = 64 * 1024 * 1024,
        clock: Callable[[], float] = time.monotonic,  # one clock that all processes of a host share
    ) -> None:
        """Open `path`, made when missing (0600; its folder 0700). Raises BusDenied, BusUnavailable."""
        self.path, self.max_bytes, self.clock = path, max_bytes, clock
        self._lock = threading.RLock()
        self._next_reap = 0.0
        self._db: sqlite3.Connection | None = None
        self._locks: statefiles.LockFile | None = None
        with _translated(path):
            statefiles.check(Path(f"{path}.lock"))
            statefiles.check_database(path)
            for name in (path, Path(f"{path}.lock")):
                if not name.parent.is_dir():
                    name.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                with suppress(FileExistsError):  # its final mode at once: nobody else can open it in between
                    os.close(os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            self._locks = statefiles.LockFile(Path(f"{path}.lock"))
            self._db = sqlite3.connect(
                path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            try:
                _prepare(self._db, path)
            except BaseException:
                self.close()
                raise
            self._identity = statefiles.identity(path)

    @contextmanager
    def transaction(self, *, durable: bool = False) -> Iterator[sqlite3.Connection]:
        """The write lock is taken at the start, so that two writers wait and never deadlock."""
        with self._lock, _translated(self.path):
            db = self._open()
            db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            db.execute("BEGIN IMMEDIATE")
            with db:  # commits, or rolls back
                yield db

    def append(self, messages: Sequence[Stored]) -> tuple[int, BusUnavailable | None]:
        """Store what there is room for, durably, in order: how many, and why not all. Ignores `pos`."""
        rows = [
            (
                each.key,
                each.content_type,
                json.dumps(dict(each.headers), ensure_ascii=False),
                each.body,
                each.size,
            )
            for each in messages
        ]
        with self.transaction(durable=True) as db:
            room, full = self._make_room(db, sum(row[-1] for row in rows))
            count = 0
            while count < len(rows) and rows[count][-1] <= room:
                room -= rows[count][-1]
                count += 1
            db.executemany(
                "INSERT INTO messages (key, content_type, headers, body, size) VALUES (?, ?, ?, ?, ?)",
                rows[:count],
            )
        # Somebody may have removed the file under us: then what we wrote is on no disk that lasts.
        self.check_file()
        return count, full

    def _make_room(self, db: sqlite3.Connection, need: int) -> tuple[int, BusUnavailable | None]:
        """Evict settled messages if that is needed: the bytes free then, and who holds the rest."""
        (used,) = db.execute("SELECT bytes FROM used").fetchone()
        if used + need <= self.max_bytes:
            return self.max_bytes - used, None
        self.reap(db)
        # A little more than is needed, so that a full log does not pay for this at every append.
        db.execute(_EVICT, (used + need - self.max_bytes + self.max_bytes // 32,))
        (used,) = db.execute("SELECT bytes FROM used").fetchone()
        who, waiting = db.execute(_GROUPS).fetchone() or (None, 1)
        told = f"group {who!r} has not read what is in it; start that consumer"
        if who is None:
            told = "nobody has read what is in it; start a consumer"
        elif not waiting:
            told = "all that is in it is under way or a dead letter; see virtbus dead"
        return self.max_bytes - used, BusUnavailable(
            f"embedded bus {self.path}: full ({self.max_bytes} bytes) and {told}, or stop the bus's users and"
            f" delete {self.path}* to drop it"
        )

    def reap(self, db: sqlite3.Connection, me: int | None = None) -> None:
        """Give back what members hold that are gone, or silent; looks at most once a second."""
        now = self.clock()
        if 0 < self._next_reap - now <= _REAP_SECONDS:
            return
        self._next_reap = now + _REAP_SECONDS
        for member, called in db.execute(
            "SELECT id, called FROM members WHERE id IS NOT ?", (me,)
        ).fetchall():
            gone = not self.is_locked(member)
            if gone or not 0 <= now - called <= LEASE_SECONDS:
                self.give_back(db, member, forget=gone)

    def give_back(self, db: sqlite3.Connection, member: int, *, forget: bool) -> None:
        """End a member's leases: what it holds is delivered again."""
        db.execute("UPDATE pending SET owner = NULL, attempts = attempts + 1 WHERE owner = ?", (member,))
        if forget:
            db.execute("DELETE FROM members WHERE id = ?", (member,))

    def state(self) -> tuple[int, int, Mapping[str, int]]:
        """Bytes used, messages kept, and how many wait for each group; BusUnavailable for a damaged file."""
        with self.transaction() as db:
            (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict)
            (used,) = db.execute("SELECT bytes FROM used").fetchone()
            (count,) = db.execute("SELECT count(*) FROM messages").fetchone()
            return used, count, dict(db.execute(_GROUPS).fetchall())

    def dead_letters(self, group: str, behind: int, limit: int) -> list[Stored]:
        """The oldest dead letters of a group behind a position; they stay where they are."""
        where = "WHERE reason IS NOT NULL AND grp = (SELECT id FROM groups WHERE name = ?) AND pos > ?"
        with self.transaction() as db:
            rows = db.execute(f"{_STORED} {where} ORDER BY pos LIMIT ?", (group, behind, limit)).fetchall()
            return [Stored.of_row(row) for row in rows]

    def settle_letter(self, group: str, pos: int, *, again: bool) -> None:
        """Hand a dead letter to its group `again`, as it came, in its old place; or forget it."""
        what = "UPDATE pending SET reason = NULL, attempts = 0" if again else "DELETE FROM pending"
        where = "WHERE reason IS NOT NULL AND pos = ? AND grp = (SELECT id FROM groups WHERE name = ?)"
        with self.transaction(durable=True) as db:
            db.execute(f"{what} {where}", (pos, group))

    # The kernel releases a lock with its process, whatever ends that and in whichever container it runs.
    # Locks of the open file (fcntl(2), F_OFD_SETLK): two members in one process do not share them.

    def try_lock(self, byte: int) -> bool:
        """Lock one byte of the lock file until `close`; False while somebody else has it."""
        try:
            fcntl.fcntl(self._lock_file(), fcntl.F_OFD_SETLK, _flock(byte))
        except (BlockingIOError, PermissionError):
            return False
        return True

    def is_locked(self, byte: int) -> bool:
        """Whether somebody else has locked the byte."""
        answer = fcntl.fcntl(self._lock_file(), fcntl.F_OFD_GETLK, _flock(byte))
        return bool(struct.unpack_from("h", answer)[0] != fcntl.F_UNLCK)

    def _lock_file(self) -> int:
        if self._locks is None:
            raise BusUnavailable(f"embedded bus {self.path}: closed")
        return self._locks.fd

    def version(self) -> int:
        """A number that changes when another connection has committed."""
        with self._lock, _translated(self.path):
            return int(self._open().execute("PRAGMA data_version").fetchone()[0])

    def check_file(self) -> None:
        """Raise BusUnavailable when the path no longer names the file that is open here."""
        with suppress(OSError):
            if statefiles.identity(self.path) == self._identity:
                return
        raise BusUnavailable(f"embedded bus {self.path}: the file was removed or replaced while in use")

    def _open(self) -> sqlite3.Connection:
        if self._db is None:
            raise BusUnavailable(f"embedded bus {self.path}: closed")
        return self._db

    def close(self) -> None:
        """Let go of the file and its locks; idempotent."""
        with self._lock:
            db, self._db = self._db, None
            locks, self._locks = self._locks, None
        if db is not None:
            with suppress(sqlite3.Error):
                db.close()
        if locks is not None:
            locks.close()


class Member:
    """One consumer's place in a group: what it is given, and what becomes of it. It owns its log."""

    def __init__(self, log: Log, group: str | None, *, exclusive: bool = False) -> None:
        """Join a durable group, which begins with the oldest message kept; None: all from now on, alone.

        Raises BusUnavailable, also while another exclusive member is active; BusDenied.
        """
        self._log, self._called, self._seen = log, log.clock(), -1
        with log.transaction(durable=True) as db:
            while True:
                cursor = db.execute("INSERT INTO members (called) VALUES (?)", (self._called,))
                self.id = int(cursor.lastrowid or 0)
                if log.try_lock(self.id):  # the lock of a file that was removed may still be held
                    break
            name, start, owner = group, 0, None
            if name is None:
                name, owner = f"anonymous.{self.id}", self.id
                last = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'messages'").fetchone()
                start = last[0] if last else 0
            db.execute(
                "INSERT OR IGNORE INTO groups (name, cursor, owner) VALUES (?, ?, ?)", (name, start, owner)
            )
            (self.group,) = db.execute("SELECT id FROM groups WHERE name = ?", (name,)).fetchone()
            if exclusive and not log.try_lock(_EXCLUSIVE + self.group):
                raise BusUnavailable(
                    f"embedded bus {log.path}: another consumer of {name} is active; standing by"
                )

    @contextmanager
    def _calling(self, *, durable: bool = False) -> Iterator[sqlite3.Connection]:
        """A transaction, and a sign of life."""
        with self._log.transaction(durable=durable) as db:
            now = self._log.clock()
            if not 0 <= now - self._called < LEASE_SECONDS / 10:
                self._called = now
                db.execute("UPDATE members SET called = ? WHERE id = ?", (now, self.id))
            yield db

    def lease(self, limit: int) -> list[Stored]:
        """Up to `limit` next messages, in log order within each key. Never blocks without messages."""
        with self._calling() as db:
            self._seen = self._log.version()
            self._log.reap(db, self.id)
            names = {"group": self.group, "me": self.id, "limit": limit}
            while limit > 0:
                rows = db.execute(_ELIGIBLE, names).fetchall()
                (aside,) = db.execute(
                    "SELECT count(*) FROM pending WHERE grp = ? AND owner IS NULL AND reason IS NULL",
                    (self.group,),
                ).fetchone()
                if len(rows) >= limit or aside - len(rows) >= LOOK_AHEAD or not self._advance(db, limit):
                    break
            else:
                return []
            db.executemany(
                "UPDATE pending SET owner = ? WHERE grp = ? AND pos = ?",
                [(self.id, self.group, row[0]) for row in rows],
            )
            return [Stored.of_row(row) for row in rows]

    def _advance(self, db: sqlite3.Connection, limit: int) -> bool:
        """Move the cursor over the next messages, which are pending then; False when there are none."""
        added = db.execute(
            "INSERT INTO pending SELECT :group, pos, key, NULL, 0, NULL FROM messages"
            " WHERE pos > (SELECT cursor FROM groups WHERE id = :group) ORDER BY pos LIMIT :limit",
            {"group": self.group, "limit": max(limit, 16)},
        ).rowcount
        if added > 0:
            db.execute(
                "UPDATE groups SET cursor = (SELECT max(pos) FROM pending WHERE grp = id) WHERE id = ?",
                (self.group,),
            )
        return added > 0

    def settle(self, pos: int) -> None:
        """The message is done with, also when its lease has meanwhile gone to somebody else."""
        with self._calling() as db:
            db.execute("DELETE FROM pending WHERE grp = ? AND pos = ?", (self.group, pos))

    def dead_letter(self, pos: int, reason: str) -> None:
        """Dead-letter a message, durably. It stays in the log until it is sent back or dropped."""
        with self._calling(durable=True) as db:
            db.execute(
                "UPDATE pending SET owner = NULL, reason = ? WHERE grp = ? AND pos = ?",
                (reason, self.group, pos),
            )

    def wait(self, timeout: float) -> None:
        """Until the file has changed, or for `timeout` seconds; a fifth of one at most, for leases end."""
        end = time.monotonic() + min(timeout, _IDLE_SECONDS)
        while (left := end - time.monotonic()) > 0 and self._log.version() == self._seen:
            time.sleep(min(_POLL_SECONDS, left))
        self._log.check_file()

    def leave(self) -> None:
        """Give back every lease and close the log; idempotent."""
        with suppress(BusUnavailable, BusDenied), self._log.transaction() as db:
            self._log.give_back(db, self.id, forget=True)
        self._log.close()


# ----------------------------------------------------------------------------------- the file itself


def _prepare(db: sqlite3.Connection, path: Path) -> None:
    """Make the tables in an empty file (several processes may try at once), and check any other."""
    deadline = time.monotonic() + _BUSY_SECONDS
    while db.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.executescript(
                f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA application_id = {_APPLICATION_ID};"
                f" PRAGMA user_version = {_FORMAT}; COMMIT;"
            )
        except sqlite3.OperationalError:
            # Somebody else was quicker; and SQLite does not wait for the lock of the first statement.
            if db.in_transaction:
                db.execute("ROLLBACK")
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if application != _APPLICATION_ID:
        raise BusUnavailable(
            f"embedded bus {path}: this file is not a virtbus bus; name another: embedded:///path"
        )
    if version != _FORMAT:
        raise BusUnavailable(
            f"embedded bus {path}: format {version}, this release knows {_FORMAT}; use the release that made"
            " it, or name another file: embedded:///path"
        )
    db.execute("PRAGMA foreign_keys = ON")
    db.execute("PRAGMA journal_size_limit = 4194304")


def _flock(byte: int) -> bytes:
    """A `struct flock` (fcntl(2)) that locks one byte for writing."""
    return struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)


_DENIED = (
    "can't be opened for writing ({0}); run as the user who owns the file and its folder, or name another"
    " file: embedded:///path"
)
_DAMAGED = (
    "the file is damaged or is not a bus ({0}); stop its users, move {1}* away and start again: what"
    " consumers had not read is only in the moved files"
)
_SQLITE = {
    sqlite3.SQLITE_FULL: "the disk is full; make room on it",
    sqlite3.SQLITE_BUSY: f"another process kept it locked for {_BUSY_SECONDS:g} s",
    sqlite3.SQLITE_LOCKED: f"another process kept it locked for {_BUSY_SECONDS:g} s",
    **dict.fromkeys((sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR), _DAMAGED),
    **dict.fromkeys(
        (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH), _DENIED
    ),
}


def _translated(path: Path) -> AbstractContextManager[None]:
    """Raise what SQLite and the file system say inside the block as ours, in one clear line."""

    def said(text: str, error: Exception) -> VirtbusError:
        kind = BusDenied if text is _DENIED else BusUnavailable
        return kind(f"embedded bus {path}: {text.format(' '.join(str(error).split()), path)}")

    def of_sqlite(error: sqlite3.Error) -> VirtbusError:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
        return said(_SQLITE.get(code, "{0}; see the kernel log for disk errors"), error)

    return translating(
        {
            sqlite3.Error: of_sqlite,
            ValueError: lambda error: said(_DAMAGED, error),
            statefiles.NotRegular: lambda error: BusDenied(
                f"embedded bus {path}: {error.strerror}, or name another file: embedded:///path"
            ),
            PermissionError: lambda error: said(_DENIED, error),
            OSError: lambda error: said("can't be made: {0}; name another file", error),
        }
    )
