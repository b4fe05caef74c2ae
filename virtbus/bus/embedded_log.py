"""The embedded bus's file: a bounded message log in SQLite with a cursor and leases for each queue.

Many processes of one host share it; nothing here knows kombu or CloudEvents. Guarantees:

1. `append` returns after the messages are on disk (WAL, synchronous=FULL), all of them or none.
2. A message is leased to one taker at a time. A lease ends with the verdict, when its process is gone
   (seen within about a second, by pid and start time), or when it has not been renewed for
   `LEASE_SECONDS`; then somebody gets the message again.
3. Within a queue the messages of one key are handed out in log order: while an earlier one is with
   another taker, or delayed, the later ones wait. Other keys go on.
4. The log never grows above `max_bytes`. Room is made only by dropping what every queue that is bound
   has settled. What nobody has read stays, and `append` raises `LogFull`.

Lease and acknowledgement commits are not synced one by one: a power cut can undo the last of them, and
then a message comes twice. It never undoes an append, a dead letter or a new queue.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import time
import uuid
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from virtbus.bus.embedded_file import (
    boot_id,
    boottime,
    check_format,
    damaged,
    denied,
    identity,
    open_file,
    pid_namespace,
    read_only,
    started_at,
    translated,
)
from virtbus.errors import BusDenied, BusUnavailable, RecordRefused

LEASE_SECONDS = 30.0
DEFAULT_MAX_BYTES = 64 * 1024 * 1024
SMALLEST_MAX_BYTES = 64 * 1024
# A blocked key's messages are set aside so that later keys can pass; this many a queue at most.
LOOK_AHEAD = 10_000
ROW_OVERHEAD_BYTES = 128

_REAP_SECONDS = 1.0
_POLL_FIRST_SECONDS, _POLL_LAST_SECONDS = 0.002, 0.05
# Dead letters may use this much beyond the bound, so that a full log does not stop them at once.
_DEAD_LETTER_SHARE = 0.25


_COLUMNS = "pos, exchange, routing_key, key, content_type, content_encoding, headers, properties, body"


class LogFull(BusUnavailable):
    """The bound is reached and nothing may be dropped: the message names who has not read."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A message to append. `queue` None: every queue whose binding matches; else that queue alone."""

    exchange: str
    routing_key: str
    key: str
    content_type: str | None
    content_encoding: str | None
    headers: Mapping[str, Any]
    properties: Mapping[str, Any]
    body: bytes
    queue: str | None = None


@dataclass(frozen=True, slots=True)
class Leased:
    """A message that this taker holds until its verdict."""

    queue: str
    pos: int
    deliveries: int  # 1: the first time
    entry: Entry


@dataclass(frozen=True, slots=True)
class QueueState:
    """A queue as `look` sees it: `waiting` not handed out, `leased` out with a consumer."""

    name: str
    temporary: bool
    waiting: int
    leased: int


@dataclass(frozen=True, slots=True)
class LogState:
    """What stands in a log: bytes used, queues."""

    bytes: int
    messages: int
    queues: tuple[QueueState, ...]


# -------------------------------------------------------------------------------- pure decisions


@lru_cache(maxsize=4096)
def topic_matches(pattern: str, routing_key: str) -> bool:
    """AMQP 0-9-1 topic rule: words between dots, `*` is one word, `#` is any number of words."""
    if pattern == "#":
        return True
    return _words_match(tuple(pattern.split(".")), tuple(routing_key.split(".")))


def _words_match(pattern: tuple[str, ...], words: tuple[str, ...]) -> bool:
    if not pattern:
        return not words
    if pattern[0] == "#":
        return any(_words_match(pattern[1:], words[skip:]) for skip in range(len(words) + 1))
    return bool(words) and pattern[0] in ("*", words[0]) and _words_match(pattern[1:], words[1:])


# -------------------------------------------------------------------------------------- the log


