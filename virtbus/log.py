"""Log lines through Python's `logging`: one formatter, JSON or text; and what a terminal may show."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import NamedTuple, TextIO

_COLOURS = {"debug": "\x1b[2m", "info": "\x1b[32m", "warning": "\x1b[33m", "error": "\x1b[31m"}
_END = "\x1b[0m"
_MESSAGE_WIDTH = 30  # of text: what follows stands in one column, mostly

_Render = Callable[[str, str, str, Mapping[str, object]], str]


def printable(text: str) -> str:
    """Text of guests, tenants, daemons or brokers for a terminal: no control characters, no tricks."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)


def takes_escapes(stream: TextIO) -> bool:
    """Whether it is a terminal whose cursor can be moved."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def takes_colour(stream: TextIO) -> bool:
    """Whether it is a terminal that shows colour to somebody who wants it (no-color.org)."""
    return takes_escapes(stream) and not os.environ.get("NO_COLOR")


def _as_json(time: str, level: str, message: str, values: Mapping[str, object]) -> str:
    return json.dumps({**values, "event": message, "level": level, "timestamp": time}, default=str)


def _as_text(time: str, level: str, message: str, values: Mapping[str, object]) -> str:
    items = " ".join(f"{name}={printable(str(value))}" for name, value in values.items())
    return f"{time} [{level:<7}] {printable(message):<{_MESSAGE_WIDTH}} {items}".rstrip()


def _in_colour(time: str, level: str, message: str, values: Mapping[str, object]) -> str:
    items = " ".join(f"\x1b[36m{name}{_END}={printable(str(value))}" for name, value in values.items())
    name = f"{_COLOURS[level]}{level:<7}{_END}"
    return (
        f"\x1b[2m{time}{_END} [{name}] \x1b[1m{printable(message):<{_MESSAGE_WIDTH}}{_END} {items}".rstrip()
    )


class Line(NamedTuple):
    """A message with its values behind it: other people's formatters take it as text."""

    message: str
    values: Mapping[str, object]

    def __str__(self) -> str:
        text = " ".join((self.message, *(f"{name}={value}" for name, value in self.values.items())))
        return text.encode("utf-8", "backslashreplace").decode()


class Formatter(logging.Formatter):
    """A record as one line: its message, then its values."""

    def __init__(self, fmt: str, stream: TextIO | None) -> None:
        """`fmt`: "text", "json", or "auto": text when `stream` is a terminal."""
        super().__init__()
        is_terminal = stream is not None and hasattr(stream, "isatty") and stream.isatty()
        self._render: _Render = _as_json
        if fmt == "text" or (fmt == "auto" and is_terminal):
            self._render = (
                _in_colour if stream is not None and is_terminal and takes_colour(stream) else _as_text
            )

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds")
        line = record.msg if isinstance(record.msg, Line) else Line(record.getMessage(), {})
        return self._render(time.replace("+00:00", "Z"), record.levelname.lower(), *line)


class Handler(logging.StreamHandler[TextIO]):
    """Writes lines to a stream, or to standard error as it is then; `failed` is called with a failure."""

    def __init__(self, stream: TextIO | None, fmt: str, failed: Callable[[], None]) -> None:
        self._given = stream
        super().__init__(stream or sys.stderr)
        self._failed = failed
        self.setFormatter(Formatter(fmt, stream or sys.stderr))

    @property
    def stream(self) -> TextIO:
        """Where lines go."""
        return self._given or sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        """Given once, at the beginning."""

    def handleError(self, record: logging.LogRecord) -> None:
        """See logging.Handler: the disk is full, or nobody reads it, or there is no standard error."""
        self._failed()
