"""`virtbus spool status|list|show|retry|drop`: the outbox as an operator sees it, also beside an agent."""

from __future__ import annotations

import json
import sqlite3
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import click

from virtbus.commands.options import (
    common,
    load,
    patience,
    state_dir,
)
from virtbus.commands.terminal import cut, progress, rows, wrapped
from virtbus.errors import AgentUnavailable, InputMissing, SpoolBusy, SpoolCorrupt
from virtbus.model import to_datetime
from virtbus.spool import files, requests

_LIST = "position, id, epoch, seq, key, class, count, bytes, created_ns, attempts"
_LONG = 2000  # less is done within a moment
_POLL_SECONDS = 0.2
_CLASSES = ("updated", "resolved", "opened", "gap")


@dataclass(frozen=True, slots=True)
class Entry:
    """One event in the spool as `list` shows it; `why` and `error` only for a dead letter."""

    position: int
    id: str
    epoch: str
    sequence: int
    key: str
    kind: str
    count: int
    bytes: int
    committed_at: str
    age_seconds: float
    attempts: int
    state: str
    why: str | None = None
    error: str | None = None


@contextmanager
def _reading(state_dir: Path) -> Iterator[sqlite3.Connection]:
    """Open for reading. Raises InputMissing when there is no spool here, SpoolCorrupt when it is damaged."""
    path = state_dir / files.DATABASE
    try:
        path.stat()
        with closing(files.connect_to_read(path)) as connection:
            files.check_version(connection, path)
            yield connection
    except (FileNotFoundError, NotADirectoryError):
        raise InputMissing(f"there is no spool in {state_dir}; name its folder with --state-dir") from None
    except PermissionError as error:
        raise InputMissing(f"{path} can't be read: {error.strerror}; run as the agent's user") from error
    except sqlite3.Error as error:
        # SQLITE_ERROR: a table is missing; our own words are right.
        if files.is_damage(error) or files.code_of(error) == sqlite3.SQLITE_ERROR:
            raise _damaged(path, error) from error
        raise InputMissing(f"{path} can't be read: {error}; run as the agent's user") from error
    except files.Damaged as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> SpoolCorrupt:
    return SpoolCorrupt(f"{path} is damaged ({error}); the agent's next start sets it aside and rescues it")


def _holder(state_dir: Path) -> str | None:
    """Who holds the spool now, or None; found by the lock itself, for the file outlives its writer."""
    try:
        files.Lock(state_dir).close()
    except SpoolBusy:
        holder = files.read_holder(state_dir)
        return f"{holder.pid} ({holder.command})"
    return None


def _entries(db: sqlite3.Connection, *, dead: bool, limit: int | None) -> list[Entry]:
    table, more = ("dead", ", why, error") if dead else ("events", ", NULL, NULL")
    sql = f"SELECT {_LIST}{more} FROM {table} ORDER BY position LIMIT ?"  # noqa: S608 - our own names
    now = time.time_ns()
    return [
        Entry(
            position=row[0],
            id=row[1],
            epoch=row[2],
            sequence=row[3],
            key=row[4],
            kind=_CLASSES[row[5]] if row[5] in range(4) else str(row[5]),
            count=row[6],
            bytes=row[7],
            committed_at=to_datetime(row[8]).isoformat(),
            age_seconds=round(max(0.0, (now - row[8]) / 1e9), 1),
            attempts=row[9],
            state="dead" if dead else "pending",
            why=row[10],
            error=row[11],
        )
        for row in db.execute(sql, (-1 if limit is None else limit,))
    ]


def status(state_dir: Path, out: TextIO, *, as_json: bool = False) -> None:
    """How much waits and since when, who holds the spool, and which runs are not settled yet."""
    with _reading(state_dir) as db:
        pending, size, oldest = db.execute(
            "SELECT count(*), total(bytes), min(created_ns) FROM events"
        ).fetchone()
        dead, dead_size = db.execute("SELECT count(*), total(bytes) FROM dead").fetchone()
        (unnamed,) = db.execute("SELECT total(last - first + 1) FROM losses").fetchone()
        (asked,) = db.execute("SELECT count(*) FROM requests").fetchone()
        runs = db.execute("SELECT epoch, last, alive_ns FROM runs ORDER BY run").fetchall()
    path = state_dir / files.DATABASE
    aside = sorted(each.name for each in state_dir.glob(f"{files.DATABASE}.damaged-*Z"))
    data: dict[str, Any] = {
        "path": str(path),
        "held_by": _holder(state_dir),
        "pending": pending,
        "bytes": int(size),
        "oldest_seconds": None if oldest is None else round(max(0.0, (time.time_ns() - oldest) / 1e9), 1),
        "dead": dead,
        "dead_bytes": int(dead_size),
        "unnamed": int(unnamed),
        "requests": asked,
        "file_bytes": sum(each.stat().st_size for each in (path, *files.siblings(path)) if each.exists()),
        "runs": [
            {"epoch": epoch, "last_sequence": last, "alive_at": to_datetime(alive).isoformat()}
            for epoch, last, alive in runs
        ],
        "set_aside": aside,
    }
    if as_json:
        out.write(json.dumps(data, indent=2) + "\n")
        return
    since = "" if oldest is None else f", the oldest for {data['oldest_seconds']:.0f} s"
    told = [
        ("spool", f"{data['path']} ({data['file_bytes']} bytes on the disk)"),
        ("held by", data["held_by"] or "nobody"),
        ("waiting", f"{pending} events, {data['bytes']} bytes{since}"),
        ("dead", f"{dead} events, {data['dead_bytes']} bytes"),
    ]
    if data["unnamed"]:
        told.append(("lost", f"{data['unnamed']} events, to be named in the agent's next gap event"))
    if asked:
        told.append(("asked", f"{asked} requests, to be granted by the agent"))
    told += [("set aside", str(state_dir / name)) for name in aside]
    out.write(rows(told))