class Log:
    """One process's door to the file. Thread-safe; not to be carried over a fork."""

    def __init__(
        self, path: Path, *, max_bytes: int = DEFAULT_MAX_BYTES, lease_seconds: float = LEASE_SECONDS
    ) -> None:
        """Open `path` and make it when it is missing (0600; its folder 0700).

        Raises BusDenied when that is not permitted, BusUnavailable when the file is damaged or is not ours.
        """
        self.path = path
        self.max_bytes = max_bytes
        self.owner = uuid.uuid4().hex
        self._lease_seconds = lease_seconds
        self._lock = threading.RLock()
        self._synchronous = ""
        self._registered = False
        self._stop_renewing = threading.Event()
        self._next_reap = 0.0
        self._next_due: dict[str, float] = {}
        self._db: sqlite3.Connection | None = open_file(path)
        self._identity = identity(path)
        try:
            self._after_boot(boot_id())
        except BaseException:
            self.close()
            raise

    def _after_boot(self, boot: str) -> None:
        """After another boot: its owners are gone, and its clock says nothing today."""
        with self._transaction(durable=True) as db:
            if db.execute("SELECT value FROM meta WHERE name = 'boot'").fetchone() == (boot,):
                return
            db.execute("DELETE FROM owners")
            db.execute("UPDATE pending SET owner = NULL, due = 0")
            for (name,) in db.execute("SELECT name FROM queues WHERE owner IS NOT NULL").fetchall():
                self._drop_queue(db, name)
            db.execute("UPDATE meta SET value = ? WHERE name = 'boot'", (boot,))

    @contextmanager
    def _transaction(self, *, durable: bool) -> Iterator[sqlite3.Connection]:
        """The write lock is taken at the start, so that two writers wait and never deadlock."""
        with self._lock, translated(self.path):
            if self._db is None:
                raise BusUnavailable(f"embedded bus {self.path}: closed")
            db, synchronous = self._db, "FULL" if durable else "NORMAL"
            if synchronous != self._synchronous:
                db.execute(f"PRAGMA synchronous = {synchronous}")
                self._synchronous = synchronous
            db.execute("BEGIN IMMEDIATE")
            try:
                yield db
                db.execute("COMMIT")
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    if db.in_transaction:
                        db.execute("ROLLBACK")
                raise

    # ---------------------------------------------------------------------------------- writing

    def append(self, entries: Sequence[Entry]) -> None:
        """Store all of them, durably, or none.

        Raises RecordRefused for an entry larger than the whole log, LogFull, BusUnavailable.
        """
        rows = [_row(entry, self.path, self.max_bytes) for entry in entries]
        need = sum(row[-1] for row in rows)
        with self._transaction(durable=True) as db:
            self._make_room(db, need)
            _insert(db, rows, need)
        # Someone may have removed the file under us: then what we wrote is on no disk that lasts.
        self.check_file()

    def check_file(self) -> None:
        """Raise BusUnavailable when the path no longer names the file that is open here."""
        if identity(self.path) != self._identity:
            raise BusUnavailable(f"embedded bus {self.path}: the file was removed or replaced while in use")

    def _make_room(self, db: sqlite3.Connection, need: int) -> None:
        (used,) = db.execute("SELECT value FROM meta WHERE name = 'bytes'").fetchone()
        if used + need <= self.max_bytes:
            return
        self._reap(db)
        (used,) = db.execute("SELECT value FROM meta WHERE name = 'bytes'").fetchone()
        low, start, slowest = db.execute(
            "SELECT min(coalesce((SELECT min(pos) - 1 FROM pending p WHERE p.queue = q.name), cursor)),"
            " (SELECT min(start) FROM queues WHERE name IN (SELECT queue FROM bindings)), name"
            " FROM queues q WHERE name IN (SELECT queue FROM bindings)"
        ).fetchone()
        freed, last = 0, None
        if low is not None:
            # A little more than is needed, so that a full log does not pay for this at every append.
            wanted = used + need - self.max_bytes + self.max_bytes // 32
            for pos, size in db.execute(
                "SELECT pos, size FROM messages WHERE pos > ? AND pos <= ? AND queue IS NULL ORDER BY pos",
                (start, low),
            ):
                freed, last = freed + size, pos
                if freed >= wanted:
                    break
        if used - freed + need > self.max_bytes:
            who = f"{slowest!r} has not read what is in it" if slowest else "nobody has read what is in it"
            raise LogFull(
                f"embedded bus {self.path}: full ({self.max_bytes} bytes) and {who}; start that consumer,"
                f" or stop the bus's users and delete {self.path}* to drop it"
            )
        db.execute("DELETE FROM messages WHERE pos > ? AND pos <= ? AND queue IS NULL", (start, last))
        db.execute("UPDATE meta SET value = value - ? WHERE name = 'bytes'", (freed,))

    # ----------------------------------------------------------------------------------- queues

    def declare(self, queue: str, *, temporary: bool = False) -> None:
        """Make a queue unless it is there: a durable one begins with the oldest message in the log, a
        temporary one behind the newest, and it goes with its owner.
        """
        if temporary:
            self._register()
        with self._transaction(durable=True) as db:
            start = 0
            if temporary:
                (start,) = db.execute("SELECT coalesce(max(pos), 0) FROM messages").fetchone()
                # The last message may have been dropped; positions go on from the sequence.
                sequence = db.execute("SELECT seq FROM sqlite_sequence WHERE name = 'messages'").fetchone()
                start = max(start, sequence[0] if sequence else 0)
            db.execute(
                "INSERT OR IGNORE INTO queues VALUES (?, ?, ?, ?)",
                (queue, start, start, self.owner if temporary else None),
            )

    def bind(self, queue: str, exchange: str, pattern: str) -> None:
        """Route what is published to `exchange` with a routing key that fits `pattern` to the queue."""
        with self._transaction(durable=True) as db:
            db.execute("INSERT OR IGNORE INTO bindings VALUES (?, ?, ?)", (queue, exchange, pattern))

    def unbind(self, queue: str, exchange: str, pattern: str) -> None:
        """Take a binding back."""
        with self._transaction(durable=True) as db:
            db.execute(
                "DELETE FROM bindings WHERE queue = ? AND exchange = ? AND pattern = ?",
                (queue, exchange, pattern),
            )

    def exists(self, queue: str) -> bool:
        """Whether the queue has been declared."""
        with self._lock, translated(self.path):
            assert self._db is not None
            return self._db.execute("SELECT 1 FROM queues WHERE name = ?", (queue,)).fetchone() is not None

    def delete(self, queue: str) -> None:
        """Forget a queue and its place in the log."""
        with self._transaction(durable=True) as db:
            self._drop_queue(db, queue)

    def purge(self, queue: str) -> int:
        """Settle everything that waits in a queue; returns how many messages that was."""
        with self._transaction(durable=True) as db:
            count = _waiting(db, queue)
            db.execute("DELETE FROM pending WHERE queue = ? AND owner IS NULL", (queue,))
            db.execute(
                "UPDATE queues SET cursor = (SELECT coalesce(max(pos), cursor) FROM messages) WHERE name = ?",
                (queue,),
            )
            return count

    def size(self, queue: str) -> int:
        """How many messages wait in a queue, not counting those that are leased."""
        with self._lock, translated(self.path):
            assert self._db is not None
            return _waiting(self._db, queue)

    @staticmethod
    def _drop_queue(db: sqlite3.Connection, name: str) -> None:
        (size,) = db.execute(
            "SELECT coalesce(sum(size), 0) FROM messages WHERE queue = ?", (name,)
        ).fetchone()
        db.execute("UPDATE meta SET value = value - ? WHERE name = 'bytes'", (size,))
        db.execute("DELETE FROM messages WHERE queue = ?", (name,))
        db.execute("DELETE FROM queues WHERE name = ?", (name,))
        for table in ("bindings", "pending"):
            db.execute(f"DELETE FROM {table} WHERE queue = ?", (name,))  # noqa: S608 - two constants

    # ----------------------------------------------------------------------------------- taking

    def take(self, queue: str, limit: int) -> list[Leased]:
        """Lease up to `limit` next messages of a queue, in log order. Never blocks for want of messages.

        Raises BusUnavailable when the queue is gone.
        """
        self._register()
        with self._transaction(durable=False) as db:
            self._reap(db)
            row = db.execute("SELECT cursor FROM queues WHERE name = ?", (queue,)).fetchone()
            if row is None:
                raise BusUnavailable(f"embedded bus {self.path}: queue {queue!r} is gone; subscribe again")
            taken = self._take_pending(db, queue, limit)
            taken += self._take_new(db, queue, limit - len(taken), row[0])
            (due,) = db.execute(
                "SELECT min(due) FROM pending WHERE queue = ? AND owner IS NULL AND due > ?",
                (queue, boottime()),
            ).fetchone()
            self._next_due[queue] = due if due is not None else float("inf")
            return taken

    def _take_pending(self, db: sqlite3.Connection, queue: str, limit: int) -> list[Leased]:
        """Messages that came back or waited for their key: none behind one that is out or delayed."""
        columns = ", ".join(f"m.{name}" for name in _COLUMNS.split(", "))
        rows = db.execute(
            f"SELECT p.deliveries + 1, {columns} FROM pending p JOIN messages m ON m.pos = p.pos"  # noqa: S608
            " WHERE p.queue = :queue AND p.owner IS NULL AND p.due <= :now AND NOT EXISTS ("
            "  SELECT 1 FROM pending e WHERE e.queue = p.queue AND e.key = p.key AND e.pos < p.pos"
            "  AND NOT (e.owner IS :me OR (e.owner IS NULL AND e.due <= :now)))"
            " ORDER BY p.pos LIMIT :limit",
            {"queue": queue, "now": boottime(), "me": self.owner, "limit": limit},
        ).fetchall()
        db.executemany(
            "UPDATE pending SET owner = ?, deliveries = deliveries + 1 WHERE queue = ? AND pos = ?",
            [(self.owner, queue, row[1]) for row in rows],
        )
        return [_leased(queue, row[0], row[1:]) for row in rows]

    def _take_new(self, db: sqlite3.Connection, queue: str, limit: int, cursor: int) -> list[Leased]:
        """Messages behind the cursor; those of a key that is out elsewhere are set aside in `pending`."""
        bindings = db.execute("SELECT exchange, pattern FROM bindings WHERE queue = ?", (queue,)).fetchall()
        blocked = {
            key
            for (key,) in db.execute(
                "SELECT DISTINCT key FROM pending WHERE queue = ? AND owner IS NOT ?", (queue, self.owner)
            )
        }
        (aside,) = db.execute(
            "SELECT count(*) FROM pending WHERE queue = ? AND owner IS NULL", (queue,)
        ).fetchone()
        # Without a binding only the queue's own messages matter: the index finds them.
        where = "(queue IS NULL OR queue = ?)" if bindings else "queue = ?"
        taken: list[Leased] = []
        pending: list[tuple[str, int, str, str | None, int]] = []
        at = cursor
        while len(taken) < limit and aside < LOOK_AHEAD:
            rows = db.execute(
                f"SELECT {_COLUMNS}, queue FROM messages WHERE pos > ? AND {where} ORDER BY pos LIMIT ?",  # noqa: S608
                (at, queue, max(limit - len(taken), 16)),
            ).fetchall()
            for *row, only in rows:
                pos, exchange, routing_key, key = row[:4]
                if not only and not any(e == exchange and topic_matches(p, routing_key) for e, p in bindings):
                    at = pos
                elif key in blocked:
                    pending.append((queue, pos, key, None, 0))
                    at, aside = pos, aside + 1
                elif len(taken) < limit:
                    pending.append((queue, pos, key, self.owner, 1))
                    taken.append(_leased(queue, 1, row))
                    at = pos
                else:
                    break
            if not rows:
                break
        db.executemany(
            "INSERT INTO pending (queue, pos, key, owner, due, deliveries) VALUES (?, ?, ?, ?, 0, ?)", pending
        )
        if at != cursor:
            db.execute("UPDATE queues SET cursor = ? WHERE name = ?", (at, queue))
        return taken

    def settle(self, queue: str, pos: int) -> None:
        """The message is done with, also when its lease has meanwhile gone to somebody else."""
        with self._transaction(durable=False) as db:
            _settle(db, queue, pos)

    def give_back(
        self, leases: Sequence[tuple[str, int]], *, after: float = 0.0, delivered: bool = True
    ) -> None:
        """End leases (queue, pos) of ours: hand the messages out again, not before `after` seconds.

        `delivered` False: nobody has seen them, so the next delivery does not count as a repetition.
        """
        due = boottime() + after if after > 0 else 0.0
        with self._transaction(durable=False) as db:
            db.executemany(
                "UPDATE pending SET owner = NULL, due = ?, deliveries = deliveries - ?"
                " WHERE queue = ? AND pos = ? AND owner = ?",
                [(due, 0 if delivered else 1, queue, pos, self.owner) for queue, pos in leases],
            )
            for queue, _ in leases:
                self._next_due[queue] = min(due, self._next_due.get(queue, due))

    def dead_letter(self, queue: str, pos: int, into: str, headers: Mapping[str, Any]) -> None:
        """Move a message to the queue `into` with more headers (None: without it), durably, and settle it.

        Raises LogFull when the dead letters that nobody reads have used their room.
        """
        with self._transaction(durable=True) as db:
            row = db.execute(f"SELECT {_COLUMNS} FROM messages WHERE pos = ?", (pos,)).fetchone()  # noqa: S608
            if row is None:
                return
            entry = _leased(queue, 0, row).entry
            dead = Entry(
                "", into, entry.key, entry.content_type, entry.content_encoding,
                {k: v for k, v in {**entry.headers, **headers}.items() if v is not None},
                entry.properties, entry.body, into,
            )  # fmt: skip
            copy = _row(dead, self.path, self.max_bytes * 2)
            bound = int(self.max_bytes * (1 + _DEAD_LETTER_SHARE))
            (used,) = db.execute("SELECT value FROM meta WHERE name = 'bytes'").fetchone()
            if used + copy[-1] > bound:
                raise LogFull(
                    f"embedded bus {self.path}: full of dead letters; consume {into!r} to make room"
                )
            db.execute("INSERT OR IGNORE INTO queues VALUES (?, 0, 0, NULL)", (into,))
            _insert(db, [copy], copy[-1])
            _settle(db, queue, pos)

    # ----------------------------------------------------------------------------------- owners

    def _register(self) -> None:
        """Become an owner of leases, and go on being one in the background."""
        if self._registered:
            return
        self.renew()
        self._registered = True
        threading.Thread(
            target=_keep_renewing,
            args=(weakref.ref(self), self._stop_renewing, self._lease_seconds / 3),
            name="virtbus-embedded-lease",
            daemon=True,
        ).start()

    def renew(self) -> None:
        """Put the end of our leases `lease_seconds` away from now."""
        with self._transaction(durable=False) as db:
            db.execute(
                "INSERT OR REPLACE INTO owners VALUES (?, ?, ?, ?, ?)",
                (
                    self.owner,
                    os.getpid(),
                    started_at(os.getpid()) or "",
                    pid_namespace(),
                    boottime() + self._lease_seconds,
                ),
            )

    def _reap(self, db: sqlite3.Connection) -> None:
        """Take back what dead or silent owners hold; looks at most once a second."""
        now = boottime()
        if now < self._next_reap:
            return
        self._next_reap = now + _REAP_SECONDS
        namespace = pid_namespace()
        owners = db.execute(
            "SELECT id, pid, started, namespace, deadline FROM owners WHERE id <> ?", (self.owner,)
        )
        for owner, pid, started, where, deadline in owners.fetchall():
            # In another container's pid namespace pids mean nothing to us: only its silence does.
            gone = started_at(pid) != started if where == namespace else now > deadline
            if gone or now > deadline:
                db.execute("UPDATE pending SET owner = NULL WHERE owner = ?", (owner,))
            if gone:
                self._leave(db, owner)

    def _leave(self, db: sqlite3.Connection, owner: str) -> None:
        db.execute("UPDATE pending SET owner = NULL WHERE owner = ?", (owner,))
        for (name,) in db.execute("SELECT name FROM queues WHERE owner = ?", (owner,)).fetchall():
            self._drop_queue(db, name)
        db.execute("DELETE FROM owners WHERE id = ?", (owner,))

    # ---------------------------------------------------------------------------------- waiting

    def version(self) -> int:
        """A number that changes when another connection has committed."""
        with self._lock, translated(self.path):
            if self._db is None:
                raise BusUnavailable(f"embedded bus {self.path}: closed")
            return int(self._db.execute("PRAGMA data_version").fetchone()[0])

    def wait(self, seen: int, timeout: float) -> None:
        """Sleep until `version()` is no longer `seen`, a delayed message is due, or for `timeout` seconds.

        Never longer than about a second: the caller's next `take` also looks for dead owners.
        """
        due = min(self._next_due.values(), default=float("inf")) - boottime()
        # A caller that can't take now (its prefetch is used up) must not spin on what is overdue.
        end = time.monotonic() + min(timeout, _REAP_SECONDS, max(due, _POLL_LAST_SECONDS))
        pause = _POLL_FIRST_SECONDS
        while (left := end - time.monotonic()) > 0:
            time.sleep(min(pause, left))
            if self.version() != seen:
                return
            pause = min(pause * 1.5, _POLL_LAST_SECONDS)
        self.check_file()

    def close(self) -> None:
        """Give back every lease and let go of the file; idempotent."""
        self._stop_renewing.set()
        with self._lock:
            if self._db is None:
                return
            if self._registered:
                with contextlib.suppress(BusUnavailable, BusDenied), self._transaction(durable=False) as db:
                    self._leave(db, self.owner)
            db, self._db = self._db, None
            with contextlib.suppress(sqlite3.Error):
                db.close()


