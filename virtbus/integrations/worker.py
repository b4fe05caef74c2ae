"""The thread that talks to the control plane: executes what is stored, reads what is held."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from virtbus.envelope import uuid7
from virtbus.errors import VirtbusError
from virtbus.integrations.base import (
    EVENT,
    HOLD,
    RELEASE,
    REPORT,
    Action,
    Integration,
    NotOurs,
    TargetMissing,
    code_of_others,
)
from virtbus.integrations.holds import Change, Finding, HoldState, Row, in_words
from virtbus.integrations.store import HOLD_TOPIC, ActionStore, Line, Lines, Stored, line_of
from virtbus.integrations.telemetry import (
    ActionFailed,
    ActionGivenUp,
    Audited,
    EventsGivenUp,
    EventsLeft,
    EventsTaken,
    HoldFound,
    LookFailed,
    ReleaseRefused,
    Result,
    TargetAwaited,
)
from virtbus.model import Now
from virtbus.retry import Backoff
from virtbus.telemetry import TelemetryEvent

RETRY_CEILING_SECONDS = 60.0
MOST_WAITING = 10_000  # events: a report that its host's control plane does not know yet keeps none away
MOST_SURPRISES = (
    20  # an event that makes a client library raise what nobody expects is given up after so many
)
LOOK_SECONDS = 300.0  # between two looks at everything
CHECK_SECONDS = 10.0  # between two looks at what we hold
LULL_SECONDS = 30.0  # after so long without an event another instance may have been the active one
_FOLLOWS = {
    Finding.ADOPTED: "counted as ours, and released once its host is well",
    Finding.WIPED: "set again; to give a host back: virtbus react release HOST",
    Finding.REGISTERED_ANEW: "set again",
    Finding.REMOVED_BY_HAND: "left alone until its host was well once",
    Finding.TARGET_GONE: "forgotten",
}


class LookSchedule:
    """When the control plane is looked at, and whether what is held is known; times are monotonic seconds.

    An instance that hears no events (it stands by, or the broker is away) looks once and then leaves the
    control plane to whoever is active.
    """

    def __init__(self) -> None:
        """Nothing was looked at or heard."""
        self._heard_at: float | None = None
        self.looked_at: float | None = None  # when the last successful look at everything began
        self._checked_at = float("-inf")
        self._not_before = float("-inf")
        self._lull_ended = float("-inf")
        self._doubted = False
        self.possible = True  # False once the integration said that it can't look

    def heard(self, now: float) -> None:
        """An event came."""
        if self._heard_at is None or now - self._heard_at > LULL_SECONDS:
            self._lull_ended = now
        self._heard_at = now

    @property
    def acting(self) -> bool:
        """Whether we are the active instance as far as we know."""
        return self._heard_at is not None

    @property
    def known(self) -> bool:
        """Whether everything was read since the last lull or doubt: only then may more be held."""
        if not self.possible:
            return True
        return not self._doubted and self.looked_at is not None and self.looked_at >= self._lull_ended

    def due(self, now: float) -> float:
        """Seconds until the next look; 0 or less: now."""
        if not self.possible:
            return float("inf")
        return max(self._wanted_at(now), self._not_before) - now

    def everything(self, now: float) -> bool:
        """Whether the look that is due is one at everything."""
        return not self.known or now - (self.looked_at or 0.0) >= LOOK_SECONDS

    def _wanted_at(self, now: float) -> float:
        if not self.known:
            return now
        if self._heard_at is None or now - self._heard_at > LOOK_SECONDS:
            return float("inf")
        return self._checked_at + CHECK_SECONDS

    def done(self, begun: float, now: float, *, everything: bool) -> None:
        """A look that began at `begun` succeeded."""
        self._checked_at = now
        if everything:
            self.looked_at = begun
            self._doubted = False

    def doubt(self) -> None:
        """What is held may not be what we know: nothing more is held until everything was read again."""
        self._doubted = True

    def failed(self, now: float, wait: float) -> None:
        """A look failed; the next one after `wait` seconds."""
        self._not_before = now + wait


class Worker:
    """Executes what is stored: in order for each target and topic, others go on while one fails."""

    def __init__(
        self,
        integration: Integration,
        store: ActionStore,
        leave_alone: Callable[[str], None],
        per_minute: float,
        dry_run: bool,
        by: str,
        clock: Callable[[], Now],
        tell: Callable[[TelemetryEvent], None],
    ) -> None:
        """Nothing runs before `start`; `by` names this instance in the marks that it sets."""
        self._integration, self._store, self._leave_alone = integration, store, leave_alone
        self._spacing = 60.0 / per_minute
        self._burst = max(1.0, per_minute / 60.0)
        self._tokens, self._filled_at = self._burst, clock().monotonic
        self._dry_run, self._by, self._clock, self._tell = dry_run, by, clock, tell
        self._changed = threading.Condition()
        self._lines = Lines()
        self._backoffs: dict[Line, Backoff] = {}
        self._full = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="virtbus-react", daemon=True)
        self.looks = LookSchedule()
        self._look_backoff = Backoff(f"react {integration.name}", ceiling=RETRY_CEILING_SECONDS)
        self.absent: dict[str, float] = {}  # host: when (monotonic) the control plane did not know it
        self.stale: set[str] = set()  # hosts that don't show what we last reported of them, or nothing
        self.failure: BaseException | None = None  # what ended the thread, if something did

    @property
    def stopping(self) -> bool:
        """Whether it was asked to end, or broke."""
        return self._stop.is_set()

    @property
    def dead(self) -> bool:
        """Whether the thread has ended."""
        return self._thread.ident is not None and not self._thread.is_alive()

    def start(self) -> None:
        """Take up what waits, and run."""
        self.take_up()
        self._thread.start()

    def take_up(self) -> None:
        """What waits in the store; holds on their way when we ended are for the first look to decide."""
        if type(self._integration).look is not Integration.look:
            self._store.doubt(self._clock().wall_ns / 1e9)
        for number, action, attempts in self._store.waiting():
            self._append(number, action, attempts)

    def stop(self) -> None:
        """End after the action in hand."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()

    def join(self) -> None:
        """Wait for the thread."""
        if self._thread.is_alive():
            self._thread.join()

    def heard(self, now: float) -> None:
        """An event came: we are the active instance."""
        known = self.looks.known
        self.looks.heard(now)
        if known and not self.looks.known:
            with self._changed:
                self._changed.notify_all()

    def put(self, entries: Sequence[Stored]) -> None:
        """Execute what was stored."""
        for number, action in entries:
            self._append(number, action, 0)

    def _append(self, number: int, action: Action, attempts: int) -> None:
        with self._changed:
            if self._lines.append((number, action, attempts)):
                self._changed.notify_all()

    @property
    def waiting(self) -> int:
        """Actions that are stored and not done."""
        return self._lines.waiting

    def has_room(self, *, listen: bool) -> bool:
        """Whether another event may be taken from the broker.

        Where heartbeats decide (`listen`), it always may: they come in the same order as the events. Then the
        oldest events that wait are given up; else the broker keeps what there is no room for.
        """
        waiting, full = self._lines.events, self._full
        if listen and waiting >= MOST_WAITING:
            self._give_up(waiting - MOST_WAITING + MOST_WAITING // 10 + 1)
        elif not listen:
            self._full = waiting >= (MOST_WAITING - MOST_WAITING // 10 if full else MOST_WAITING)
            if self._full != full:
                self._tell((EventsLeft if self._full else EventsTaken)(self._integration.name, waiting))
        return not self._full

    def _give_up(self, count: int) -> None:
        with self._changed:
            cut = self._lines.cut(count)
            for _, action, _ in cut:
                if line_of(action) not in self._lines:
                    self._backoffs.pop(line_of(action), None)
        why = f"{MOST_WAITING} events wait for the control plane, and newer ones came"
        given = self._store.give_up([number for number, *_ in cut], why, self._clock().wall_ns / 1e9)
        self._tell(EventsGivenUp(self._integration.name, len(given)))
        for number, action, attempts in cut:
            outcome, text = (Result.GIVEN_UP, why) if number in given else (Result.REPLACED, None)
            self._audit(action, outcome, text, attempts)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                if not self.step():
                    with self._changed:
                        wait = self._wait(self._clock().monotonic)
                        if wait > 0 and not self._stop.is_set():
                            self._changed.wait(None if wait == float("inf") else wait)
        except BaseException as error:  # noqa: BLE001 - `Reactor.run` raises it: a dead worker must not look healthy
            self.failure = error
            self._stop.set()

    def step(self) -> bool:
        """Look or execute once, whichever is due; False when nothing is. The thread does nothing else."""
        with self._changed:
            now = self._clock().monotonic
            if self._wait(now) > 0:
                return False
            taken = None if self.looks.due(now) <= 0 else self._lines.take(now)
            if taken is not None:
                self._tokens -= 1.0
        if taken is None:
            self._look()
            return True
        wait = self._turn(*taken)
        with self._changed:
            if wait is None:
                self._backoffs.pop(line_of(taken[1]), None)
            self._lines.end(self._clock().monotonic + (wait or 0.0), settled=wait is None)
        return True

    def _wait(self, now: float) -> float:
        """Seconds until something is due and the rate allows it; 0 or less: now."""
        self._tokens = min(self._burst, self._tokens + (now - self._filled_at) / self._spacing)
        self._filled_at = now
        action = max(self._lines.due_at() - now, (1.0 - self._tokens) * self._spacing)
        return min(self.looks.due(now), action)

    # ---- one action

    def _turn(self, number: int, action: Action, attempts: int) -> float | None:
        """Execute once; the wait before the next try, or None when it is settled."""
        if not self._store.is_waiting(number):
            self._audit(action, Result.REPLACED, None, attempts)
            return None
        if self._dry_run:
            self._audit(action, Result.WOULD, None, attempts)
            self._settle(number, action, Result.DONE, "dry run")
            return None
        self._store.tried(number)
        try:
            with code_of_others():
                result = self._integration.execute(action)
        except Exception as error:  # noqa: BLE001 - whatever a client library raises, the action stays stored
            return self._failed(number, action, attempts + 1, error)
        self._settle(number, action, Result.DONE, result)
        self._audit(action, Result.DONE, result, attempts + 1)
        return None

    def _failed(self, number: int, action: Action, attempts: int, error: Exception) -> float | None:
        name = self._integration.name
        missing = isinstance(error, TargetMissing)
        if isinstance(error, NotOurs) and not (missing and action.verb == REPORT):
            result = Result.MISSING if missing else Result.LEFT_ALONE
            if missing and action.verb == HOLD:  # it takes no place from those that can be held
                self._leave_alone(action.target)
                self.absent[action.target] = self._clock().monotonic
            self._settle(number, action, result, str(error))
            self._audit(action, result, str(error), attempts)
            return None
        refused = isinstance(error, VirtbusError) and not error.retryable and not missing
        broken = not isinstance(error, VirtbusError) and attempts >= MOST_SURPRISES
        if (refused and action.verb != RELEASE) or (broken and action.verb == EVENT):
            if action.verb == HOLD:  # a gateway may refuse what has had its effect, and that is held too
                self.looks.doubt()
            self._settle(number, action, Result.REFUSED, in_words(error))
            self._tell(ActionGivenUp(name, action.verb, action.target, action.why, action.key, error))
            return None
        backoff = self._backoffs.setdefault(
            line_of(action), Backoff(f"react {name}", ceiling=RETRY_CEILING_SECONDS)
        )
        wait = backoff.next_wait()
        seconds = round(wait, 3)
        if refused:
            self._tell(ReleaseRefused(name, action.target, action.why, attempts, seconds, error))
        elif missing:
            self._tell(TargetAwaited(name, action.target, error))
        else:
            self._tell(ActionFailed(name, action.verb, action.target, attempts, seconds, action.key, error))
        return wait

    def _settle(self, number: int, action: Action, result: Result, text: str) -> None:
        """Bookkeeping: the action and what it means for the hold, in one transaction."""
        state = "done" if result in (Result.DONE, Result.MISSING) else "refused"
        wall = self._clock().wall_ns / 1e9
        if action.verb not in (HOLD, RELEASE):
            self._store.finish(number, state, text, wall)
            return
        was, becomes = HoldState.RELEASING, HoldState.FREE
        if action.verb == HOLD:
            was, ends = HoldState.HOLDING, {Result.DONE: HoldState.HELD, Result.MISSING: HoldState.FREE}
            becomes = ends.get(result, HoldState.LEFT)
        if becomes is HoldState.LEFT:
            self._leave_alone(action.target)
        self._store.finish(number, state, text, wall, host=action.target, was=was, becomes=becomes)

    def _audit(self, action: Action, outcome: Result, result: str | None, attempts: int) -> None:
        name = self._integration.name
        self._tell(
            Audited(name, action.verb, action.target, outcome, action.why, result, attempts, action.key)
        )

    # ---- what is held

    def _look(self) -> None:
        now = self._clock()
        everything, known = self.looks.everything(now.monotonic), self.looks.known
        rows = self._store.rows()
        held = {host: row.target for host, row in rows.items() if row.ours}
        others: list[str] = [*rows, *self._store.conditions()] if everything else []
        asked = {**dict.fromkeys(others), **held}
        acting = self.looks.acting and not self._dry_run
        try:
            with code_of_others():
                found = self._integration.look(asked, everything=everything) if everything or held else None
        except Exception as error:  # noqa: BLE001 - whatever a client library raises, we look again
            wait = self._look_backoff.next_wait()
            self.looks.failed(self._clock().monotonic, wait)
            self._tell(LookFailed(self._integration.name, round(wait, 3), error))
            return
        self._look_backoff.reset()
        if everything and found is None:
            self.looks.possible = False
            return
        if found is not None:
            stored = {host: json.loads(text).get("status") for host, text in self._store.conditions().items()}
            if acting:
                self.stale |= {host for host, status in found.shown.items() if stored.get(host) != status}
            for change in self._store.reconcile(
                found,
                asked=None if everything else asked,
                acting=acting,
                known=known,
                wall=now.wall_ns / 1e9,
            ):
                self._corrected(change, now)
        self.looks.done(now.monotonic, self._clock().monotonic, everything=everything)

    def _corrected(self, change: Change, now: Now) -> None:
        row = change.row
        if change.finding is not None:
            self._tell(
                HoldFound(
                    self._integration.name, change.finding, row.host, row.target, row.why,
                    _FOLLOWS[change.finding],
                )
            )  # fmt: skip
        if change.finding is Finding.REMOVED_BY_HAND:
            self._leave_alone(row.host)
        if change.again:
            self.hold(row, now)

    # ---- decisions

    def hold(self, row: Row, now: Now) -> None:
        """Store and set a hold, or set it once more, with what its mark has to say."""
        body = {"target": row.target, "since": row.since, "times": row.times, "by": self._by}
        key = f"{HOLD}/{row.host}/{uuid7(now.wall_ns)}"
        action = Action(key, row.host, HOLD, row.why, body, topic=HOLD_TOPIC)
        self._decide(replace(row, state=HoldState.HOLDING), action, now)

    def release(self, row: Row, why: str, now: Now) -> None:
        """Store and end a hold, by the name it was set under."""
        key = f"{RELEASE}/{row.host}/{uuid7(now.wall_ns)}"
        action = Action(key, row.host, RELEASE, why, {"target": row.target}, topic=HOLD_TOPIC)
        self._decide(replace(row, state=HoldState.RELEASING), action, now)

    def _decide(self, row: Row, action: Action, now: Now) -> None:
        entry = self._store.decide(row, action, now.wall_ns / 1e9)
        self.put([] if entry is None else [entry])
