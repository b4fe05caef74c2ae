"""What is to be done, stored before it is done, and what is held: SQLite, one process, bounded.

What waits is in memory too (`Lines`): in order for each target and topic; holds and releases go first.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections import deque
from collections.abc import Collection, Iterator, MutableMapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import astuple, fields, replace
from heapq import heapify, heappop, heappush, nsmallest
from itertools import islice
from pathlib import Path

from virtbus import statefiles
from virtbus.errors import ConfigError, StateUnavailable
from virtbus.integrations import holds
from virtbus.integrations.base import EVENT, HOLD, RELEASE, REPORT, Action, Found, Verb
from virtbus.integrations.holds import Change, HoldState, Row

KEPT_ROWS = 200_000  # finished actions: what comes again is recognised by them, and the audit can be read
HOLD_TOPIC = "hold"

Stored = tuple[int, Action]  # a stored action and its number
Entry = tuple[int, Action, int]  # and how often it was tried
Line = tuple[str, str]  # target and topic: what is done in order

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
CREATE TABLE IF NOT EXISTS holds (
  host TEXT PRIMARY KEY,
  state TEXT NOT NULL,
  since REAL NOT NULL,
  times INTEGER NOT NULL,
  why TEXT NOT NULL,
  target TEXT,
  uid TEXT NOT NULL,
  agent TEXT NOT NULL,
  heard_at REAL NOT NULL,
  released_at REAL
);
CREATE TABLE IF NOT EXISTS owners (
  source TEXT PRIMARY KEY,
  publisher TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS conditions (
  host TEXT PRIMARY KEY,
  condition TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS witnessed (
  incident TEXT PRIMARY KEY
);
"""

_COLUMNS = tuple(one.name for one in fields(Row))
_SELECT = f"SELECT {', '.join(_COLUMNS)} FROM holds"  # noqa: S608 - our own names
_PUT = f"INSERT OR REPLACE INTO holds ({', '.join(_COLUMNS)}) VALUES ({', '.join('?' * len(_COLUMNS))})"  # noqa: S608


