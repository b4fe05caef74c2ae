"""What an operator asks of a spool: send a dead letter again, or drop an event.

A request is a row in the file, so it can be made beside a running agent, which grants it within about ten
seconds, as well as while none runs. The next commit names a waiting event that was dropped in a gap event; a
dead letter was named when it became one.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from virtbus.model import SequenceRange
from virtbus.spool import files
from virtbus.spool.files import EventRow
from virtbus.spool.missing import Missing, put_loss
from virtbus.words import GapReason

RETRY, DROP = "retry", "drop"
AT_ONCE = 1000  # a transaction


class Request(NamedTuple):
    """A row of table requests: an event by its epoch and sequence, for a position is used again."""

    number: int
    action: str
    position: int
    epoch: str
    seq: int


@dataclass(slots=True)
class Granted:
    """What was done to the file, for whoever mirrors it."""

    dropped: list[EventRow] = field(default_factory=list)
    revived: list[EventRow] = field(default_factory=list)  # at their new positions
    losses: list[Missing] = field(default_factory=list)  # to be written, a range each


def submit(db: sqlite3.Connection, action: str, positions: Iterable[int]) -> int:
    """Write requests into the file, in one transaction; the number of the last one.

    Each means the event that lies at its position now; where nothing lies any more it is none.
    """
    number = 0
    with files.transaction(db):
        for position in positions:
            for table in ("events", "dead"):
                sql = f"SELECT ?, position, epoch, seq FROM {table} WHERE position=?"  # noqa: S608 - our own names
                made = db.execute(
                    f"INSERT INTO requests (action, position, epoch, seq) {sql}", (action, position)
                )
                if made.rowcount > 0:
                    number = made.lastrowid or number
                    break
    return number


def waiting(db: sqlite3.Connection) -> list[Request]:
    """The oldest requests."""
    rows = db.execute(files.select("requests", f"ORDER BY number LIMIT {AT_ONCE}"))
    return [Request(*row) for row in rows]


def grant(db: sqlite3.Connection, asked: Sequence[Request], next_position: int) -> Granted:
    """Grant requests inside the caller's transaction; what is gone already is not an error.

    A waiting event that is not what was written stays: it is found when it is taken, and what it was is
    named then.
    """
    done = Granted()
    for one in asked:
        db.execute("DELETE FROM requests WHERE number=?", (one.number,))
        event, dead = (
            db.execute(files.select(table, "WHERE position=? AND epoch=? AND seq=?"), one[2:]).fetchone()
            for table in ("events", "dead")
        )
        if event is not None and one.action == DROP and files.is_whole("events", event):
            row = EventRow(*event)
            db.execute("DELETE FROM events WHERE position=?", (row.position,))
            done.dropped.append(row)
            done.losses += _losses(row)
        elif dead is not None:
            row, why = EventRow(*dead[:14]), dead[14]
            retry = one.action == RETRY and why == "refused" and files.is_whole("dead", dead)
            if one.action == DROP or retry:
                db.execute("DELETE FROM dead WHERE position=?", (row.position,))
            if retry:
                done.revived.append(row._replace(position=next_position))
                db.execute(files.INSERT["events"], done.revived[-1])
                next_position += 1
    return done


def _losses(row: EventRow) -> Iterator[Missing]:
    """What a dropped row takes with it. A gap event's: what it named, counted and spanned."""
    gone = Missing((), GapReason.OPERATOR_DROPPED, row.occurrences, row.created_ns)
    named: tuple[SequenceRange, ...] = ()
    if row.names is not None:
        facts = Missing.parse(row.names)
        named = facts.ranges
        gone = replace(gone, occurrences=facts.occurrences, started_ns=facts.started_ns)
    yield replace(gone, ranges=(SequenceRange(row.epoch, row.seq, row.seq),))
    for item in named:
        yield replace(gone, ranges=(item,), occurrences=0)


def grant_all(db: sqlite3.Connection) -> Iterator[int]:
    """Grant every request in the file, a share at a time; how many each time.

    Only for who holds the lock and keeps no mirror: no agent runs then. What is left when it is not run to
    its end, the agent's next start grants.
    """
    while True:
        with files.transaction(db):
            asked = waiting(db)
            (position,) = db.execute(
                "SELECT max(coalesce((SELECT max(position) FROM events), 0),"
                " coalesce((SELECT max(position) FROM dead), 0))"
            ).fetchone()
            (number,) = db.execute("SELECT coalesce(max(number), 0) FROM losses").fetchone()
            for at, loss in enumerate(grant(db, asked, position + 1).losses, number + 1):
                put_loss(db, at, loss)
        if not asked:
            return
        yield len(asked)
