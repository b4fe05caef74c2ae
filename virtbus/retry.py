"""Retries: the one place that knows tenacity.

Full jitter (each wait is uniform between 0 and a bound that doubles), a ceiling of 8 s, no attempt
limit. Waits end at once when `stop` is set: a SIGTERM never waits for a backoff. Hooks get the attempt,
the wait and the error; never tenacity's own objects, which can print secrets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event as StopEvent
from typing import TypeVar

import tenacity

from virtbus.errors import VirtbusError
from virtbus.telemetry import RetryScheduled, emit

CEILING_SECONDS = 8.0
FIRST_BOUND_SECONDS = 0.1

T = TypeVar("T")
Hook = Callable[[RetryScheduled], None]

_scale = 1.0


@contextmanager
def no_waiting() -> Iterator[None]:
    """For tests: waits inside the block take no time, the number of attempts stays true."""
    global _scale
    before, _scale = _scale, 0.0
    try:
        yield
    finally:
        _scale = before


def _is_retryable(error: BaseException) -> bool:
    return isinstance(error, VirtbusError) and error.retryable


class Backoff:
    """The waits of one stage. `wait(stop, error)` sleeps the next one; `reset()` after a success."""

    def __init__(self, stage: str, *, ceiling: float = CEILING_SECONDS, hook: Hook = emit) -> None:
        """`stage` names the line and the metric; `ceiling` bounds a wait in seconds."""
        self._stage = stage
        self._hook = hook
        self._policy = tenacity.wait_random_exponential(multiplier=FIRST_BOUND_SECONDS, max=ceiling)
        self._attempt = 0

    def reset(self) -> None:
        """Begin again with short waits."""
        self._attempt = 0

    def next_wait(self) -> float:
        """Draw the next wait in seconds and count the attempt, without sleeping."""
        self._attempt += 1
        state = tenacity.RetryCallState(retry_object=None, fn=None, args=(), kwargs={})  # type: ignore[arg-type]
        state.attempt_number = self._attempt
        return float(self._policy(state)) * _scale

    def wait(self, stop: StopEvent, error: Exception | str, *, limit: float = math.inf) -> bool:
        """Tell the hook, then sleep the next wait, `limit` seconds at most. False when `stop` ended it."""
        seconds = max(0.0, min(limit, self.next_wait()))
        self._hook(RetryScheduled(self._stage, self._attempt, round(seconds, 3), error))
        return not stop.wait(seconds)


def until_done(
    call: Callable[[], T],
    *,
    stage: str,
    stop: StopEvent,
    ceiling: float = CEILING_SECONDS,
    hook: Hook = emit,
) -> T:
    """Call until it succeeds; retry errors that are `retryable`, raise all others and the last at `stop`."""

    def before_sleep(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        wait = state.next_action.sleep if state.next_action else 0.0
        hook(RetryScheduled(stage, state.attempt_number, round(wait, 3), str(error)))

    wait_policy = tenacity.wait_random_exponential(multiplier=FIRST_BOUND_SECONDS, max=ceiling)
    retrying = tenacity.Retrying(
        wait=lambda state: float(wait_policy(state)) * _scale,
        stop=tenacity.stop_when_event_set(stop),
        sleep=tenacity.sleep_using_event(stop),
        retry=tenacity.retry_if_exception(_is_retryable),
        before_sleep=before_sleep,
        reraise=True,
    )
    return retrying(call)