def list_events(
    state_dir: Path, out: TextIO, *, dead: bool = False, limit: int | None = 100, as_json: bool = False
) -> None:
    """The events that wait (or the dead letters), the oldest first; as JSON one object a line."""
    with _reading(state_dir) as db:
        entries = _entries(db, dead=dead, limit=limit)
        table = "dead" if dead else "events"
        (total,) = db.execute(f"SELECT count(*) FROM {table}").fetchone()  # noqa: S608 - our own names
    if as_json:
        for entry in entries:
            out.write(json.dumps({name: getattr(entry, name) for name in Entry.__slots__}) + "\n")
        return
    if not entries:
        out.write("no dead letters\n" if dead else "nothing waits\n")
        return
    out.write(f"{'#':>7} {'kind':8} {'count':>7} {'age':>10} {'tries':>5}  key\n")
    for entry in entries:
        out.write(
            f"{entry.position:>7} {entry.kind:8} {entry.count:>7} {entry.age_seconds:>8.0f} s "
            f"{entry.attempts:>5}  {cut(entry.key, 37)}\n"
        )
        if entry.why is not None:
            out.write(wrapped(f"{'':8}{entry.why}: {entry.error}", indent=10))
    if total > len(entries):
        out.write(f"… and {total - len(entries)} more (--limit)\n")


def show(state_dir: Path, which: str, out: TextIO) -> None:
    """One event as it would go out, attributes and data. `which` is its id or its number in `list`."""
    with _reading(state_dir) as db:
        for table in ("events", "dead"):
            for position in _find(db, table, [which]):
                sql = f"SELECT attributes, body FROM {table} WHERE position=?"  # noqa: S608 - our own names
                attributes, body = db.execute(sql, (position,)).fetchone()
                try:
                    event = {**json.loads(attributes), "data": json.loads(body)}
                except ValueError:
                    event = {"attributes": attributes, "body": repr(body)}
                out.write(json.dumps(event, indent=2, ensure_ascii=False) + "\n")
                return
    raise InputMissing(f"no event {which} in the spool; `virtbus spool list` shows what there is")


def _find(db: sqlite3.Connection, table: str, which: Iterable[str]) -> list[int]:
    sql = f"SELECT position FROM {table} WHERE id=? OR position=?"  # noqa: S608 - our own names
    return [
        position
        for item in which
        # At most 18 digits: SQLite's integers have 64 bits.
        for (position,) in db.execute(sql, (item, int(item) if item.isdecimal() and len(item) < 19 else -1))
    ]


def retry(
    state_dir: Path, which: Sequence[str], out: TextIO, *, notices: TextIO = sys.stderr, patience: float = 0.0
) -> None:
    """Send refused dead letters again, with their ids; all of them when none is named.

    Invalid and damaged ones stay: nobody could read them. Beside an agent it waits until that has done it;
    raises AgentUnavailable when nothing is done for `patience` seconds (0 does not wait).
    """
    with _reading(state_dir) as db:
        if which:
            chosen = _find(db, "dead", which)
        else:
            chosen = [row for (row,) in db.execute("SELECT position FROM dead WHERE why='refused'")]
    if not chosen and not which:
        out.write("no dead letter was refused: nothing to send again\n")
        return
    _request(state_dir, requests.RETRY, chosen, out, "to be sent again", notices, patience)


def drop(
    state_dir: Path,
    which: Sequence[str],
    out: TextIO,
    *,
    dead: bool = False,
    confirm: Callable[[str], bool],
    notices: TextIO = sys.stderr,
    patience: float = 0.0,
) -> None:
    """Give up events that wait, or dead letters; each event is named in a gap event (operator_dropped).

    `which` are ids or numbers of `list`; none means all. `confirm` is asked once, with the whole question.
    `patience` as for `retry`.
    """
    table = "dead" if dead else "events"
    with _reading(state_dir) as db:
        if which:
            chosen = _find(db, table, which)
        else:
            chosen = [row for (row,) in db.execute(f"SELECT position FROM {table}")]  # noqa: S608 - our own names
    if not chosen and not which:
        out.write("no dead letters\n" if dead else "nothing waits\n")
        return
    if chosen:
        what = "dead letters" if dead else "waiting events"
        if not confirm(f"Drop {len(chosen)} {what} of {state_dir} for good?"):
            out.write("nothing was dropped\n")
            return
    _request(state_dir, requests.DROP, chosen, out, "to be dropped", notices, patience)


