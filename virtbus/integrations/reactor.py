"""The common half of every integration: believe, fold, decide, store, act, tell.

The main thread consumes: each event is folded into the fleet, and what it calls for is stored before it is
acknowledged. Once a second the fleet is judged and what changes is stored. The worker thread executes what
is stored, in order for each target, until it succeeds.
"""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from typing import ClassVar

from virtbus.consumer import Consumer, Delivery
from virtbus.envelope import uuid7
from virtbus.errors import VirtbusError
from virtbus.fleet import Fleet, HostHealth, Publishers
from virtbus.fleet.believing import believed
from virtbus.integrations.base import HOLD, RELEASE, REPORT, Action, Integration, NotOurs
from virtbus.integrations.policy import Decision, HoldPolicy
from virtbus.integrations.store import ActionStore
from virtbus.model import Clock, Now
from virtbus.retry import Backoff
from virtbus.telemetry import TelemetryEvent, emit

__all__ = ["ActionGivenUp", "Audited", "Disbelieved", "Reactor", "Withheld", "believed"]

RETRY_CEILING_SECONDS = 60.0
_BATCH = 64
_BATCH_SECONDS = 0.05
_JUDGE_SECONDS = 1.0
_MOST_WAITING = 10_000


@dataclass(frozen=True, slots=True)
class Audited(TelemetryEvent):
    """One action of an integration and what became of it: the audit line."""

    MESSAGE: ClassVar[str] = "action"
    integration: str
    verb: str
    target: str
    outcome: str  # "done", "would" (a dry run), "replaced"
    why: str
    result: str | None
    attempts: int
    key: str


@dataclass(frozen=True, slots=True)
class ActionFailed(TelemetryEvent):
    """An action did not succeed; it is tried again."""

    LEVEL: ClassVar[str] = "warning"
    MESSAGE: ClassVar[str] = "action failed and is tried again"
    LIMIT_SECONDS: ClassVar[float] = 10.0
    integration: str
    verb: str
    target: str
    attempts: int
    wait_seconds: float
    key: str
    error: Exception

    def limit_key(self) -> object:
        """A target at a time."""
        return self.target


@dataclass(frozen=True, slots=True)
class ActionGivenUp(TelemetryEvent):
    """An action was refused for good: somebody has to look."""

    LEVEL: ClassVar[str] = "error"
    MESSAGE: ClassVar[str] = "action refused and given up"
    integration: str
    verb: str
    target: str
    why: str
    key: str
    error: Exception

    def limit_key(self) -> object:
        """Every one is told."""
        return self.key


@dataclass(frozen=True, slots=True)
class Withheld(TelemetryEvent):
    """Hosts that should be held, but the limit does not allow more."""

    LEVEL: ClassVar[str] = "error"
    MESSAGE: ClassVar[str] = "the limit of held hosts keeps more from being held (react.max_share)"
    LIMIT_SECONDS: ClassVar[float] = 60.0
    integration: str
    held: int
    hosts: str


@dataclass(frozen=True, slots=True)
class Disbelieved(TelemetryEvent):
    """An event that its publisher may not send."""

    LEVEL: ClassVar[str] = "error"
    MESSAGE: ClassVar[str] = "an event is not believed: its publisher may not speak for that host or agent"
    LIMIT_SECONDS: ClassVar[float] = 1.0
    publisher: str | None
    host: str | None
    source: str
    id: str

    def limit_key(self) -> object:
        """A publisher at a time."""
        return (self.publisher, self.host)


