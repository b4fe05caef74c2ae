"""The spool's file: its schema and versions, its checksums, its lock, and how SQLite is opened.

A checksum of ours covers what a row holds, because a flipped bit can pass SQLite's own check: SHA-256 cut to
16 bytes over the values as MessagePack, which tells types and lengths apart. No damage passes it by chance.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import re
import sqlite3
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from virtbus import redaction, statefiles
from virtbus.errors import ConfigError, SpoolBusy, SpoolCorrupt, SpoolFull, VirtbusError

DATABASE = "spool.db"
LOCK = "lock"
AGENT_ID = "agent-id"

# PRAGMA user_version is major * 1000 + minor. A minor step only adds (a nullable column, a table), so
# the release before it still reads and writes the file; a major step would be a file of another name.
MAJOR = 1
APPLICATION_ID = 0x76627573  # "vbus", for file(1)

_EVENT_COLUMNS = """position INTEGER PRIMARY KEY, epoch TEXT NOT NULL, seq INTEGER NOT NULL,
        id TEXT NOT NULL, key TEXT NOT NULL, class INTEGER NOT NULL, count INTEGER NOT NULL,
        bytes INTEGER NOT NULL, created_ns INTEGER NOT NULL, attempts INTEGER NOT NULL DEFAULT 0,
        checksum BLOB NOT NULL, names TEXT, attributes TEXT NOT NULL, body BLOB NOT NULL"""
# One step a minor version: MIGRATIONS[n] leads to version MAJOR.n. The first is the whole schema.
MIGRATIONS: tuple[str, ...] = (
    f"""
    CREATE TABLE meta (name TEXT PRIMARY KEY NOT NULL, value TEXT NOT NULL, checksum BLOB NOT NULL)
        WITHOUT ROWID;
    CREATE TABLE runs (run INTEGER PRIMARY KEY, epoch TEXT NOT NULL, started_ns INTEGER NOT NULL,
        alive_ns INTEGER NOT NULL, last INTEGER NOT NULL, below INTEGER NOT NULL, checksum BLOB NOT NULL);
    CREATE TABLE accounts (slot INTEGER PRIMARY KEY, settled BLOB NOT NULL, checksum BLOB NOT NULL);
    CREATE TABLE events ({_EVENT_COLUMNS});
    CREATE TABLE dead ({_EVENT_COLUMNS}, why TEXT NOT NULL, error TEXT NOT NULL, died_ns INTEGER NOT NULL);
    CREATE TABLE losses (number INTEGER PRIMARY KEY, epoch TEXT NOT NULL, first INTEGER NOT NULL,
        last INTEGER NOT NULL, reason TEXT NOT NULL, occurrences INTEGER NOT NULL,
        started_ns INTEGER, detail TEXT, checksum BLOB NOT NULL);
    CREATE TABLE states (name TEXT PRIMARY KEY NOT NULL, value BLOB NOT NULL, checksum BLOB NOT NULL)
        WITHOUT ROWID;
    CREATE TABLE requests (number INTEGER PRIMARY KEY, action TEXT NOT NULL, position INTEGER NOT NULL,
        epoch TEXT NOT NULL, seq INTEGER NOT NULL);
    """,
)

# The columns this release needs; a later minor version may have more. The first one is the key.
COLUMNS: dict[str, tuple[str, ...]] = {
    table: tuple(column.split()[0] for column in columns.split(","))
    for table, columns in re.findall(r"CREATE TABLE (\w+) \(([^;]*)\)", MIGRATIONS[0])
}
EVENT = COLUMNS["events"]
INSERT = {
    table: f"INSERT OR REPLACE INTO {table} ({','.join(columns)}) VALUES ({','.join('?' * len(columns))})"  # noqa: S608 - our own names
    for table, columns in COLUMNS.items()
}
# Columns a checksum leaves out: `position` is only where a row lies, `attempts` only counts tries, and
# why, error and died_ns are for people.
_NOT_SEALED = frozenset({"position", "number", "attempts", "checksum", "why", "error", "died_ns"})
_CHECKSUM_AT = {table: each.index("checksum") for table, each in COLUMNS.items() if "checksum" in each}
_sealed_of: dict[str, itemgetter[Any]] = {
    table: itemgetter(*(at for at, name in enumerate(columns) if name not in _NOT_SEALED))
    for table, columns in COLUMNS.items()
    if table in _CHECKSUM_AT
}
SqlValue = int | str | bytes | None
_pack = msgspec.msgpack.Encoder().encode


class EventRow(NamedTuple):
    """A row of table events; of table dead the first columns."""

    position: int
    epoch: str
    seq: int
    id: str
    key: str  # the partition key
    rank: int  # its class: lower is evicted earlier
    occurrences: int  # errors that it alone accounts for
    size: int  # bytes on the disk
    created_ns: int
    attempts: int
    checksum: bytes
    names: str | None  # of a gap event: `missing.Missing`
    attributes: str
    body: bytes


def seal(values: Sequence[SqlValue]) -> bytes:
    """The checksum of values; their types and lengths are part of it.

    Raises ValueError for text that is not Unicode (what `decode_text` makes of damage).
    """
    return sha256(_pack(values)).digest()[:16]


def checksum(table: str, values: Sequence[SqlValue]) -> bytes:
    """The checksum of a row; where it is the last column it may be left out of `values`."""
    return seal(_sealed_of[table](values))


def put(db: sqlite3.Connection, table: str, *values: SqlValue) -> None:
    """Write a row (all columns but the checksum, which is the last one), or replace it."""
    db.execute(INSERT[table], (*values, checksum(table, values)))


def is_whole(table: str, values: Sequence[SqlValue]) -> bool:
    """Whether a row that was read is the row that was written."""
    try:
        return table not in _CHECKSUM_AT or values[_CHECKSUM_AT[table]] == checksum(table, values)
    except ValueError:
        return False


def select(table: str, tail: str = "") -> str:
    """SELECT of all columns that this release knows."""
    return f"SELECT {','.join(COLUMNS[table])} FROM {table} {tail}"  # noqa: S608 - our own names


def read_events(db: sqlite3.Connection, positions: Sequence[int]) -> list[EventRow]:
    """Rows of table events, ascending; whole or not."""
    sql = select("events", f"WHERE position IN ({','.join('?' * len(positions))}) ORDER BY position")
    return [tuple.__new__(EventRow, row) for row in db.execute(sql, positions)]  # half of what _make takes


def whole_events(db: sqlite3.Connection, positions: Sequence[int]) -> list[EventRow]:
    """Those that are what was written; the others are found when they are taken."""
    return [row for row in read_events(db, positions) if is_whole("events", row)]


# ------------------------------------------------------------------------------- folder and lock


def prepare_state_dir(state_dir: Path) -> None:
    """Make the folder (0700) when it is not there.

    Raises ConfigError when it can't be used, SpoolFull for what is not a file and has a file's name.
    """
    try:
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"state_dir {state_dir} can't be made: {error.strerror}; make it, or set --state-dir"
        ) from error
    read_only = os.statvfs(state_dir).f_flag & os.ST_RDONLY  # reported later, by who writes
    if not os.access(state_dir, os.R_OK | os.W_OK | os.X_OK) and not read_only:
        raise ConfigError(
            f"state_dir {state_dir} can't be written by uid {os.geteuid()}; "
            "change its owner, or set --state-dir"
        )
    database = state_dir / DATABASE
    draft, marker, probe = (database.with_name(database.name + end) for end in (".new", ".suspect", ".probe"))
    try:
        statefiles.check(state_dir / LOCK, state_dir / AGENT_ID, marker, probe)
        for each in (database, draft):
            statefiles.check_database(each)
    except statefiles.NotRegular as error:
        raise SpoolFull(f"state_dir {state_dir} can't be used: {error.strerror}") from error


@dataclass(frozen=True, slots=True)
class Holder:
    """What the lock file says: who holds or held the spool, and the last epoch that committed something."""

    pid: int | None = None
    command: str | None = None
    epoch: str | None = None


class Lock:
    """The exclusive lock on a state folder, held until `close` or the end of the process."""

    def __init__(self, state_dir: Path) -> None:
        """Take it. Raises SpoolBusy naming the other process; SpoolFull when the file can't be opened."""
        self.path = state_dir / LOCK
        try:
            statefiles.check(self.path)
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise SpoolFull(
                f"{self.path} can't be opened: {error.strerror}; check rights and space"
            ) from error
        self.before = read_holder(state_dir)
        for left in reversed(range(20)):  # who only looks (`who_holds`) has it for a moment
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if left and isinstance(error, BlockingIOError):
                    time.sleep(0.01)
                    continue
                os.close(self._fd)
                holder = self.before
                who = "another process" if holder.pid is None else f"process {holder.pid} ({holder.command})"
                raise SpoolBusy(
                    f"the spool in {state_dir} is in use by {who}; stop it first, or set another --state-dir "
                    "(in the chart: spool.hostPath)"
                ) from error
        self._files: tuple[tuple[int, int], tuple[int, int]] | None = None

    def check(self, database: Path) -> None:
        """Raise NotOurs when the folder is not the one that was locked: moved, removed or replaced.

        Whoever goes on writing has a second writer beside it: the lock's name leads elsewhere.
        """
        if self._files is None:
            self._files = (statefiles.identity(self._fd), statefiles.identity(database))
        for path, known in zip((self.path, database), self._files, strict=True):
            try:
                now = statefiles.identity(path)
            except FileNotFoundError:
                now = None
            except OSError:
                continue  # what the disk refuses is reported by who reads or writes
            if now != known:
                what = "is gone" if now is None else "is another file now"
                raise NotOurs(f"{path} {what}, so another agent may write here")

    def sign(self, epoch: str | None) -> None:
        """Write who holds it; on a full disk the lock holds all the same."""
        words = Path("/proc/self/cmdline").read_text(errors="replace").split("\0")
        # A flag may hold a password, and this text is shown to whoever asks who holds the spool.
        command = " ".join(" ".join(redaction.uri(word) if "://" in word else word for word in words).split())
        text = f"{os.getpid()}\n{epoch or self.before.epoch or ''}\n{command[:400]}\n".encode()
        try:
            os.pwrite(self._fd, text, 0)
            os.ftruncate(self._fd, len(text))
        except OSError:
            return

    def close(self) -> None:
        """Let go. The file stays: removing it would let two processes lock two files of one name."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read_holder(state_dir: Path) -> Holder:
    """What the lock file says; the lock itself may be free."""
    try:
        statefiles.check(state_dir / LOCK)
        lines = (state_dir / LOCK).read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError:
        return Holder()
    pid, epoch, command = [*lines, "", "", ""][:3]
    is_uuid = re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", epoch)
    return Holder(int(pid) if pid.isdigit() else None, command or None, epoch if is_uuid else None)


def who_holds(state_dir: Path) -> Holder | None:
    """Who holds the spool now; None: nobody. The lock itself shows it, for its file outlives its writer."""
    try:
        statefiles.check(state_dir / LOCK)
        with (state_dir / LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return read_holder(state_dir) if isinstance(error, BlockingIOError) else None
    return None


# --------------------------------------------------------------------------------- errors


class Damaged(Exception):
    """The file can't be trusted as it is; the text says what was seen."""


