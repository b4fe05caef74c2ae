"""What an operator asks of a spool: send a dead letter again, or drop an event.

A wish is a row in the file, so it can be made beside a running agent, which grants it within about ten
seconds, as well as while none runs. What is dropped is named in a gap event by the next commit.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from virtbus.model import SequenceRange
from virtbus.spool import contents, files
from virtbus.spool.contents import GapFacts, Loss
from virtbus.spool.ledger import CHUNK, Account
from virtbus.words import GapReason

RETRY, DROP = "retry", "drop"


class Wish(NamedTuple):
    """A row of table requests: an event by its epoch and sequence, for a position is used again."""

    number: int
    action: str
    position: int
    epoch: str
    seq: int


@dataclass(slots=True)
class Granted:
    """What was done to the file, for whoever holds an index of it."""

    dropped: list[tuple[int, str, int]] = field(default_factory=list)  # position, key, bytes
    revived: list[tuple[int, str, int, int]] = field(default_factory=list)  # new position, key, class, bytes
    buried: list[int] = field(default_factory=list)  # bytes of dead letters that are gone for good
    losses: list[Loss] = field(default_factory=list)


def wish(db: sqlite3.Connection, action: str, positions: Iterable[int]) -> int:
    """Write wishes into the file, in one transaction; the number of the last one.

    Each means the event that lies at its position now; one where nothing lies any more is no wish.
    """
    number = 0
    db.execute("BEGIN IMMEDIATE")
    for position in positions:
        for table in ("events", "dead"):
            sql = f"SELECT ?, position, epoch, seq FROM {table} WHERE position=?"  # noqa: S608 - our own names
            made = db.execute(
                f"INSERT INTO requests (action, position, epoch, seq) {sql}", (action, position)
            )
            if made.rowcount > 0:
                number = made.lastrowid or number
                break
    db.execute("COMMIT")
    return number


def grant(
    db: sqlite3.Connection,
    wishes: Sequence[Wish],
    next_position: int,
    next_loss: int,
    wall_ns: int,
) -> Granted:
    """Grant wishes inside the caller's transaction; what is gone already is no error.

    A waiting event that is not what was written stays: it is found when it is taken, and what it was is
    named then.
    """
    done = Granted()
    for wished in wishes:
        action, position = wished.action, wished.position
        db.execute("DELETE FROM requests WHERE number=?", (wished.number,))
        event, dead = (
            db.execute(
                contents.select_sql(table, "WHERE position=? AND epoch=? AND seq=?"),
                (position, wished.epoch, wished.seq),
            ).fetchone()
            for table in ("events", "dead")
        )
        if event is not None and action == DROP and files.is_whole("events", event):
            db.execute("DELETE FROM events WHERE position=?", (position,))
            done.dropped.append((position, event[4], event[7]))
            for loss in _losses(event, next_loss):
                db.execute(files.insert_sql("losses"), contents.loss_row(loss))
                done.losses.append(loss)
                next_loss += 1
        elif dead is not None and action == DROP:
            db.execute("DELETE FROM dead WHERE position=?", (position,))
            done.buried.append(dead[7])
        elif dead is not None and action == RETRY and dead[14] == "refused" and files.is_whole("dead", dead):
            db.execute("DELETE FROM dead WHERE position=?", (position,))
            _remember_run(db, dead[1], dead[2], wall_ns)
            db.execute(files.insert_sql("events"), (next_position, *dead[1:14]))
            done.revived.append((next_position, dead[4], dead[5], dead[7]))
            next_position += 1
    return done


def _losses(event: Sequence[Any], number: int) -> Iterator[Loss]:
    """What a dropped row of table events takes with it. A gap event's: what it named, counted and spanned."""
    ranges, occurrences, started_ns = [SequenceRange(event[1], event[2], event[2])], event[6], event[8]
    if event[11] is not None:
        facts = GapFacts.parse(event[11])
        ranges += facts.ranges
        occurrences, started_ns = facts.occurrences, facts.started_ns
    for at, item in enumerate(ranges):
        yield Loss(
            number + at, (item,), GapReason.OPERATOR_DROPPED, 0 if at else occurrences, started_ns, None
        )


def _remember_run(db: sqlite3.Connection, epoch: str, seq: int, wall_ns: int) -> None:
    """Give a revived event's run a record again, with everything settled, when it was forgotten.

    An early release forgot runs that were settled although dead letters of theirs were left.
    """
    run, last = db.execute("SELECT max(run), max(last) FROM runs WHERE epoch=?", (epoch,)).fetchone()
    if last is not None and last >= seq:
        return
    if run is None:  # older than all that are known
        (run,) = db.execute("SELECT coalesce(min(run), 1) - 1 FROM runs").fetchone()
    settled = Account(run, epoch, wall_ns, wall_ns, last=seq, below=-(-seq // CHUNK))
    db.execute(files.insert_sql("runs"), contents.run_row(settled))


def grant_all(db: sqlite3.Connection, wall_ns: int) -> Iterator[int]:
    """Grant every wish in the file, a share at a time; how many each time.

    Only for who holds the lock and keeps no index: no agent runs then. What is left when it is not run to
    its end, the agent's next start grants.
    """
    while count := _grant_some(db, wall_ns):
        yield count


def _grant_some(db: sqlite3.Connection, wall_ns: int) -> int:
    db.execute("BEGIN IMMEDIATE")
    try:
        asked = db.execute(contents.select_sql("requests", "ORDER BY number LIMIT 1000")).fetchall()
        (position,) = db.execute(
            "SELECT max(coalesce((SELECT max(position) FROM events), 0),"
            " coalesce((SELECT max(position) FROM dead), 0))"
        ).fetchone()
        (loss,) = db.execute("SELECT coalesce(max(number), 0) FROM losses").fetchone()
        grant(db, [Wish(*each) for each in asked], position + 1, loss + 1, wall_ns)
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
    return len(asked)