class Reactor:
    """Runs one integration on one consumer until `stop`."""

    def __init__(
        self,
        integration: Integration,
        *,
        consumer: Consumer,
        store: ActionStore,
        fleet: Fleet,
        policy: HoldPolicy,
        publishers: Sequence[str] = (),
        actions_per_minute: float = 600.0,
        dry_run: bool = False,
        clock: Callable[[], Now] | None = None,
        tell: Callable[[TelemetryEvent], None] = emit,
    ) -> None:
        """The parts are made, and closed, by the caller; `tell` gets every audit line."""
        self._integration, self._consumer, self._store = integration, consumer, store
        self.fleet, self._policy, self._publishers = fleet, policy, Publishers(publishers)
        self._clock = clock or Clock()
        self._tell = tell
        self._worker = _Worker(
            integration, store, policy.leave_alone, actions_per_minute, dry_run, self._clock, tell
        )
        self._batch: list[tuple[Delivery, Action | None]] = []
        self._batch_since = 0.0
        self._judged_at = float("-inf")
        self._shown = store.conditions()

    def run(self) -> None:
        """Until `stop`. Raises BusDenied where waiting can't help (another instance took over, say), and
        sqlite3.Error when its state can't be written.
        """
        self._worker.start()
        try:
            while not self._worker.stopping:
                self.step(_BATCH_SECONDS if self._batch else 0.2)
        finally:
            self.stop()
            self._worker.join()
        if self._worker.failure is not None:
            raise self._worker.failure

    def stop(self) -> None:
        """End `run`; from another thread or a signal. What is stored is done at the next start."""
        self._consumer.stop()
        self._worker.stop()

    def step(self, timeout: float) -> None:
        """Take one event, and judge when it is time; `run` does nothing else."""
        if self._worker.waiting >= _MOST_WAITING:
            time.sleep(min(timeout, 0.2))  # the control plane is slow: the events wait in the broker
        else:
            delivery = self._consumer.receive(timeout)
            if delivery is not None:
                self._take(delivery)
        now = self._clock()
        if self._batch and (
            len(self._batch) >= _BATCH or now.monotonic - self._batch_since >= _BATCH_SECONDS
        ):
            self._store_batch(now)
        if now.monotonic - self._judged_at >= _JUDGE_SECONDS:
            self._judged_at = now.monotonic
            self._judge(now)

    # ---- events

    def _take(self, delivery: Delivery) -> None:
        host = None if delivery.event is None or delivery.event.host is None else delivery.event.host.name
        why = self._publishers.refuses(delivery.publisher, delivery.source, host)
        if why is not None:
            self._tell(Disbelieved(delivery.publisher, host, delivery.source, delivery.id))
            delivery.dead_letter(why)
            return
        now = self._clock()
        if delivery.event is not None:
            self.fleet.saw(delivery.event, delivery.attributes, now)
        if not self._batch:
            self._batch_since = now.monotonic
        self._batch.append((delivery, self._integration.wants(delivery)))

    def _store_batch(self, now: Now) -> None:
        """Effect first, ack after: what the events call for is on disk before they are acknowledged."""
        batch, self._batch = self._batch, []
        actions = [action for _, action in batch if action is not None]
        if actions:
            self._worker.put(self._store.add(actions, now.wall_ns / 1e9))
        for delivery, _ in batch:
            delivery.ack()

    # ---- hosts

    def _judge(self, now: Now) -> None:
        if not self._integration.holds and type(self._integration).condition is Integration.condition:
            return
        view = self.fleet.view(now)
        self._show(view.hosts, now)
        if not self._integration.holds:
            return
        wall = now.wall_ns / 1e9
        held = self._store.held()
        for decision in self._policy.decide(view, held, now.monotonic, wall):
            self._worker.put([one for one in [self._decided(decision, now)] if one is not None])
        if self._policy.withheld:
            hosts = ", ".join(self._policy.withheld[:10])
            self._tell(Withheld(self._integration.name, len(held), hosts))

    def _decided(self, decision: Decision, now: Now) -> tuple[int, Action] | None:
        wall = now.wall_ns / 1e9
        verb = HOLD if decision.hold else RELEASE
        key = f"{verb}/{decision.host}/{uuid7(now.wall_ns)}"
        action = Action(key, decision.host, verb, decision.why, {}, topic="hold")
        if decision.hold:
            before, released_at = self._store.last_hold(decision.host)
            times = self._policy.times(before, released_at, wall)
            return self._store.hold(decision.host, action, times, wall)
        return self._store.release(decision.host, action, wall)

    def _show(self, hosts: Sequence[HostHealth], now: Now) -> None:
        entries = []
        for host in hosts:
            condition = self._integration.condition(host)
            if condition is None:
                continue
            text = json.dumps(dict(condition), sort_keys=True)
            if self._shown.get(host.name) == text:
                continue
            self._shown[host.name] = text
            key = f"{REPORT}/{host.name}/{uuid7(now.wall_ns)}"
            action = Action(key, host.name, REPORT, condition.get("message", ""), condition, topic="report")
            entries.append((host.name, text, action))
        if entries:
            self._worker.put(self._store.show(entries, now.wall_ns / 1e9))


