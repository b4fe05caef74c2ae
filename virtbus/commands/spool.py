"""`virtbus spool status|list|show|retry|drop`: the outbox as an operator sees it, also beside an agent."""

from __future__ import annotations

import json
import sqlite3
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from virtbus import statefiles
from virtbus.commands.common import as_json, common, cut, load, progress, rows, state_dir, timeout, wrapped
from virtbus.errors import AgentUnavailable, InputMissing, SpoolBusy, SpoolCorrupt
from virtbus.model import to_datetime
from virtbus.spool import files, requests
from virtbus.spool.mirror import stored

_LONG = 2000  # less is done within a moment
_POLL_SECONDS = 0.2
_KINDS = ("updated", "resolved", "opened", "gap")


@dataclass(frozen=True, slots=True)
class Listed:
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
    except statefiles.NotRegular as error:
        raise SpoolCorrupt(f"{path} can't be read: {error.strerror}") from error
    except PermissionError as error:
        raise InputMissing(f"{path} can't be read: {error.strerror}; run as the agent's user") from error
    except (sqlite3.Error, files.Damaged) as error:
        # SQLITE_ERROR: a table is missing; our own words are right.
        if (
            isinstance(error, files.Damaged)
            or files.is_damage(error)
            or files.code_of(error) == sqlite3.SQLITE_ERROR
        ):
            then = "the agent's next start moves it away and rescues it"
            raise SpoolCorrupt(f"{path} is damaged ({error}); {then}") from error
        raise InputMissing(f"{path} can't be read: {error}; run as the agent's user") from error


def _entries(db: sqlite3.Connection, *, dead: bool, limit: int) -> list[Listed]:
    columns = "position, id, epoch, seq, key, class, count, bytes, created_ns, attempts"
    columns += ", why, error FROM dead" if dead else ", NULL, NULL FROM events"
    sql = f"SELECT {columns} ORDER BY position LIMIT ?"
    now, state, out = time.time_ns(), "dead" if dead else "pending", []
    for *head, number, count, size, created, attempts, why, error in db.execute(sql, [limit]):
        age, at = round(max(0.0, (now - created) / 1e9), 1), to_datetime(created).isoformat()
        kind = _KINDS[number] if number in range(len(_KINDS)) else str(number)
        out.append(Listed(*(*head, kind, count, size, at, age, attempts, state, why, error)))
    return out


def _one(db: sqlite3.Connection, sql: str) -> tuple[Any, ...]:
    found: tuple[Any, ...] = db.execute(sql).fetchone()
    return found


def _table(dead: bool) -> str:
    return "dead" if dead else "events"


def _nothing(dead: bool) -> str:
    return "no dead letters" if dead else "nothing waits"


def _find(db: sqlite3.Connection, table: str, which: Iterable[str]) -> list[int]:
    sql = f"SELECT position FROM {table} WHERE id=? OR position=?"  # noqa: S608 - our own names
    return [
        position
        for item in which
        # At most 18 digits: SQLite's integers have 64 bits.
        for (position,) in db.execute(sql, (item, int(item) if item.isdecimal() and len(item) < 19 else -1))
    ]


def _all(db: sqlite3.Connection, where: str) -> list[int]:
    return [row for (row,) in db.execute(f"SELECT position FROM {where}")]  # noqa: S608 - our own names


def _request(state_dir: Path, action: str, chosen: Sequence[int], what: str, patience: float) -> None:
    """Write the operator's request; carry it out here, or leave it to the agent that runs and wait for it."""
    if not chosen:
        raise InputMissing("no such event in the spool; `virtbus spool list` and `list --dead` show them")
    path = state_dir / files.DATABASE
    try:
        lock = files.Lock(state_dir)
    except SpoolBusy:
        lock = None  # the agent runs: it carries the request out itself
    try:
        with closing(files.connect(path)) as db:
            last = requests.submit(db, action, chosen)
            if lock is not None:
                with progress(len(chosen) if len(chosen) > _LONG else 0, action, sys.stderr) as bar:
                    for count in requests.grant_all(db):
                        bar.update(count)
            elif patience:
                _await(db, last, len(chosen), action, patience)
    except sqlite3.Error as error:
        raise files.translate(error, path) from error
    finally:
        if lock is not None:
            lock.close()
    when = "done" if lock is not None or patience else "the agent does it; see `virtbus spool status`"
    click.echo(f"{len(chosen)} events {what}: {when}")


def _await(db: sqlite3.Connection, last: int, count: int, action: str, patience: float) -> None:
    """Wait until the agent has carried out every request up to number `last`. Raises AgentUnavailable."""
    left, since = count, time.monotonic()
    with progress(count, action, sys.stderr) as bar:
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


# ------------------------------------------------------------------------------------- the command line

_patience = timeout(0, 30.0, "How long an agent may do nothing of it; 0: do not wait.")
_events = click.argument("events", nargs=-1, metavar="[ID|NUMBER]…")


