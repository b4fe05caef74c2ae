"""A server that takes its time over an answer."""

from __future__ import annotations

import threading
import time
from typing import BinaryIO


def drip(out: BinaryIO, body: bytes, byte_seconds: float, cut_off: threading.Event) -> None:
    """Write `body` a byte at a time, at once when `byte_seconds` is 0; set `cut_off` when nobody reads on."""
    if not byte_seconds:
        out.write(body)
        return
    for at in range(len(body)):
        time.sleep(byte_seconds)
        try:
            out.write(body[at : at + 1])
        except OSError:
            cut_off.set()
            return