class NotOurs(sqlite3.OperationalError):
    """The folder or the file is not the one that this process holds, or it holds it no longer alone."""


# Whatever a damaged file can make SQLite or a conversion of its values raise.
UNREADABLE = (sqlite3.Error, ValueError, TypeError, OverflowError, MemoryError)


def code_of(error: sqlite3.Error) -> int:
    """SQLite's primary result code of an exception; 1 (SQLITE_ERROR) when it has none."""
    return (getattr(error, "sqlite_errorcode", None) or sqlite3.SQLITE_ERROR) & 0xFF


def is_damage(error: sqlite3.Error) -> bool:
    """Whether the error says that the content, not the disk or the moment, is bad."""
    return code_of(error) in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def translate(error: sqlite3.Error, path: Path) -> VirtbusError:
    """A SQLite error while the spool runs, as one of ours."""
    if isinstance(error, NotOurs):
        return SpoolFull(
            f"{error}: nothing is written to {path} any more; stop this agent, see that no other one uses "
            "the folder, and start it again"
        )
    name = getattr(error, "sqlite_errorname", None) or type(error).__name__
    if is_damage(error):
        return SpoolCorrupt(f"{path} is damaged ({name}: {error}); restart: it is moved away and rescued")
    hint = {
        sqlite3.SQLITE_FULL: "the disk is full: make room",
        sqlite3.SQLITE_READONLY: "the file system is read-only: remount it",
        sqlite3.SQLITE_IOERR: "the disk reports errors: check it",
        sqlite3.SQLITE_CANTOPEN: "the file can't be opened: check that the folder is there, and its rights",
        sqlite3.SQLITE_BUSY: "another program holds a lock on it",
    }.get(code_of(error), "check the disk")
    return SpoolFull(f"{path} can't be written ({name}: {error}); {hint}")


