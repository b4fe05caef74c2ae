"""`virtbus consume` and `virtbus dead`: a group's events on the terminal, and what it dead-lettered."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any, TypeVar

import click

from virtbus import envelope
from virtbus.bus import DeadLetter, DeadLetters
from virtbus.commands.common import Seconds, as_json, bus_options, common, load, on_bus, open_bus, state_dir
from virtbus.consumer import Consumer
from virtbus.errors import ConfigError, RecordRefused
from virtbus.loading import bus_url
from virtbus.log import printable

F = TypeVar("F", bound=Callable[..., Any])
EXIT_TOO_FEW = 1


def escaped(line: str) -> str:
    """The same JSON with nothing in it that a terminal would obey."""
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in line)


@click.command("consume")
@common
@on_bus
@state_dir
@click.option("--group", metavar="NAME", help="Share the events with the other members of a durable group.")
@click.option("--count", type=click.IntRange(1), metavar="N", help="End after N events.")
@click.option("--timeout", type=Seconds(0), metavar="S", help="End after S seconds.")
@click.option("--type", "types", multiple=True, metavar="TYPE", help="Only these event types (suffices).")
def consume_command(
    group: str | None, count: int | None, timeout: float | None, types: tuple[str, ...], **options: Any
) -> None:
    """Print events as they come: one CloudEvent in structured JSON per line.

    Every event is validated against its schema; notices go to stderr. Without --group nothing is left
    behind on the broker when this ends.

    \b
    Example: virtbus consume --bus amqp://127.0.0.1// --count 1 --timeout 60
    """
    config = load(options).config
    deadline = None if timeout is None else time.monotonic() + timeout
    seen, out = 0, sys.stdout
    # A broker that was never there must not look like silence: not patient at first.
    with Consumer(bus_url(config), group=group, options=bus_options(config), patient=False) as consumer:
        while count is None or seen < count:
            left = 1.0 if deadline is None else min(1.0, deadline - time.monotonic())
            if left <= 0:
                break
            delivery = consumer.receive(left)
            if delivery is None:
                continue
            if not types or delivery.type.endswith(types):
                line = envelope.structured_json(delivery.attributes, delivery.body).decode()
                out.write((escaped(line) if out.isatty() else line) + "\n")
                out.flush()
                seen += 1
            delivery.ack()
    if count is not None and seen < count:
        click.echo(f"virtbus: {seen} of {count} events came in {timeout:g} s", err=True)
        sys.exit(EXIT_TOO_FEW)


# ------------------------------------------------------------------------------------------ dead letters


@contextmanager
def _letters(options: dict[str, Any], group: str) -> Iterator[DeadLetters]:
    with closing(open_bus(load(options).config)) as bus, bus.dead_letters(group) as letters:
        yield letters


def _group(function: F) -> F:
    named = click.option("--group", metavar="NAME", required=True, help="The consumer group.")
    return common(on_bus(state_dir(named(function))))


_ids = click.argument("ids", nargs=-1, metavar="[ID]...")
_all = click.option("--all", "everything", is_flag=True, help="All of them.")


@click.group("dead")
def dead() -> None:
    """A consumer group's dead letters: count, list, send back, drop.

    They are messages that are not events, events that its consumer rejected, and what the broker gave up on.
    The events that an agent dead-lettered are in `virtbus spool list --dead`.

    \b
    Example: virtbus dead list --group scheduler --bus amqp://127.0.0.1//
    """


@dead.command("count")
@_group
def count_command(group: str, **options: Any) -> None:
    """Print how many wait.

    \b
    Example: virtbus dead count --group scheduler --bus amqp://127.0.0.1//
    """
    with _letters(options, group) as letters:
        click.echo(letters.count())


@dead.command("list")
@_group
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True, help="The oldest N.")
@as_json
def list_command(group: str, limit: int, as_json: bool, **options: Any) -> None:
    """Print the oldest, a line each: when, id, type, size, reason. Changes nothing.

    \b
    Example: virtbus dead list --group scheduler --bus amqp://127.0.0.1//
    """
    with _letters(options, group) as letters:
        total, shown = letters.count(), 0
        for shown, letter in enumerate(letters.read(limit), 1):  # noqa: B007 - counted
            click.echo(_line(letter, as_json))
        if not as_json and total > shown:
            click.echo(f"… {total - shown} more: --limit {total}")


def _line(letter: DeadLetter, as_json: bool) -> str:
    """One letter; its JSON is a stable contract."""
    if as_json:
        data = {name: getattr(letter, name) for name in ("position", "id", "source", "type", "reason")}
        at = None if letter.at is None else letter.at.isoformat()
        return json.dumps({**data, "at": at, "size_bytes": letter.size_bytes})
    at = "-" if letter.at is None else letter.at.isoformat(timespec="seconds")
    words = (
        at,
        letter.id or letter.position,
        letter.type or "-",
        f"{letter.size_bytes} B",
        letter.reason or "-",
    )
    return "  ".join(map(printable, words))


def _settle(
    options: dict[str, Any], group: str, ids: Sequence[str], everything: bool, what: str, back: bool
) -> None:
    """Send back or drop those of `ids`, or all."""
    if everything == bool(ids):
        raise ConfigError("say which dead letters: name ids (see `virtbus dead list`), or --all, not both")
    wanted, done, refused = set(ids), 0, 0
    with _letters(options, group) as letters:
        act = letters.send_back if back else letters.drop
        for letter in letters.read():
            if not everything and not wanted:
                break  # what is read is out of others' sight
            if not everything and letter.id not in wanted and letter.position not in wanted:
                continue
            wanted -= {letter.id, letter.position}
            try:
                act(letter)
                done += 1
            except RecordRefused as error:
                refused += 1
                click.echo(f"virtbus: {printable(str(error))}", err=True)
    click.echo(f"{done} {what} group {group}")
    if wanted:
        raise ConfigError(f"not among the dead letters of group {group}: {', '.join(sorted(wanted))}")
    sys.exit(RecordRefused.exit_code if refused else 0)


@dead.command("retry")
@_group
@_ids
@_all
def retry_command(group: str, ids: tuple[str, ...], everything: bool, **options: Any) -> None:
    """Send letters back to their group, to nobody else, as they came.

    \b
    Example: virtbus dead retry --group scheduler --all --bus amqp://127.0.0.1//
    """
    _settle(options, group, ids, everything, "sent back to", back=True)


@dead.command("drop")
@_group
@_ids
@_all
def drop_command(group: str, ids: tuple[str, ...], everything: bool, **options: Any) -> None:
    """Remove letters for good.

    \b
    Example: virtbus dead drop --group sched 0193512b-1111-7222-8333-444455556666
    """
    _settle(options, group, ids, everything, "dropped from", back=False)
