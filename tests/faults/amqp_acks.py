"""Random schedules of acks, nacks, returns, closes and silence: nothing may be confirmed that was not.

    python -m tests.faults.amqp_acks [schedules] [workers]

A schedule is one run of a hypothesis state machine against the fake peer: what it does about each publish is
drawn, and so is what it says in between. Prints one line.
"""

from __future__ import annotations

import multiprocessing
import sys
import threading
import time
from collections.abc import Sequence
from collections.abc import Set as AbstractSet

from hypothesis import HealthCheck, settings
from hypothesis import seed as with_seed
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from tests.faultkit import FakeAmqpConnection, FakeAmqpPeer, Published
from virtbus import telemetry
from virtbus.bus import BusOptions
from virtbus.bus.amqp.bus import AmqpBus
from virtbus.errors import BusUnavailable
from virtbus.model import Confirmed, Deferred, Outcome, Record
from virtbus.testing import ListFeed, records

CONFIRM_TIMEOUT = 0.03

# What the peer does about one publish; most are acks, so that a schedule gets somewhere.
REACTIONS = (
    "ack", "ack", "ack", "ack multiple", "hold", "hold", "ack the held in reverse", "ack the held at once",
    "ack late", "ack twice", "ack a settled tag", "ack a tag of the future", "nack", "nack multiple",
    "return and ack", "return and hold", "block for a moment", "close 404", "close 406", "close 403 topic",
    "close connection", "hang up", "say nothing any more",
)  # fmt: skip


class Peer:
    """Plays a plan, a reaction a publish; then it acks."""

    def __init__(self) -> None:
        self.plan: list[str] = []
        self.held: list[tuple[FakeAmqpConnection, Published]] = []
        self.settled: dict[int, list[int]] = {}
        self.wire = FakeAmqpPeer(self.react)

    def react(self, connection: FakeAmqpConnection, published: Published) -> None:
        reaction = self.plan.pop(0) if self.plan else "ack"
        tag, settled = published.tag, self.settled.setdefault(connection.number, [])
        mine = [one for one in self.held if one[0] is connection]
        if reaction.startswith("ack the held"):
            self.held = [one for one in self.held if one[0] is not connection]
            order = [one.tag for _, one in mine] + [tag]
            if reaction.endswith("reverse"):
                for one in reversed(order):
                    connection.ack(one)
            else:
                connection.ack(max(order), multiple=True)
        elif reaction in ("ack multiple", "nack multiple"):
            self.held = [one for one in self.held if one[0] is not connection]
            (connection.ack if reaction == "ack multiple" else connection.nack)(tag, multiple=True)
        elif reaction == "hold":
            self.held.append((connection, published))
        elif reaction == "ack late":
            timer = threading.Timer(1.5 * CONFIRM_TIMEOUT, connection.ack, [tag])
            timer.daemon = True
            timer.start()
        elif reaction == "nack":
            connection.nack(tag)
        elif reaction.startswith("return"):
            connection.return_(published)
            if reaction == "return and ack":
                connection.ack(tag)
        elif reaction == "close connection":
            connection.close_connection(320, "CONNECTION_FORCED")
        elif reaction.startswith("close"):
            code = int(reaction.split()[1])
            connection.close_channel(code, "access to topic refused" if code == 403 else "no")
        elif reaction == "hang up":
            connection.hang_up()
        elif reaction == "say nothing any more":
            connection.silent = True
        else:
            self._ack_oddly(reaction, connection, tag, settled)
        settled.append(tag)

    def _ack_oddly(self, reaction: str, connection: FakeAmqpConnection, tag: int, settled: list[int]) -> None:
        if reaction == "ack a settled tag" and settled:
            connection.ack(settled[0])
        elif reaction == "ack a tag of the future":
            connection.ack(tag + 1000)
        elif reaction == "block for a moment":
            connection.block()
            connection.unblock()
        connection.ack(tag)
        if reaction == "ack twice":
            connection.ack(tag)


class Checking(ListFeed):
    """Holds the bus to its promises while it publishes."""

    def take(self, limit: int, busy: AbstractSet[str]) -> Sequence[Record]:
        assert set(self._taken) <= set(busy), "a key under way was not busy"
        return super().take(limit, busy)


