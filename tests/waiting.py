"""The one way to wait in a test: for a condition, never for a time that should be long enough."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(
    check: Callable[[], object],
    what: str | Callable[[], str] = "it",
    timeout: float = 60.0,
    *,
    pause: float = 0.01,
    error: type[Exception] = TimeoutError,
) -> float:
    """Look each `pause` seconds until `check()` is true; the seconds it took.

    Raises `error` with `what` after `timeout` seconds, which no machine is too busy for.
    """
    begun = time.monotonic()
    while not check():
        if time.monotonic() - begun > timeout:
            raise error(f"waited {timeout:g} s in vain until {what if isinstance(what, str) else what()}")
        time.sleep(pause)
    return time.monotonic() - begun
