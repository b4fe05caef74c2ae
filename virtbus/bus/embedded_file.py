"""The embedded bus's file itself: its tables, how it is opened, what its errors mean, and whose clock counts.

`embedded_log` says what the tables are for. A file that is not ours, or of a later release, is never
touched.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from virtbus.errors import BusDenied, BusUnavailable

BUSY_SECONDS = 10.0

_APPLICATION_ID = 0x76627573  # "vbus"
_FORMAT = 1

_SCHEMA = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
INSERT INTO meta VALUES ('bytes', 0), ('boot', '');
CREATE TABLE messages (
    pos INTEGER PRIMARY KEY AUTOINCREMENT, -- never used twice
    exchange TEXT NOT NULL, routing_key TEXT NOT NULL,
    queue TEXT,                            -- set: for this queue alone, and gone when it is settled
    key TEXT NOT NULL, content_type TEXT, content_encoding TEXT,
    headers TEXT NOT NULL, properties TEXT NOT NULL, body BLOB NOT NULL, size INTEGER NOT NULL);
CREATE INDEX messages_queue ON messages (queue, pos) WHERE queue IS NOT NULL;
CREATE TABLE queues (
    name TEXT PRIMARY KEY,
    start INTEGER NOT NULL,                -- it has a claim to what stands behind this position
    cursor INTEGER NOT NULL,               -- up to here messages are settled, or stand in `pending`
    owner TEXT) WITHOUT ROWID;             -- set: temporary, goes with its owner
CREATE TABLE bindings (
    queue TEXT NOT NULL, exchange TEXT NOT NULL, pattern TEXT NOT NULL,
    PRIMARY KEY (queue, exchange, pattern)) WITHOUT ROWID;
CREATE TABLE pending (
    queue TEXT NOT NULL, pos INTEGER NOT NULL, key TEXT NOT NULL,
    owner TEXT,                            -- who holds the lease
    due REAL NOT NULL,                     -- not handed out before (CLOCK_BOOTTIME)
    deliveries INTEGER NOT NULL,
    PRIMARY KEY (queue, pos)) WITHOUT ROWID;
CREATE INDEX pending_key ON pending (queue, key, pos);
CREATE TABLE owners (
    id TEXT PRIMARY KEY, pid INTEGER NOT NULL, started TEXT NOT NULL, namespace TEXT NOT NULL,
    deadline REAL NOT NULL) WITHOUT ROWID; -- leases end here (CLOCK_BOOTTIME) unless renewed
"""


def open_file(path: Path) -> sqlite3.Connection:
    """Open the file for writing, and make it when it is missing (0600; its folder 0700).

    Raises BusDenied when that is not permitted, BusUnavailable when the file is damaged or is not ours.
    """
    try:
        _make_file(path)
    except PermissionError as error:
        raise denied(path, str(error)) from error
    except OSError as error:
        raise BusUnavailable(f"embedded bus {path}: can't be made: {error}; name another file") from error
    with translated(path):
        db = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            if _is_empty(db):
                _create(db)
            check_format(db, path)
            db.execute("PRAGMA journal_size_limit = 4194304")
        except BaseException:
            db.close()
            raise
    return db


def read_only(path: Path) -> sqlite3.Connection:
    """The file for looking only; it is not made when it is missing."""
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=BUSY_SECONDS, isolation_level=None
    )


def check_format(db: sqlite3.Connection, path: Path) -> None:
    """Raise BusUnavailable unless the file is a bus of this release."""
    (application,) = db.execute("PRAGMA application_id").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if application != _APPLICATION_ID:
        raise BusUnavailable(
            f"embedded bus {path}: this file is no virtbus bus; name another: embedded:///path"
        )
    if version != _FORMAT:
        raise BusUnavailable(
            f"embedded bus {path}: format {version}, this release knows {_FORMAT}; use the release that made"
            f" it, or name another file: embedded:///path"
        )


def identity(path: Path) -> tuple[int, int] | None:
    """What file the path names now: (device, inode), or None."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _is_empty(db: sqlite3.Connection) -> bool:
    return bool(db.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,))


def _make_file(path: Path) -> None:
    """An empty file with its final mode, so that nobody else can open it in between."""
    if not path.parent.is_dir():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


def _create(db: sqlite3.Connection) -> None:
    """Make the tables in an empty file; several processes may try at once."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            db.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError:
            # SQLite does not wait for this one lock by itself.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    db.execute("BEGIN IMMEDIATE")
    try:
        if _is_empty(db):
            for statement in _SCHEMA.split(";"):
                db.execute(statement)
            db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            db.execute(f"PRAGMA user_version = {_FORMAT}")
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


# ------------------------------------------------------------------------------------------ errors


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """Raise what SQLite says inside the block as BusUnavailable or BusDenied, in one clear line."""
    try:
        yield
    except sqlite3.Error as error:
        raise _translate(error, path) from error


def _translate(error: sqlite3.Error, path: Path) -> BusUnavailable | BusDenied:
    """One clear line for what SQLite said about `path`."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return BusUnavailable(f"embedded bus {path}: the disk is full; make room on it")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return BusUnavailable(f"embedded bus {path}: another process kept it locked for {BUSY_SECONDS:g} s")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return damaged(path, str(error))
    if code in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH):
        return denied(path, str(error))
    return BusUnavailable(f"embedded bus {path}: {error}; see the kernel log for disk errors")


def damaged(path: Path, why: str) -> BusUnavailable:
    """The error of a file that SQLite can't read."""
    return BusUnavailable(
        f"embedded bus {path}: the file is damaged or is no bus ({' '.join(why.split())}); stop its users,"
        f" move {path}* away and start again: what consumers had not read is only in the moved files"
    )


def denied(path: Path, why: str) -> BusDenied:
    """The error of a file that we may not use."""
    return BusDenied(
        f"embedded bus {path}: can't be opened for writing ({why}); run as the user who owns the file and"
        f" its folder, or name another file: embedded:///path"
    )


# ---------------------------------------------------------------------------- processes and clocks


def boottime() -> float:
    """Seconds since boot, also those in suspend: the one clock that all processes of a host share."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def boot_id() -> str:
    """The kernel's id of this boot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return "unknown"


def pid_namespace() -> str:
    """Where this process's pid means something."""
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return "unknown"


def started_at(pid: int) -> str | None:
    """When a process started, in ticks (proc(5), stat field 22); None when it is gone or a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X", "x") else fields[19]