class AckSchedule(RuleBasedStateMachine):
    """One publisher, one peer, drawn reactions."""

    false_confirms = 0
    schedules = 0

    @initialize()
    def begin(self) -> None:
        type(self).schedules += 1
        self.peer = Peer()
        options = BusOptions(confirm_timeout=CONFIRM_TIMEOUT, connect_timeout=2.0, window=4)
        self.bus = AmqpBus(self.peer.wire.url, options=options)
        self.feed = Checking()

    @rule(
        count=st.integers(1, 8),
        keys=st.integers(1, 5),
        reactions=st.lists(st.sampled_from(REACTIONS), min_size=1, max_size=6),
    )
    def publish(self, count: int, keys: int, reactions: list[str]) -> None:
        self.peer.plan = reactions
        for record in records(count, keys=keys):
            self.feed.add(record)
        before = len(self.feed.outcomes)
        try:
            for record, outcome in self.bus.publish(self.feed):
                self.check(record, outcome)
                self.feed.settle(record, outcome, again=isinstance(outcome, Deferred))
        except BusUnavailable:
            assert len(self.feed.outcomes) == before
        assert not self.feed._taken, "a record was taken and has no outcome"

    @rule(tag=st.integers(0, 20), multiple=st.booleans())
    def stray_ack_of_what_is_not_under_way(self, tag: int, multiple: bool) -> None:
        # Never the next tag: a peer that acks what it has not read yet can't be told from one that has.
        if self.peer.wire.connections:
            connection = self.peer.wire.connections[-1]
            seen = len(self.peer.settled.get(connection.number, ()))
            connection.ack(tag if tag <= seen else 1000 + tag, multiple=multiple)

    @rule()
    def tick(self) -> None:
        self.bus.tick()

    @rule()
    def late_acks_of_all_that_was_held(self) -> None:
        held, self.peer.held = self.peer.held, []
        for connection, published in held:
            connection.ack(published.tag)

    def check(self, record: Record, outcome: Outcome) -> None:
        if isinstance(outcome, Confirmed) and not self.peer.wire.vouches_for(record.id):
            type(self).false_confirms += 1
            raise AssertionError(f"record {record.row} was reported confirmed and never was")
        assert isinstance(outcome, Outcome)

    @invariant()
    def the_order_of_each_key_is_kept(self) -> None:
        if not hasattr(self, "feed"):
            return
        for key in {record.key for record, _ in self.feed.outcomes}:
            ends = [
                record.attributes["id"]
                for record, outcome in self.feed.outcomes
                if record.key == key and isinstance(outcome, Confirmed)
            ]
            assert ends == sorted(ends), "confirmed out of order"  # ids are time-ordered

    def teardown(self) -> None:
        if hasattr(self, "bus"):
            self.bus.close()
            self.peer.wire.close()


def run(schedules: int, seed: int | None = None) -> tuple[int, int]:
    """Run so many; (schedules, false confirms). Raises what hypothesis finds."""
    AckSchedule.schedules = AckSchedule.false_confirms = 0
    telemetry.configure(level="error")
    machine = AckSchedule if seed is None else with_seed(seed)(AckSchedule)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=schedules,
            stateful_step_count=8,
            deadline=None,
            database=None,
            derandomize=seed is None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    return AckSchedule.schedules, AckSchedule.false_confirms


def _worker(task: tuple[int, int]) -> tuple[int, int, str]:
    try:
        return *run(*task), ""
    except BaseException as error:  # hypothesis' own are groups of many kinds
        return AckSchedule.schedules, max(1, AckSchedule.false_confirms), repr(error)


def main() -> None:
    """Print the line."""
    schedules = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    workers = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    begun = time.monotonic()
    share = -(-schedules // workers)
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        results = pool.map(_worker, [(share, number + 1) for number in range(workers)])
    ran, lies = sum(result[0] for result in results), sum(result[1] for result in results)
    for _, _, error in results:
        if error:
            print(error, file=sys.stderr)
    print(f"fake-peer schedules={ran} false_confirms={lies} seconds={time.monotonic() - begun:.0f}")
    sys.exit(0 if lies == 0 and ran >= schedules else 1)


if __name__ == "__main__":
    main()
