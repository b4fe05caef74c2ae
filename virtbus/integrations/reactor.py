"""The common half of every integration: believe, fold, decide, store, act, audit.

The main thread consumes: each event is folded into the fleet, and what it calls for is stored before it is
acknowledged. Once a second the fleet is judged and what changes is stored. The worker thread executes what
is stored, in order for each target, until it succeeds, and reads from the control plane what is held.
"""

from __future__ import annotations

import json
import math
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from virtbus.consumer import Consumer, Delivery
from virtbus.envelope import uuid7
from virtbus.errors import BusUnavailable
from virtbus.fleet import Fleet, FleetView, HostHealth, Publishers
from virtbus.integrations.base import REPORT, Action, Integration, code_of_others
from virtbus.integrations.holds import HoldState, Row, in_words, not_ahead, orphaned, renamed
from virtbus.integrations.policy import Decision, HoldPolicy
from virtbus.integrations.store import ActionStore
from virtbus.integrations.telemetry import REACT, Disbelieved, EventPutAside, Withheld
from virtbus.integrations.worker import Worker
from virtbus.model import Clock, Heartbeat, Now
from virtbus.telemetry import TelemetryEvent, Trouble, emit

_BATCH = 64
_BATCH_SECONDS = 0.05
_JUDGE_SECONDS = 1.0
_ABSENT_SECONDS = 60.0  # a host that the control plane does not know is not tried again before
LISTEN_SECONDS = 3600.0  # the longest heartbeat interval: who was not heard for so long does not speak
_DEAF_SECONDS = 2 * LISTEN_SECONDS
_NOTE_SECONDS = 60.0  # how often it is written down that a held host was heard
# What an action's own text or numbers make SQLite's binding raise; a disk that is full ends the run instead.
_UNSTORABLE = (ValueError, TypeError, OverflowError, sqlite3.DataError, sqlite3.InterfaceError)


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
        by: str = "",
        clock: Callable[[], Now] | None = None,
        tell: Callable[[TelemetryEvent], None] = emit,
    ) -> None:
        """The parts are made, and closed, by the caller; `tell` gets every audit line.

        `by` names this instance in what it marks.
        """
        self._integration, self._consumer, self._store = integration, consumer, store
        self.fleet, self._policy = fleet, policy
        self._publishers = Publishers(publishers, store.owners)
        self._clock = clock or Clock()
        self._tell = tell
        self._worker = Worker(
            integration, store, policy.leave_alone, actions_per_minute, dry_run, by, self._clock, tell
        )
        self._batch: list[tuple[Delivery, Action | None]] = []
        self._batch_since = 0.0
        self._judged_at = float("-inf")
        self._noted_at = float("-inf")
        self._listening_since = math.inf
        self._heartbeat_at = self._begun = self._clock().monotonic
        self._shown = store.conditions()
        self._witnessed = self.fleet.witnessed = store.witnessed()
        for row in store.rows().values():
            if row.state is HoldState.LEFT:
                policy.leave_alone(row.host)
        self._shows = type(integration).condition is not Integration.condition
        REACT.begin(integration.name, self._heartbeat_age, self._look_age)

    def run(self) -> None:
        """Until `stop`. Raises BusDenied where waiting can't help (another instance took over, say), and
        sqlite3.Error when its state can't be written.
        """
        self._worker.start()
        try:
            while not self._worker.stopping:
                self.step(0.0 if self._batch else 0.2)
        finally:
            self.stop()
            self._worker.join()
        if self._worker.failure is not None:
            raise self._worker.failure

    def stop(self) -> None:
        """End `run`; from another thread or a signal. What is stored is done at the next start."""
        self._consumer.stop()
        self._worker.stop()

    # ---- watched

    def dead(self) -> Sequence[str]:
        """Threads that have ended; empty while it runs."""
        return (f"react-{self._integration.name}",) if self._worker.dead else ()

    def not_ready(self) -> Sequence[str]:
        """Why it can't act yet. A broker that is away is not a reason: a restart would not help."""
        looks = self._worker.looks
        if looks.possible and looks.looked_at is None and self._acts_on_hosts():
            return (f"{self._integration.name}: what is held was not read from the control plane yet",)
        return ()

    def _heartbeat_age(self) -> float:
        return self._clock().monotonic - self._heartbeat_at

    def _is_deaf(self, now: Now) -> bool:
        """No agent is heard, not even one that beats as seldom as it may."""
        return now.monotonic - self._heartbeat_at > _DEAF_SECONDS

    def _look_age(self) -> float:
        if not self._worker.looks.possible:
            return math.nan  # it has no holds to be read: no age that grows
        looked = self._worker.looks.looked_at
        return self._clock().monotonic - (self._begun if looked is None else looked)

    def _acts_on_hosts(self) -> bool:
        return self._integration.holds or self._shows

    # ---- steps

    def step(self, timeout: float) -> None:
        """Take one event, and judge when it is time; `run` does nothing else."""
        has_room = self._worker.has_room(listen=self._acts_on_hosts())
        delivery = self._consumer.receive(timeout) if has_room else None
        if not has_room:
            time.sleep(min(timeout, 0.2))  # the control plane is slow: the events wait in the broker
        if delivery is not None:
            self._take(delivery)
        now = self._clock()
        # What came together is stored together; nothing waits for what may come.
        if self._batch and (
            delivery is None
            or len(self._batch) >= _BATCH
            or now.monotonic - self._batch_since >= _BATCH_SECONDS
        ):
            self._store_batch(now)
        if now.monotonic - self._judged_at >= _JUDGE_SECONDS:
            self._judged_at = now.monotonic
            self._judge(now)

    # ---- events

    def _take(self, delivery: Delivery) -> None:
        """Fold one event in. Whatever that raises puts this event aside; the others go on."""
        now = self._clock()
        self._worker.heard(now.monotonic)
        host = None if delivery.event is None or delivery.event.host is None else delivery.event.host.name
        why = self._publishers.refuses(delivery.publisher, delivery.source, host)
        if why is not None:
            self._tell(Disbelieved(delivery.publisher, host, delivery.source, delivery.id, why))
            self._put_aside(delivery, why)
            return
        try:
            if delivery.event is not None:
                self.fleet.saw(delivery.event, delivery.attributes, now)
            with code_of_others():
                action = self._integration.wants(delivery)
        except Exception as error:  # noqa: BLE001 - one event must not end the reactor
            self._unusable(delivery, error)
            return
        if isinstance(delivery.event, Heartbeat):
            if self._listening_since == math.inf or self._is_deaf(now):
                self._listening_since = now.monotonic
            self._heartbeat_at = now.monotonic
        if not self._batch:
            self._batch_since = now.monotonic
        self._batch.append((delivery, action))

    def _unusable(self, delivery: Delivery, error: Exception) -> None:
        self._tell(EventPutAside(self._integration.name, delivery.source, delivery.id, error))
        self._put_aside(delivery, in_words(error))

    def _put_aside(self, delivery: Delivery, reason: str) -> None:
        """A broker that takes no dead letter now gets it when the event comes again."""
        try:
            delivery.dead_letter(reason)
        except BusUnavailable as error:
            self._tell(Trouble("dead letter", error, event_id=delivery.id))

    def _store_batch(self, now: Now) -> None:
        """Effect first, ack after: what the events call for is on disk before they are acknowledged."""
        batch, self._batch = self._batch, []
        if self._stored(batch, now) is not None:  # one can't be stored (a text that is not UTF-8, say)
            for one in batch:
                if (error := self._stored([one], now)) is not None:
                    self._unusable(one[0], error)

    def _stored(self, batch: Sequence[tuple[Delivery, Action | None]], now: Now) -> Exception | None:
        """Store what a batch calls for and acknowledge it; the error of what can't be stored."""
        actions = [action for _, action in batch if action is not None]
        try:
            stored = self._store.add(actions, now.wall_ns / 1e9) if actions else []
        except _UNSTORABLE as error:
            return error
        self._worker.put(stored)
        for delivery, _ in batch:
            delivery.ack()
        return None

    # ---- hosts

    def _judge(self, now: Now) -> None:
        name = self._integration.name
        REACT.waiting.labels(name).set(self._worker.waiting)
        view = self.fleet.view(now)
        REACT.show_fleet(name, view)
        if not self._acts_on_hosts():
            return
        self._witness(view)
        if self._shows:
            self._show(view.hosts, now)
        if not self._integration.holds:
            return
        rows = self._store.rows()
        ours = {host: row for host, row in rows.items() if row.ours}
        REACT.show_holds(name, [row.why for row in ours.values()])
        REACT.releasing.labels(name).set(sum(row.state is HoldState.RELEASING for row in ours.values()))
        if not self._worker.looks.known:
            return  # what is held is not known: nothing more is held, nothing is given back
        for row, host in list(renamed(rows.values(), view)):
            rows[host] = self._rename(rows.pop(row.host), host, now)
            if ours.pop(row.host, None) is not None:
                ours[host] = rows[host]
        self._note_heard(ours, view, now)
        for host in [
            host for host, since in self._worker.absent.items() if now.monotonic - since >= _ABSENT_SECONDS
        ]:
            del self._worker.absent[host]
            self._policy.left_alone.discard(host)  # whether it is there by now, its next hold shows
        self._decide(view, rows, ours, now)
        self._give_back_orphans(ours, view, now)
        for row in rows.values():
            if row.state is HoldState.LEFT and row.host not in self._policy.left_alone:
                self._store.put(replace(row, state=HoldState.FREE))  # well once: ours to decide again

    def _witness(self, view: FleetView) -> None:
        """After a restart nobody could say who else had a trouble when it began."""
        if view.own != self._witnessed:
            self._witnessed = view.own
            self._store.witness(view.own)

    def _rename(self, row: Row, host: str, now: Now) -> Row:
        """The row under its host's other name; what is on its way goes on under that."""
        self._store.rename(row, host)
        known = replace(row, host=host)
        if row.state is HoldState.HOLDING:
            self._worker.hold(known, now)
        elif row.state is HoldState.RELEASING:
            self._worker.release(known, row.why, now)
        elif row.state is HoldState.LEFT:
            self._policy.leave_alone(host)
        return known

    def _decide(self, view: FleetView, rows: Mapping[str, Row], ours: Mapping[str, Row], now: Now) -> None:
        held = {host: row.times for host, row in ours.items()}
        decisions = self._policy.decide(view, held, now.monotonic)
        well = {decision.host for decision in decisions if not decision.hold}
        for decision in decisions:
            if decision.hold:
                self._hold(decision, rows.get(decision.host), view, now)
            elif ours[decision.host].state is not HoldState.RELEASING:
                self._worker.release(ours[decision.host], decision.why, now)
        heard = {host.name for host in view.hosts}
        for row in ours.values():
            if row.state is HoldState.RELEASING and row.host in heard and row.host not in well:
                self._worker.hold(row, now)  # no longer well, and the release has not succeeded
        REACT.withheld.labels(self._integration.name).set(len(self._policy.withheld))
        if self._policy.withheld:
            hosts = ", ".join(self._policy.withheld[:10])
            self._tell(Withheld(self._integration.name, len(held), hosts))

    def _hold(self, decision: Decision, before: Row | None, view: FleetView, now: Now) -> None:
        wall = now.wall_ns / 1e9
        times, released_at = (0, None) if before is None else (before.times, before.released_at)
        host = view.host(decision.host)
        row = Row(
            decision.host,
            HoldState.HOLDING,
            wall,
            self._policy.times(times, released_at, wall),
            decision.why,
            agent="" if host is None else host.agent_id,
            heard_at=wall,
            released_at=released_at,
        )
        self._worker.hold(row, now)

    def _note_heard(self, ours: Mapping[str, Row], view: FleetView, now: Now) -> None:
        """Write down who speaks for what is held: after a restart that shows a renamed or dead host."""
        if now.monotonic - self._noted_at < _NOTE_SECONDS:
            return
        self._noted_at = now.monotonic
        wall = now.wall_ns / 1e9
        for row in ours.values():
            if not_ahead(row, wall) != row:
                self._store.put(not_ahead(row, wall))
        for host in view.hosts:
            if host.name in ours and host.state != "silent":
                self._store.heard(host.name, host.agent_id, wall)

    def _give_back_orphans(self, ours: Mapping[str, Row], view: FleetView, now: Now) -> None:
        listened = now.monotonic - self._listening_since >= LISTEN_SECONDS and not self._is_deaf(now)
        listened = listened and not view.suspect_ourselves
        for row, why in orphaned(ours.values(), view, now.wall_ns / 1e9, listened=listened):
            if row.state is not HoldState.RELEASING:
                self._worker.release(row, why, now)

    def _show(self, hosts: Sequence[HostHealth], now: Now) -> None:
        entries = []
        stale, self._worker.stale = self._worker.stale, set()
        for host in hosts:
            condition = self._integration.condition(host)
            # What was shown before stands until there is more to say than that it is too early.
            if condition is None or (host.early and host.name in self._shown):
                continue
            text = json.dumps(dict(condition), sort_keys=True)
            if self._shown.get(host.name) == text and host.name not in stale:
                continue
            self._shown[host.name] = text
            key = f"{REPORT}/{host.name}/{uuid7(now.wall_ns)}"
            action = Action(key, host.name, REPORT, condition.get("message", ""), condition, topic="report")
            entries.append((host.name, text, action))
        if entries:
            self._worker.put(self._store.show(entries, now.wall_ns / 1e9))
