"""Log lines: one JSON object each, or text for people; and what may be shown on a terminal.

The standard library's own: a logging framework brought asyncio along, and two MiB with it, for six calls.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import TextIO

LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40}
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
    told = " ".join(f"{name}={printable(str(value))}" for name, value in values.items())
    return f"{time} [{level:<7}] {printable(message):<{_MESSAGE_WIDTH}} {told}".rstrip()


def _in_colour(time: str, level: str, message: str, values: Mapping[str, object]) -> str:
    told = " ".join(f"\x1b[36m{name}{_END}={printable(str(value))}" for name, value in values.items())
    name = f"{_COLOURS[level]}{level:<7}{_END}"
    return f"\x1b[2m{time}{_END} [{name}] \x1b[1m{printable(message):<{_MESSAGE_WIDTH}}{_END} {told}".rstrip()


class Log:
    """Where lines go, from which level on, and in which form; any thread writes whole lines."""

    def __init__(self, *, level: str = "info", fmt: str = "auto", stream: TextIO | None = None) -> None:
        """`level`: "debug" … "error"; `fmt`: "text", "json", or "auto": text on a terminal."""
        self._stream = stream  # None: standard error as it is when a line is written, which may be none
        out = stream or sys.stderr
        is_terminal = out is not None and hasattr(out, "isatty") and out.isatty()
        self._threshold = LEVELS[level]
        self._lock = threading.Lock()
        self._render: _Render = _as_json
        if fmt == "text" or (fmt == "auto" and is_terminal):
            self._render = _in_colour if is_terminal and takes_colour(out) else _as_text

    def write(self, level: str, message: str, values: Mapping[str, object]) -> None:
        """Write one line, if `level` is high enough. Raises OSError or ValueError when that fails."""
        if LEVELS[level] < self._threshold:
            return
        time = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
        line = self._render(time, level, message, values)
        out = self._stream or sys.stderr
        if out is None:
            raise ValueError("there is no standard error to log to")
        with self._lock:
            out.write(f"{line}\n")
            out.flush()