def _folder(options: dict[str, Any]) -> Path:
    return Path(load(options).config.state_dir)


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
@as_json
def status_command(as_json: bool, **options: Any) -> None:
    """How much waits and since when, who holds the spool, dead letters, damaged files.

    \b
    Example: virtbus spool status --json
    """
    folder = _folder(options)
    path, holder = folder / files.DATABASE, files.who_holds(folder)
    with _reading(folder) as db:
        (pending, size), (dead, dead_size) = (stored(db, table) for table in ("events", "dead"))
        (oldest,) = _one(db, "SELECT min(created_ns) FROM events")
        (unnamed,) = _one(db, "SELECT total(last - first + 1) FROM losses")
        (asked,) = _one(db, "SELECT count(*) FROM requests")
        runs = db.execute("SELECT epoch, last, alive_ns FROM runs ORDER BY run").fetchall()
    aside = sorted(each.name for each in folder.glob(f"{files.DATABASE}.damaged-*Z"))
    data: dict[str, Any] = {
        "path": str(path),
        "held_by": None if holder is None else f"{holder.pid} ({holder.command})",
        "pending": pending,
        "bytes": size,
        "oldest_seconds": None if oldest is None else round(max(0.0, (time.time_ns() - oldest) / 1e9), 1),
        "dead": dead,
        "dead_bytes": dead_size,
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
        click.echo(json.dumps(data, indent=2))
        return
    since = "" if oldest is None else f", the oldest for {data['oldest_seconds']:.0f} s"
    shown = [
        ("spool", f"{path} ({data['file_bytes']} bytes on the disk)"),
        ("held by", data["held_by"] or "nobody"),
        ("waiting", f"{pending} events, {data['bytes']} bytes{since}"),
        ("dead", f"{dead} events, {data['dead_bytes']} bytes"),
    ]
    if unnamed:
        shown.append(("lost", f"{data['unnamed']} events, to be named in the agent's next gap event"))
    if asked:
        shown.append(("requests", f"{asked}, to be carried out by the agent"))
    click.echo(rows([*shown, *(("damaged", str(folder / name)) for name in aside)]), nl=False)


@command.command("list")
@common
@state_dir
@click.option("--dead", is_flag=True, help="The dead letters instead of what waits.")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="At most so many.")
@as_json
def list_command(dead: bool, limit: int, as_json: bool, **options: Any) -> None:
    """List what waits, the oldest first.

    \b
    Example: virtbus spool list --dead
    """
    with _reading(_folder(options)) as db:
        entries = _entries(db, dead=dead, limit=limit)
        (total,) = _one(db, f"SELECT count(*) FROM {_table(dead)}")  # noqa: S608 - our own names
    if as_json:
        for entry in entries:
            click.echo(json.dumps(asdict(entry)))
        return
    if not entries:
        click.echo(_nothing(dead))
        return
    click.echo(f"{'#':>7} {'kind':8} {'count':>7} {'age':>10} {'tries':>5}  key")
    for entry in entries:
        click.echo(
            f"{entry.position:>7} {entry.kind:8} {entry.count:>7} {entry.age_seconds:>8.0f} s "
            f"{entry.attempts:>5}  {cut(entry.key, 37)}"
        )
        if entry.why is not None:
            click.echo(wrapped(f"{'':8}{entry.why}: {entry.error}", indent=10), nl=False)
    if total > len(entries):
        click.echo(f"… and {total - len(entries)} more (--limit)")


@command.command("show")
@common
@state_dir
@click.argument("event", metavar="ID|NUMBER")
def show_command(event: str, **options: Any) -> None:
    """Print one event as it would go out.

    \b
    Example: virtbus spool show 17
    """
    with _reading(_folder(options)) as db:
        for table in ("events", "dead"):
            for position in _find(db, table, [event]):
                attributes, body = _one(
                    db,
                    f"SELECT attributes, body FROM {table} WHERE position={position}",  # noqa: S608 - our own
                )
                try:
                    found = {**json.loads(attributes), "data": json.loads(body)}
                except ValueError:
                    found = {"attributes": attributes, "body": repr(body)}
                click.echo(json.dumps(found, indent=2, ensure_ascii=False))
                return
    raise InputMissing(f"no event {event} in the spool; `virtbus spool list` shows what there is")


@command.command("retry")
@common
@state_dir
@_events
@_patience
def retry_command(events: tuple[str, ...], timeout: float, **options: Any) -> None:
    """Send refused dead letters again, with the same ids; all of them when none is named.

    Invalid and damaged ones stay: nobody could read them.

    \b
    Example: virtbus spool retry 17 18
    """
    folder = _folder(options)
    with _reading(folder) as db:
        chosen = _find(db, "dead", events) if events else _all(db, "dead WHERE why='refused'")
    if not chosen and not events:
        click.echo("no dead letter was refused: nothing to send again")
        return
    _request(folder, requests.RETRY, chosen, "to be sent again", timeout)


@command.command("drop")
@common
@state_dir
@_events
@click.option("--dead", is_flag=True, help="Dead letters instead of what waits.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@_patience
def drop_command(events: tuple[str, ...], dead: bool, yes: bool, timeout: float, **options: Any) -> None:
    """Give events up. All of them when none is named.

    Each that waited is named in a gap event; a dead letter was when it became one.

    \b
    Example: virtbus spool drop --dead
    """
    folder = _folder(options)
    with _reading(folder) as db:
        chosen = _find(db, _table(dead), events) if events else _all(db, _table(dead))
    if not chosen and not events:
        click.echo(_nothing(dead))
        return
    what = "dead letters" if dead else "waiting events"
    question = f"Drop {len(chosen)} {what} of {folder} for good?"
    if chosen and not yes and not click.confirm(question, err=True):
        click.echo("nothing was dropped")
        return
    _request(folder, requests.DROP, chosen, "to be dropped", timeout)
