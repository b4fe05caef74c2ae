"""`virtbus dead`: what a group put aside, on any bus: count, list, send back, drop."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from virtbus.bus import DeadLetter, DeadLetters
from virtbus.commands import wiring
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