# --------------------------------------------------------------------------------- SQLite


def connect(path: Path, *, sync: str = "FULL") -> sqlite3.Connection:
    """Open an existing database for reading and writing, in autocommit (transactions are spelled out)."""
    connection = _open(path, "rw")
    try:
        for pragma in (
            f"synchronous={sync}",
            "journal_mode=WAL",
            "wal_autocheckpoint=1000",
            f"journal_size_limit={8 << 20}",
            "secure_delete=OFF",  # no zeros over what was confirmed: they would be written twice
            "temp_store=MEMORY",
            "cache_size=-2048",
        ):
            connection.execute(f"PRAGMA {pragma}").fetchall()
    except BaseException:
        connection.close()
        raise
    return connection


def connect_to_read(path: Path) -> sqlite3.Connection:
    """Open a database that may be damaged, or another process's: nothing is written, not even at close."""
    return _open(path, "ro")


def _open(path: Path, mode: str) -> sqlite3.Connection:
    statefiles.check_database(path)
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}",
        uri=True,
        timeout=2.0,
        isolation_level=None,
        check_same_thread=False,
    )
    connection.text_factory = decode_text
    for pragma in ("trusted_schema=OFF", "cell_size_check=ON"):
        connection.execute(f"PRAGMA {pragma}").fetchall()
    return connection