class _Worker:
    """Executes what is stored: in order for each target, other targets go on while one fails."""

    def __init__(
        self,
        integration: Integration,
        store: ActionStore,
        leave_alone: Callable[[str], None],
        per_minute: float,
        dry_run: bool,
        clock: Callable[[], Now],
        tell: Callable[[TelemetryEvent], None],
    ) -> None:
        self._integration, self._store, self._leave_alone = integration, store, leave_alone
        self._spacing = 60.0 / per_minute
        self._burst = max(1.0, per_minute / 60.0)
        self._tokens, self._filled_at = self._burst, time.monotonic()
        self._dry_run, self._clock, self._tell = dry_run, clock, tell
        self._changed = threading.Condition()
        self._queues: dict[str, deque[tuple[int, Action, int]]] = {}
        self._due: list[tuple[float, int, str]] = []  # when, number, target
        self._backoffs: dict[str, Backoff] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="virtbus-react", daemon=True)
        self.waiting = 0
        self.failure: Exception | None = None  # what ended the thread, if something did

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def start(self) -> None:
        for number, action, attempts in self._store.waiting():
            self._append(number, action, attempts)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        with self._changed:
            self._changed.notify_all()

    def join(self) -> None:
        if self._thread.is_alive():
            self._thread.join()

    def put(self, entries: Sequence[tuple[int, Action]]) -> None:
        for number, action in entries:
            self._append(number, action, 0)

    def _append(self, number: int, action: Action, attempts: int) -> None:
        with self._changed:
            self.waiting += 1
            queue = self._queues.get(action.target)
            if queue is None:
                queue = self._queues[action.target] = deque()
                heappush(self._due, (0.0, number, action.target))
                self._changed.notify_all()
            queue.append((number, action, attempts))

    def _run(self) -> None:
        try:
            self._work()
        except Exception as error:  # noqa: BLE001 - `Reactor.run` raises it: a dead worker must not look healthy
            self.failure = error
            self._stop.set()

    def _work(self) -> None:
        while not self._stop.is_set():
            target = self._next()
            if target is None:
                return
            number, action, attempts = self._queues[target][0]
            wait = self._turn(number, action, attempts)
            with self._changed:
                queue = self._queues[target]
                if wait is None:
                    queue.popleft()
                    self.waiting -= 1
                    self._backoffs.pop(target, None)
                else:
                    queue[0] = (number, action, attempts + 1)
                if queue:
                    heappush(self._due, (time.monotonic() + (wait or 0.0), queue[0][0], target))
                else:
                    del self._queues[target]

    def _next(self) -> str | None:
        """The target whose turn it is, once the rate allows; None at the end."""
        with self._changed:
            while not self._stop.is_set():
                now = time.monotonic()
                self._tokens = min(self._burst, self._tokens + (now - self._filled_at) / self._spacing)
                self._filled_at = now
                if not self._due:
                    self._changed.wait()
                elif self._due[0][0] > now:
                    self._changed.wait(self._due[0][0] - now)
                elif self._tokens < 1.0:
                    self._stop.wait((1.0 - self._tokens) * self._spacing)
                else:
                    self._tokens -= 1.0
                    return heappop(self._due)[2]
        return None

    def _turn(self, number: int, action: Action, attempts: int) -> float | None:
        """Execute once; the wait before the next try, or None when it is settled."""
        name = self._integration.name
        if not self._store.is_waiting(number):
            self._audit(action, "replaced", None, attempts)
            return None
        if self._dry_run:
            self._audit(action, "would", None, attempts)
            self._settle(number, "done", "dry run")
            return None
        self._store.tried(number)
        try:
            result = self._integration.execute(action)
        except NotOurs as error:
            self._left(action)
            self._audit(action, "left alone", str(error), attempts + 1)
            self._settle(number, "refused", str(error))
            return None
        except Exception as error:  # noqa: BLE001 - whatever a client library raises, the action stays stored
            if isinstance(error, VirtbusError) and not error.retryable:
                self._left(action)
                self._tell(ActionGivenUp(name, action.verb, action.target, action.why, action.key, error))
                self._settle(number, "refused", str(error))
                return None
            backoff = self._backoffs.setdefault(
                action.target, Backoff(f"react {name}", ceiling=RETRY_CEILING_SECONDS)
            )
            wait = backoff.next_wait()
            failed = ActionFailed(
                name, action.verb, action.target, attempts + 1, round(wait, 3), action.key, error
            )
            self._tell(failed)
            return wait
        self._settle(number, "done", result)
        self._audit(action, "done", result, attempts + 1)
        return None

    def _left(self, action: Action) -> None:
        if action.verb == HOLD:
            self._store.release(action.target, None, self._clock().wall_ns / 1e9)
            self._leave_alone(action.target)

    def _settle(self, number: int, state: str, result: str) -> None:
        self._store.finish(number, state, result, self._clock().wall_ns / 1e9)

    def _audit(self, action: Action, outcome: str, result: str | None, attempts: int) -> None:
        self._tell(
            Audited(
                self._integration.name,
                action.verb,
                action.target,
                outcome,
                action.why,
                result,
                attempts,
                action.key,
            )
        )
