"""`virtbus run` that keeps a ledger of its commits, for a test that kills it: storm_agent.py LEDGER WORDS…

Before and after each commit of the intake it writes how many callbacks it has taken so far; what was taken
when a commit returned is committed with it. A line that is written survives SIGKILL: it is the kernel's.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from virtbus.agent.intake import Writer
from virtbus.cli import main
from virtbus.telemetry import METRICS


def keep(ledger: int) -> None:
    commit: Callable[..., Any] = Writer.commit

    def told(writer: Writer, events: Any) -> None:
        taken = round(METRICS.callbacks._value.get())
        os.write(ledger, f"begin {taken}\n".encode())
        commit(writer, events)
        os.write(ledger, f"done {taken}\n".encode())

    Writer.commit = told  # type: ignore[method-assign]


if __name__ == "__main__":
    keep(os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
    main(sys.argv[2:])