class ActionStore:
    """The stored actions of one integration, and what it holds. Thread-safe.

    Guarantees:
    1. `add` is durable when it returns; an action's key is stored once, also over restarts;
    2. a waiting action is in `waiting` after a restart until `finish` was called for it;
    3. a hold and the action that sets or ends it change in one transaction: a host is held until its release
       has succeeded;
    4. one process at a time: a second one on the same file gets ConfigError.
    """

    def __init__(self, path: Path | None) -> None:
        """Open or make the file; None keeps all in memory (for a dry run)."""
        self._lock = threading.Lock()
        self._handle: statefiles.LockFile | None = None
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                statefiles.check_database(path)
                self._handle = statefiles.claim(path.with_suffix(".lock"))
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
            self._check()
        except statefiles.Claimed as holder:
            raise ConfigError(
                f"{path}: another process ({holder}) runs this integration; end it first"
            ) from None
        except statefiles.NotRegular as error:
            raise StateUnavailable(f"{path} can't be used: {error.strerror}") from error
        except (sqlite3.Error, OSError, ValueError) as error:
            if self._handle is not None:
                self._handle.close()
            raise ConfigError(
                f"{path} can't be used: {error}; move it away (what is held is read from the control plane, "
                "events that wait in it are not handed over)"
            ) from error

    def _check(self) -> None:
        """Read what another release, or a damage, may have made unreadable: here, and not at work."""
        self.rows()
        self.waiting()
        self.conditions()
        self.witnessed()
        self._db.execute("SELECT source, publisher FROM owners LIMIT 1").fetchall()

    @property
    def owners(self) -> MutableMapping[str, str]:
        """Which publisher each source belongs to: the first one that spoke for it; durable when set."""
        return _Owners(self)

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

    def add(self, actions: Sequence[Action], wall: float) -> list[Stored]:
        """Store them in one transaction; the new ones with their numbers."""
        with self._transaction() as db:
            return [stored for action in actions if (stored := _insert(db, action, wall)) is not None]

    def waiting(self) -> list[Entry]:
        """All that is still to be done, oldest first."""
        columns = "number, attempts, key, target, verb, why, body, topic"
        with self._lock:
            rows = self._db.execute(f"SELECT {columns} FROM actions WHERE state = 'waiting' ORDER BY number")  # noqa: S608
            return [
                (number, Action(key, target, Verb(verb), why, json.loads(body), topic), attempts)
                for number, attempts, key, target, verb, why, body, topic in rows
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

    def finish(
        self,
        number: int,
        state: str,
        result: str,
        wall: float,
        *,
        host: str | None = None,
        was: HoldState | None = None,
        becomes: HoldState | None = None,
    ) -> None:
        """`state` is "done", "refused" or "replaced".

        Where it ends a hold's or a release's way, the row of `host` goes from `was` to `becomes` with it;
        not when a newer decision has changed the row meanwhile.
        """
        with self._transaction() as db:
            db.execute(
                "UPDATE actions SET state = ?, result = ?, ended_at = ? WHERE number = ?",
                [state, holds.storable(result), wall, number],
            )
            if host is not None:
                free = becomes is HoldState.FREE and was is HoldState.RELEASING
                db.execute(
                    "UPDATE holds SET state = ?, released_at = coalesce(?, released_at)"
                    " WHERE host = ? AND state = ?",
                    [becomes, wall if free else None, host, was],
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

    def give_up(self, numbers: Sequence[int], result: str, wall: float) -> set[int]:
        """End those that still wait, in one transaction; their numbers."""
        given = set()
        with self._transaction() as db:
            for number in numbers:
                if db.execute(
                    "UPDATE actions SET state = 'given up', result = ?, ended_at = ?"
                    " WHERE number = ? AND state = 'waiting'",
                    [result, wall, number],
                ).rowcount:
                    given.add(number)
            self._finished += len(given)
        return given

    # ---- holds

    def rows(self) -> dict[str, Row]:
        """All that is known of holds, by host."""
        with self._lock:
            return _rows(self._db)

    def decide(self, row: Row, action: Action, wall: float) -> Stored | None:
        """Remember a decision and store its action, in one transaction."""
        with self._transaction() as db:
            _put(db, row)
            return _insert(db, action, wall)

    def put(self, row: Row) -> None:
        """Write a row as it is."""
        with self._transaction() as db:
            _put(db, row)

    def rename(self, row: Row, host: str) -> None:
        """The same hold under another name of its host; what was on its way under the old one is not done."""
        with self._transaction() as db:
            db.execute(
                "UPDATE actions SET state = 'replaced' WHERE state = 'waiting' AND topic = ? AND target = ?",
                [HOLD_TOPIC, row.host],
            )
            db.execute("DELETE FROM holds WHERE host = ?", [row.host])
            _put(db, replace(row, host=host))

    def heard(self, host: str, agent: str, wall: float) -> None:
        """The agent that speaks for a held host was heard."""
        with self._transaction() as db:
            db.execute("UPDATE holds SET agent = ?, heard_at = ? WHERE host = ?", [agent, wall, host])

    def doubt(self, wall: float) -> None:
        """After a kill, for a control plane that can be asked: what was on its way is for the look to decide.

        A decision that waited is taken again, or not, by what is true then.
        """
        with self._transaction() as db:
            db.execute(
                "UPDATE actions SET state = 'replaced' WHERE state = 'waiting' AND topic = ?", [HOLD_TOPIC]
            )
            db.execute("UPDATE holds SET released_at = ? WHERE state = ?", [wall, HoldState.RELEASING])
            db.execute(
                "UPDATE holds SET state = ? WHERE state IN (?, ?)",
                [HoldState.UNSURE, HoldState.HOLDING, HoldState.RELEASING],
            )

    def reconcile(
        self, found: Found, *, asked: Collection[str] | None, acting: bool, known: bool, wall: float
    ) -> list[Change]:
        """Correct the rows by a look; what changed. See `holds.reconcile`."""
        with self._transaction() as db:
            reported = {host for (host,) in db.execute("SELECT host FROM conditions")}
            pending = "SELECT target FROM actions WHERE state = 'waiting' AND verb = ?"
            reported -= {host for (host,) in db.execute(pending, [REPORT])}
            changes = holds.reconcile(
                _rows(db), found, asked=asked, reported=reported, acting=acting, known=known, wall=wall
            )
            for change in changes:
                _put(db, change.row)
        return changes

    # ---- conditions

    def conditions(self) -> dict[str, str]:
        """What was last stored to be shown of each host."""
        with self._lock:
            return dict(self._db.execute("SELECT host, condition FROM conditions").fetchall())

    def show(self, entries: Sequence[tuple[str, str, Action]], wall: float) -> list[Stored]:
        """Host, condition and the action that shows it; in one transaction."""
        with self._transaction() as db:
            db.executemany("INSERT OR REPLACE INTO conditions VALUES (?, ?)", [one[:2] for one in entries])
            return [stored for *_, action in entries if (stored := _insert(db, action, wall)) is not None]

    def witnessed(self) -> frozenset[str]:
        """Incidents that were seen to be their hosts' own; see `virtbus.fleet.Fleet.witnessed`."""
        with self._lock:
            return frozenset(one for (one,) in self._db.execute("SELECT incident FROM witnessed"))

    def witness(self, incidents: AbstractSet[str]) -> None:
        """Remember these, and no others."""
        with self._transaction() as db:
            db.execute("DELETE FROM witnessed")
            db.executemany("INSERT INTO witnessed VALUES (?)", [(one,) for one in sorted(incidents)])

    def close(self) -> None:
        """Let go of the file and its lock."""
        with self._lock:
            self._db.close()
        if self._handle is not None:
            self._handle.close()


class _Owners(dict[str, str]):
    """A dict whose items are on disk before they count."""

    def __init__(self, store: ActionStore) -> None:
        self._store = store
        with store._lock:
            super().__init__(store._db.execute("SELECT source, publisher FROM owners").fetchall())

    def __setitem__(self, source: str, publisher: str) -> None:
        with self._store._transaction() as db:
            db.execute("INSERT OR REPLACE INTO owners VALUES (?, ?)", [source, publisher])
        super().__setitem__(source, publisher)


def _rows(db: sqlite3.Connection) -> dict[str, Row]:
    return {host: Row(host, HoldState(state), *others) for host, state, *others in db.execute(_SELECT)}


def _put(db: sqlite3.Connection, row: Row) -> None:
    db.execute(_PUT, astuple(row))


def _insert(db: sqlite3.Connection, action: Action, wall: float) -> Stored | None:
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


# ---- in memory


def line_of(action: Action) -> Line:
    """A report that fails does not keep its host from being held."""
    return (action.target, action.topic)


class Lines:
    """Times are monotonic seconds. Not thread-safe: its owner locks."""

    def __init__(self) -> None:
        """Nothing waits."""
        self._queues: dict[Line, deque[Entry]] = {}
        # When, number, line: of holds and releases, then of the rest: no host waits behind many events.
        self._due: tuple[list[tuple[float, int, Line]], list[tuple[float, int, Line]]] = ([], [])
        self._in_hand: Line | None = None
        self.waiting = 0
        self.events = 0  # of them, those that hand over an event

    def __contains__(self, line: Line) -> bool:
        return line in self._queues

    def append(self, entry: Entry) -> bool:
        """Add one; whether it is due at once."""
        action = entry[1]
        self.waiting += 1
        self.events += action.verb == EVENT
        line = line_of(action)
        if line in self._queues:
            self._queues[line].append(entry)
            return False
        self._queues[line] = deque([entry])
        self._push(0.0, line)
        return True

    def _push(self, at: float, line: Line) -> None:
        number, action, _ = self._queues[line][0]
        heappush(self._due[action.verb not in (HOLD, RELEASE)], (at, number, line))

    def due_at(self) -> float:
        """When the next one is due; infinite without one."""
        return min((heap[0][0] for heap in self._due if heap), default=float("inf"))

    def take(self, now: float) -> Entry:
        """One that is due; `end` says what became of it, before the next is taken."""
        heap = next(heap for heap in self._due if heap and heap[0][0] <= now)
        self._in_hand = heappop(heap)[2]
        return self._queues[self._in_hand][0]

    def end(self, at: float, *, settled: bool) -> None:
        """What was taken is settled, or stays first of its line; the line is due again at `at`."""
        line, self._in_hand = self._in_hand, None
        assert line is not None
        queue = self._queues[line]
        number, action, attempts = queue[0]
        if settled:
            queue.popleft()
            self.waiting -= 1
            self.events -= action.verb == EVENT
        else:
            queue[0] = (number, action, attempts + 1)
        if queue:
            self._push(at, line)
        else:
            del self._queues[line]

    def cut(self, count: int) -> list[Entry]:
        """Take the oldest `count` events out, but for the one in hand; oldest first."""
        waiting = (
            entry
            for line, queue in self._queues.items()
            for entry in islice(queue, line == self._in_hand, None)
            if entry[1].verb == EVENT
        )
        cut = nsmallest(count, waiting, key=lambda entry: entry[0])
        numbers = {number for number, *_ in cut}
        for line in {line_of(action) for _, action, _ in cut}:
            left = deque(entry for entry in self._queues[line] if entry[0] not in numbers)
            if left:
                self._queues[line] = left
            else:
                del self._queues[line]
        for heap in self._due:
            heap[:] = [item for item in heap if item[2] in self._queues]
            heapify(heap)
        self.waiting -= len(cut)
        self.events -= len(cut)
        return cut
