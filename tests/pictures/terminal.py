"""A command in a real terminal, and what stands on its screen, as a picture."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import termios
import threading
from collections.abc import Sequence
from xml.sax.saxutils import escape

CLEAR = "\x1b[H\x1b[2J"

# A cell of a monospaced font of 14 px. Each line is told its length, so that another font fits too.
CELL, LINE, MARGIN, TITLE = 8.4, 19, 18, 34


class Terminal:
    """Runs a command that redraws a whole screen, as `virtbus fleet` does, on a pseudo-terminal."""

    def __init__(self, command: Sequence[str], *, columns: int, rows: int, **environment: str) -> None:
        self.columns = columns
        self._master, slave = pty.openpty()
        fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self._said = b""
        # The size is the terminal's, whatever terminal we were started from.
        inherited = {name: word for name, word in os.environ.items() if name not in ("COLUMNS", "LINES")}
        self._process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env={**inherited, **environment}
        )
        os.close(slave)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(20)
        self._thread.join(5)
        os.close(self._master)

    def _read(self) -> None:
        while True:
            try:
                self._said += os.read(self._master, 1 << 16)
            except OSError:  # the command has ended
                return
            self._said = CLEAR.encode().join(self._said.split(CLEAR.encode())[-2:])

    def screen(self) -> list[str]:
        """The lines of the last screen that was drawn to its end, which the next one shows."""
        lines = self._said.split(CLEAR.encode())[0].decode().splitlines()
        assert not any("\x1b" in line or len(line) > self.columns for line in lines), lines
        return lines


def picture(lines: Sequence[str], *, title: str) -> str:
    """The screen as an SVG; it brings its own dark ground."""
    width = max(len(line) for line in lines) * CELL + 2 * MARGIN
    height = TITLE + len(lines) * LINE + MARGIN
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" '
        f'height="{height}" font-family="ui-monospace, Menlo, Consolas, \'DejaVu Sans Mono\', monospace" '
        'font-size="14" fill="#d8dee9">',
        f"<title>{escape(title)}</title>",
        '<rect width="100%" height="100%" rx="8" fill="#1d2129"/>',
        *(
            f'<circle cx="{MARGIN + 18 * at}" cy="17" r="5.5" fill="{colour}"/>'
            for at, colour in enumerate(("#e06c66", "#e5c07b", "#7fb069"))
        ),
        f'<text x="{width / 2:.0f}" y="22" text-anchor="middle" fill="#8b95a5">{escape(title)}</text>',
    ]
    for at, line in enumerate(lines):
        text = line.rstrip()
        if not text:
            continue
        start = len(text) - len(text.lstrip())
        out.append(
            f'<text xml:space="preserve" x="{MARGIN + start * CELL:.1f}" y="{TITLE + 16 + at * LINE}" '
            f'textLength="{(len(text) - start) * CELL:.1f}">{escape(text.lstrip())}</text>'
        )
    return "\n".join([*out, "</svg>", ""])
