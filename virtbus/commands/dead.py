"""`virtbus dead`: what a group put aside, on any bus: count, list, send back, drop."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO, TypeVar

import click

from virtbus.bus import DeadLetter, DeadLetters
from virtbus.commands import wiring
from virtbus.commands.options import bus, common, load, state_dir
from virtbus.config import Loaded
from virtbus.errors import ConfigError, RecordRefused
from virtbus.log import printable

EXIT_REFUSED = RecordRefused.exit_code


@contextmanager
def _opened(loaded: Loaded, group: str) -> Iterator[DeadLetters]:
    bus = wiring.open_bus(loaded.config)
    try:
        with bus.dead_letters(group) as letters:
            yield letters
    finally:
        bus.close()


def count(loaded: Loaded, group: str, out: TextIO) -> None:
    """The number of letters, alone on a line."""
    with _opened(loaded, group) as letters:
        out.write(f"{letters.count()}\n")


def show(loaded: Loaded, group: str, *, limit: int, as_json: bool, out: TextIO) -> None:
    """The oldest letters, a line each; changes nothing."""
    with _opened(loaded, group) as letters:
        total, shown = letters.count(), 0
        for letter in letters.read(limit):
            shown += 1
            out.write((json.dumps(_data(letter)) if as_json else _line(letter)) + "\n")
        if not as_json and total > shown:
            out.write(f"… {total - shown} more: --limit {total}\n")


def settle(
    loaded: Loaded,
    group: str,
    *,
    ids: Sequence[str],
    everything: bool,
    back: bool,
    out: TextIO,
    notices: TextIO,
) -> int:
    """Send back or drop those of `ids`, or all; EXIT_REFUSED when some could not be sent back.

    Raises ConfigError when neither or both are asked for, or an id is not there.
    """
    if everything == bool(ids):
        raise ConfigError("say which dead letters: name ids (see `virtbus dead list`), or --all, not both")
    wanted, done, refused = set(ids), 0, 0
    with _opened(loaded, group) as letters:
        act: Callable[[DeadLetter], None] = letters.send_back if back else letters.drop
        for letter in letters.read():
            if not everything and letter.id not in wanted and letter.position not in wanted:
                continue
            wanted -= {letter.id, letter.position}
            try:
                act(letter)
                done += 1
            except RecordRefused as error:
                refused += 1
                notices.write(f"virtbus: {printable(str(error))}\n")
    out.write(f"{done} {'sent back to' if back else 'dropped from'} group {group}\n")
    if wanted:
        raise ConfigError(f"not among the dead letters of group {group}: {', '.join(sorted(wanted))}")
    return EXIT_REFUSED if refused else 0


def _data(letter: DeadLetter) -> dict[str, object]:
    """One letter for tools; a stable contract."""
    return {
        "position": letter.position,
        "id": letter.id,
        "source": letter.source,
        "type": letter.type,
        "reason": letter.reason,
        "at": None if letter.at is None else letter.at.isoformat(),
        "size_bytes": letter.size_bytes,
    }


def _line(letter: DeadLetter) -> str:
    at = "-" if letter.at is None else letter.at.isoformat(timespec="seconds")
    words = (
        at,
        letter.id or letter.position,
        letter.type or "-",
        f"{letter.size_bytes} B",
        letter.reason or "-",
    )
    return "  ".join(printable(word) for word in words)


# ------------------------------------------------------------------------------- the command line

F = TypeVar("F", bound=Callable[..., Any])


def _group(function: F) -> F:
    named = click.option("--group", metavar="NAME", required=True, help="The consumer group.")
    return common(bus(state_dir(named(function))))


_ids = click.argument("ids", nargs=-1, metavar="[ID]...")
_all = click.option("--all", "everything", is_flag=True, help="All of them.")


@click.group("dead")
def command() -> None:
    """What a consumer group put aside: count, list, send back, drop.

    A group's dead letters are messages that are not events, events that its consumer gave up, and what the
    broker gave up on. The events that an agent set aside are in `virtbus spool list --dead`.

    \b
    Example: virtbus dead list --group scheduler --bus amqp://127.0.0.1//
    """


@command.command("count")
@_group
def count_command(group: str, **options: Any) -> None:
    """Print how many wait.

    \b
    Example: virtbus dead count --group scheduler --bus amqp://127.0.0.1//
    """
    count(load(options), group, sys.stdout)


@command.command("list")
@_group
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="The oldest N.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def list_command(group: str, limit: int, as_json: bool, **options: Any) -> None:
    """Print the oldest, a line each: when, id, type, size, reason. Changes nothing.

    \b
    Example: virtbus dead list --group scheduler --bus amqp://127.0.0.1//
    """
    show(load(options), group, limit=limit, as_json=as_json, out=sys.stdout)


@command.command("retry")
@_group
@_ids
@_all
def retry_command(group: str, ids: tuple[str, ...], everything: bool, **options: Any) -> None:
    """Send letters back to their group, to nobody else, as they came.

    \b
    Example: virtbus dead retry --group scheduler --all --bus amqp://127.0.0.1//
    """
    sys.exit(
        settle(
            load(options), group, ids=ids, everything=everything, back=True,
            out=sys.stdout, notices=sys.stderr,
        )
    )  # fmt: skip


@command.command("drop")
@_group
@_ids
@_all
def drop_command(group: str, ids: tuple[str, ...], everything: bool, **options: Any) -> None:
    """Remove letters for good.

    \b
    Example: virtbus dead drop --group sched 0193512b-1111-7222-8333-444455556666
    """
    sys.exit(
        settle(
            load(options), group, ids=ids, everything=everything, back=False,
            out=sys.stdout, notices=sys.stderr,
        )
    )  # fmt: skip