def look(path: Path) -> LogState:
    """What stands in the log at `path`, and whether the file is whole; changes nothing.

    Raises BusUnavailable when it is damaged or not ours, BusDenied when it can't be read.
    """
    if not os.access(path, os.R_OK):
        raise denied(path, "no read permission")
    with translated(path), contextlib.closing(read_only(path)) as db:
        check_format(db, path)
        (verdict,) = db.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise damaged(path, verdict)
        (used,) = db.execute("SELECT value FROM meta WHERE name = 'bytes'").fetchone()
        (count,) = db.execute("SELECT count(*) FROM messages").fetchone()
        queues = [
            QueueState(
                name,
                owner is not None,
                _waiting(db, name),
                db.execute(
                    "SELECT count(*) FROM pending WHERE queue = ? AND owner IS NOT NULL", (name,)
                ).fetchone()[0],
            )
            for name, owner in db.execute("SELECT name, owner FROM queues ORDER BY name").fetchall()
        ]
    return LogState(int(used), count, tuple(queues))


def peek(path: Path, queue: str, limit: int) -> list[Leased]:
    """The oldest messages that were put into `queue` alone (dead letters, say); takes none of them."""
    if not os.access(path, os.F_OK):
        return []
    with translated(path), contextlib.closing(read_only(path)) as db:
        check_format(db, path)
        rows = db.execute(
            f"SELECT {_COLUMNS} FROM messages WHERE queue = ? ORDER BY pos LIMIT ?",  # noqa: S608
            (queue, limit),
        ).fetchall()
    return [_leased(queue, 0, row) for row in rows]