def decode_text(raw: bytes) -> str:
    """Text of a file that may be damaged: never fails, and never passes for what was written."""
    return raw.decode("utf-8", "surrogateescape")


@contextmanager
def transaction(db: sqlite3.Connection) -> Iterator[None]:
    """A writing transaction: all of it is in the file afterwards, or on any error nothing."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise


def check_writable(path: Path) -> None:
    """Raise what SQLite raises for a read-only file, before SQLite is asked to do anything with it.

    It maps the log's index (-shm) into memory, and a write to a mapped page of a file system that has
    turned read-only (ext4's errors=remount-ro, say) is not an error but a SIGBUS, which ends the process. The
    lock file is opened, never the database: closing any descriptor of that drops SQLite's own locks.
    """
    try:
        os.close(os.open(path.with_name(LOCK), os.O_WRONLY | os.O_CLOEXEC))
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EPERM, errno.EACCES):
            return
        refusal = sqlite3.OperationalError(error.strerror)
        refusal.sqlite_errorcode = sqlite3.SQLITE_READONLY
        refusal.sqlite_errorname = "SQLITE_READONLY"
        raise refusal from error


def close(connection: sqlite3.Connection, path: Path) -> None:
    """Close a connection; on a disk that has turned read-only leave it to the end of the process.

    The last one to close folds the log into the file, which there ends as `check_writable` reports; so would
    the garbage collector's close, hence the reference that nobody gives back.
    """
    try:
        check_writable(path)
    except sqlite3.Error:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))
        raise
    connection.close()


@contextmanager
def new_database(path: Path) -> Iterator[sqlite3.Connection]:
    """A new database (0600) with this release's schema; on the disk, whole, once the block has ended.

    Replaces what is left of an earlier try, and leaves nothing where the block raises.
    """
    for leftover in (path, *siblings(path)):
        leftover.unlink(missing_ok=True)
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
    connection = sqlite3.connect(path, isolation_level=None)
    try:
        # No journal on the disk and no sync: nobody sees the file before it is whole.
        for pragma in ("page_size=4096", "auto_vacuum=INCREMENTAL", "journal_mode=MEMORY", "synchronous=OFF"):
            connection.execute(f"PRAGMA {pragma}").fetchall()
        connection.execute("BEGIN")
        connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
        for minor in range(len(MIGRATIONS)):
            _apply_step(connection, minor)
        yield connection
        connection.execute("COMMIT")
        connection.execute("PRAGMA journal_mode=WAL").fetchall()
        connection.close()
    except BaseException:
        connection.close()
        path.unlink(missing_ok=True)
        raise
    for leftover in siblings(path):
        leftover.unlink(missing_ok=True)
    sync_file(path)


def _apply_step(connection: sqlite3.Connection, minor: int) -> None:
    """Run one migration inside the caller's transaction; the version is also kept under a checksum."""
    for statement in MIGRATIONS[minor].split(";"):
        if statement.strip():
            connection.execute(statement)
    version = MAJOR * 1000 + minor
    put(connection, "meta", "version", str(version))
    connection.execute(f"PRAGMA user_version={version}")


def migrate(connection: sqlite3.Connection, minor: int) -> None:
    """Bring an older file up to this release, one transaction a step; a newer one stays as it is."""
    for step in range(minor + 1, len(MIGRATIONS)):
        with transaction(connection):
            _apply_step(connection, step)


def siblings(path: Path) -> tuple[Path, Path]:
    """SQLite's files beside a database: the write-ahead log and its index."""
    return path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")


def sync_file(path: Path) -> None:
    """Fsync a file or a folder."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def check_version(connection: sqlite3.Connection, path: Path) -> int:
    """The file's minor version.

    Raises SpoolCorrupt for a major version that this release does not know: that file is whole, and must
    be left alone. Raises Damaged when the version is not what was written: a flipped bit in it must not
    look like a file from the future.
    """
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    row = connection.execute(select("meta", "WHERE name='version'")).fetchone()
    if row is None or not is_whole("meta", row) or row[1] != str(version) or application != APPLICATION_ID:
        raise Damaged(f"the version of the file is not what was written ({version})")
    major, minor = divmod(version, 1000)
    if major != MAJOR:
        raise SpoolCorrupt(
            f"{path} has format {major}.{minor}, and this release knows {MAJOR}: start the release that "
            "wrote it, or move the file away (its events are then not sent)"
        )
    return int(minor)
