"""Retries: the one place that knows tenacity.

Full jitter (each wait is uniform between 0 and a bound that doubles), a ceiling of 8 s, no attempt limit.
Waits end at once when they are asked to stop: a SIGTERM never waits for a backoff. Hooks get the attempt, the
wait and the error; never tenacity's own objects, which can print secrets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event as StopEvent

import tenacity

from virtbus.telemetry import RetryScheduled, emit

CEILING_SECONDS = 8.0
FIRST_BOUND_SECONDS = 0.1

Hook = Callable[[RetryScheduled], None]
Attempt = tenacity.AttemptManager
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


def retrying(
    stage: str,
    *,
    sleep: Callable[[float], None],
    stop: Callable[[], bool] = lambda: False,
    fatal: type[Exception] | tuple[type[Exception], ...] = (),
    ceiling: float = CEILING_SECONDS,
    hook: Hook = emit,
) -> tenacity.Retrying:
    """Attempts until one succeeds: each `attempt` of a `for` loop has the work in `with attempt:`.

    `fatal` is raised at once; once `stop()` says so the loop ends after a failure, and raises nothing.
    `sleep` waits so many seconds, or less. `hook` is called before each wait; `stage` names its line and
    metric.
    """
    policy = _policy(ceiling)

    def before_sleep(state: tenacity.RetryCallState) -> None:
        assert state.outcome is not None
        error = state.outcome.exception() or "no reason"
        told = error if isinstance(error, Exception) else str(error)
        hook(RetryScheduled(stage, state.attempt_number, round(state.upcoming_sleep, 3), told))

    return tenacity.Retrying(
        wait=lambda state: float(policy(state)) * _scale,
        stop=lambda state: stop(),
        sleep=sleep,
        retry=tenacity.retry_if_exception(
            lambda error: isinstance(error, Exception) and not isinstance(error, fatal)
        ),
        before_sleep=before_sleep,
        retry_error_callback=lambda state: None,
    )


def _policy(ceiling: float) -> tenacity.wait_random_exponential:
    return tenacity.wait_random_exponential(multiplier=FIRST_BOUND_SECONDS, max=ceiling)


def start_over(attempt: Attempt) -> None:
    """Part of the work was done: whatever fails next waits as after a first failure."""
    attempt.retry_state.attempt_number = 1


class Backoff:
    """The waits of one stage, for a loop that keeps the time itself. `reset()` after a success.

    Made in one thread, used in another: it keeps clear of tenacity's statistics, which are a thread's own.
    """

    def __init__(self, stage: str, *, ceiling: float = CEILING_SECONDS, hook: Hook = emit) -> None:
        """`stage` names the line and the metric; `ceiling` bounds a wait in seconds."""
        self._stage, self._hook = stage, hook
        self._policy = _policy(ceiling)
        self._state = tenacity.RetryCallState(tenacity.Retrying(), None, (), {})

    def reset(self) -> None:
        """Begin again with short waits."""
        self._state.attempt_number = 1

    def next_wait(self) -> float:
        """The next wait in seconds, without sleeping; the attempt has failed."""
        seconds = float(self._policy(self._state)) * _scale
        self._state.attempt_number += 1
        return seconds

    def plan(self, error: Exception | str, *, limit: float = math.inf) -> float:
        """Call the hook → the next wait in seconds, `limit` at most, for a caller that waits by itself."""
        attempt = self._state.attempt_number
        seconds = max(0.0, min(limit, self.next_wait()))
        self._hook(RetryScheduled(self._stage, attempt, round(seconds, 3), error))
        return seconds

    def wait(self, stop: StopEvent, error: Exception | str, *, limit: float = math.inf) -> bool:
        """Call the hook, then sleep the next wait, `limit` seconds at most. False when `stop` ended it."""
        return not stop.wait(self.plan(error, limit=limit))
