"""How output fits a terminal: tables of 80 columns, and bars for long work, which only a terminal gets."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, TextIO

import click

from virtbus.log import printable, takes_escapes

if TYPE_CHECKING:
    from click._termui_impl import ProgressBar

COLUMNS = 80
_WORDS = 25  # columns beside label and bar: brackets, per cent, time left
_STEPS = 500  # at most so many pictures


class Progress:
    """Tells how far the work is; drawn with the first step, below what connecting has logged."""

    def __init__(self, bar: ProgressBar[int], drawn: ExitStack, notices: TextIO) -> None:
        """`drawn` ends the bar when the work ends."""
        self._bar, self._drawn, self._notices = bar, drawn, notices

    def update(self, steps: int) -> None:
        """So many more are done."""
        if not self._bar.entered:
            self._drawn.enter_context(self._bar)
        self._bar.update(steps)

    def make_way(self, out: TextIO) -> None:
        """Take the bar off the line before something is written to `out`; the next step draws it again."""
        if self._bar.entered and not self._bar.hidden and out.isatty():
            self._notices.write("\r\x1b[K")
            self._notices.flush()


@contextmanager
def progress(length: int, label: str, notices: TextIO) -> Iterator[Progress]:
    """A bar of `length` steps on `notices` if that is a terminal, else nothing; nothing for 0 steps too."""
    shown = length > 0 and takes_escapes(notices)
    columns = os.get_terminal_size(notices.fileno()).columns if shown else COLUMNS
    with ExitStack() as drawn:
        bar = click.progressbar(
            length=length,
            label=label,
            file=notices,
            hidden=not shown,
            width=max(1, min(30, columns - len(label) - _WORDS)),
            update_min_steps=max(1, length // _STEPS),
        )
        yield Progress(bar, drawn, notices)


def rows(told: Iterable[tuple[str, str]]) -> str:
    """(name, text) as lines; a long text goes on below itself, but a long word stays whole."""
    return "".join(wrapped(f"{name:<10} {text}", indent=11) for name, text in told)


def wrapped(text: str, *, indent: int) -> str:
    """A text in lines that fit, all but the first of them indented; a long word stays whole."""
    filled = textwrap.fill(
        printable(text),
        COLUMNS,
        subsequent_indent=" " * indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
    return filled + "\n"


def cut(text: str, width: int) -> str:
    """A name of somebody else's in at most `width` columns: nothing in it may move the terminal's cursor."""
    clean = printable(text)
    return clean if len(clean) <= width else clean[: width - 1] + "…"