def _request(
    state_dir: Path,
    action: str,
    chosen: Sequence[int],
    out: TextIO,
    what: str,
    notices: TextIO,
    patience: float,
) -> None:
    if not chosen:
        raise InputMissing("no such event in the spool; `virtbus spool list` and `list --dead` show them")
    path = state_dir / files.DATABASE
    try:
        lock = files.Lock(state_dir)
    except SpoolBusy:
        lock = None  # the agent runs: it grants the request itself
    try:
        with closing(files.connect(path)) as db:
            last = requests.submit(db, action, chosen)
            if lock is not None:
                with progress(len(chosen) if len(chosen) > _LONG else 0, action, notices) as bar:
                    for count in requests.grant_all(db):
                        bar.update(count)
            elif patience:
                _await(db, last, len(chosen), action, notices, patience)
    except sqlite3.Error as error:
        files.raise_translated(error, path)
    finally:
        if lock is not None:
            lock.close()
    when = "done" if lock is not None or patience else "the agent does it; see `virtbus spool status`"
    out.write(f"{len(chosen)} events {what}: {when}\n")


def _await(
    db: sqlite3.Connection, last: int, count: int, action: str, notices: TextIO, patience: float
) -> None:
    """Wait until the agent has granted every request up to number `last`. Raises AgentUnavailable."""
    left, since = count, time.monotonic()
    with progress(count, action, notices) as bar:
        while left:
            time.sleep(_POLL_SECONDS)
            (now,) = db.execute("SELECT count(*) FROM requests WHERE number<=?", (last,)).fetchone()
            if now < left:
                bar.update(left - now)
                left, since = now, time.monotonic()
            elif time.monotonic() - since > patience:
                raise AgentUnavailable(
                    f"{action}: {left} of {count} events still wait for the agent, which did nothing for "
                    f"{patience:g} s; it does it when it can: see `virtbus status`"
                )


# ------------------------------------------------------------------------------- the command line


@click.group("spool")
def command() -> None:
    """Look into the spool, and let an operator decide what becomes of an event.

    Works beside a running agent, which then does what was asked; an interrupt leaves it to that.

    \b
    Example: virtbus spool list --dead
    """


@command.command("status")
@common
@state_dir
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def status_command(as_json: bool, **options: Any) -> None:
    """How much waits and since when, who holds the spool, what was set aside.

    \b
    Example: virtbus spool status --json
    """
    status(Path(load(options).config.state_dir), sys.stdout, as_json=as_json)


@command.command("list")
@common
@state_dir
@click.option("--dead", is_flag=True, help="The dead letters instead of what waits.")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="At most so many.")
@click.option("--json", "as_json", is_flag=True, help="JSON lines.")
def list_command(dead: bool, limit: int, as_json: bool, **options: Any) -> None:
    """List what waits, the oldest first.

    \b
    Example: virtbus spool list --dead
    """
    folder = Path(load(options).config.state_dir)
    list_events(folder, sys.stdout, dead=dead, limit=limit, as_json=as_json)


@command.command("show")
@common
@state_dir
@click.argument("event", metavar="ID|NUMBER")
def show_command(event: str, **options: Any) -> None:
    """Print one event as it would go out.

    \b
    Example: virtbus spool show 17
    """
    show(Path(load(options).config.state_dir), event, sys.stdout)


@command.command("retry")
@common
@state_dir
@click.argument("events", nargs=-1, metavar="[ID|NUMBER]…")
@patience
def retry_command(events: tuple[str, ...], patience: float, **options: Any) -> None:
    """Send refused dead letters again, with the same ids; all of them when none is named.

    \b
    Example: virtbus spool retry 17 18
    """
    retry(Path(load(options).config.state_dir), events, sys.stdout, notices=sys.stderr, patience=patience)


@command.command("drop")
@common
@state_dir
@click.argument("events", nargs=-1, metavar="[ID|NUMBER]…")
@click.option("--dead", is_flag=True, help="Dead letters instead of what waits.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@patience
def drop_command(events: tuple[str, ...], dead: bool, yes: bool, patience: float, **options: Any) -> None:
    """Give events up; each is named in a gap event. All of them when none is named.

    \b
    Example: virtbus spool drop --dead
    """

    def confirm(question: str) -> bool:
        return yes or click.confirm(question, err=True)

    drop(
        Path(load(options).config.state_dir),
        events,
        sys.stdout,
        dead=dead,
        confirm=confirm,
        notices=sys.stderr,
        patience=patience,
    )