# -------------------------------------------------------------------------------- small parts


def _row(entry: Entry, path: Path, largest: int) -> tuple[Any, ...]:
    try:
        headers = json.dumps(dict(entry.headers), ensure_ascii=False)
        properties = json.dumps(dict(entry.properties), ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise RecordRefused(f"embedded bus {path}: a header can't be stored: {error}") from error
    size = len(entry.body) + len(headers.encode()) + len(properties) + ROW_OVERHEAD_BYTES
    if size > largest:
        raise RecordRefused(
            f"embedded bus {path}: a message of {size} bytes is larger than the bus ({largest})"
        )
    return (
        entry.exchange, entry.routing_key, entry.queue, entry.key, entry.content_type,
        entry.content_encoding, headers, properties, entry.body, size,
    )  # fmt: skip


def _insert(db: sqlite3.Connection, rows: Sequence[tuple[Any, ...]], size: int) -> None:
    db.executemany(
        "INSERT INTO messages (exchange, routing_key, queue, key, content_type, content_encoding, headers,"
        " properties, body, size) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
        rows,
    )
    db.execute("UPDATE meta SET value = value + ? WHERE name = 'bytes'", (size,))


def _settle(db: sqlite3.Connection, queue: str, pos: int) -> None:
    db.execute("DELETE FROM pending WHERE queue = ? AND pos = ?", (queue, pos))
    for (size,) in db.execute(
        "DELETE FROM messages WHERE pos = ? AND queue = ? RETURNING size", (pos, queue)
    ).fetchall():
        db.execute("UPDATE meta SET value = value - ? WHERE name = 'bytes'", (size,))


def _leased(queue: str, deliveries: int, row: Sequence[Any]) -> Leased:
    pos, exchange, routing_key, key, content_type, content_encoding, headers, properties, body = row
    try:
        extras = json.loads(headers), json.loads(properties)
    except ValueError as error:
        raise sqlite3.DatabaseError(f"message {pos} is damaged: {error}") from error
    entry = Entry(exchange, routing_key, key, content_type, content_encoding, *extras, body)
    return Leased(queue, pos, deliveries, entry)


def _waiting(db: sqlite3.Connection, queue: str) -> int:
    bindings = db.execute("SELECT exchange, pattern FROM bindings WHERE queue = ?", (queue,)).fetchall()
    (count,) = db.execute(
        "SELECT count(*) FROM pending WHERE queue = ? AND owner IS NULL", (queue,)
    ).fetchone()
    where = "(queue IS NULL OR queue = ?)" if bindings else "queue = ?"
    for exchange, routing_key, only in db.execute(
        f"SELECT exchange, routing_key, queue FROM messages WHERE {where} AND pos >"  # noqa: S608
        " coalesce((SELECT cursor FROM queues WHERE name = ?), 0)",
        (queue, queue),
    ):
        count += bool(only or any(e == exchange and topic_matches(p, routing_key) for e, p in bindings))
    return int(count)


def _keep_renewing(log: weakref.ref[Log], stop: threading.Event, interval: float) -> None:
    # A weak reference: leases of a log that was dropped without close() end by themselves.
    while not stop.wait(interval):
        alive = log()
        if alive is None:
            return
        with contextlib.suppress(BusUnavailable, BusDenied):
            alive.renew()
        del alive
