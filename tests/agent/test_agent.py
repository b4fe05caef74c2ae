"""The agent's threads between a source, a spool and a bus: what goes in comes out, or is told."""

from __future__ import annotations

import io
import sqlite3
import threading
import time
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest

from tests.waiting import wait_until
from virtbus import telemetry
from virtbus.agent.agent import Agent, AgentOptions
from virtbus.agent.identity import load_agent_id
from virtbus.agent.incidents import IncidentLimits, Incidents
from virtbus.agent.queue import IntakeQueue
from virtbus.envelope import uuid7
from virtbus.errors import BusUnavailable, SourceDenied, SpoolFull
from virtbus.model import Confirmed, Deferred, IoError, Refused, Unroutable, to_ns
from virtbus.observations import DomainGone, SourceLost, SourceReady
from virtbus.spool import Spool, SpoolLimits
from virtbus.spool.committing import Committer
from virtbus.telemetry import METRICS
from virtbus.testing import FakeBus, FakeSource, a_host, a_raw_io_error, no_waiting

AGENT = "11111111-2222-4333-8444-555555555555"


class House:
    """An agent on fakes and a real spool."""

    def __init__(
        self,
        folder: Path,
        script: Any = (),
        decide: Any = None,
        limits: IncidentLimits | None = None,
        source: Any = None,
        libvirt_absent: Any = lambda: False,
        **options: Any,
    ) -> None:
        limits = limits or IncidentLimits()
        self.source = source or FakeSource(script)
        self.bus = FakeBus(decide) if decide else FakeBus()
        self.folder = folder
        self.spool = Spool.open(folder, limits=SpoolLimits(), agent_id=AGENT)
        self.agent = Agent(
            source=self.source,
            bus=self.bus,
            spool=self.spool,
            incidents=Incidents(limits, new_id=lambda: uuid7(time.time_ns())),
            agent_id=AGENT,
            libvirt_absent=libvirt_absent,
            options=AgentOptions(
                **{"heartbeat_seconds": 0.0, "drain_seconds": 5.0, "fold": limits.fold, **options}
            ),
        )

    def start(self) -> House:
        self.agent.start()
        return self

    def delivered(self, kind: str = "") -> list[dict[str, Any]]:
        return [
            {**record.attributes, "data": msgspec.json.decode(record.body)}
            for record in list(self.bus.delivered)
            if kind in record.attributes["type"]
        ]

    def wait(self, kind: str, count: int = 1) -> list[dict[str, Any]]:
        wait_until(lambda: len(self.delivered(kind)) >= count, what=f"{count} {kind}")
        return self.delivered(kind)

    def counted(self) -> int:
        return sum(event["data"]["occurrences"]["count"] for event in self.delivered("io_error.v1"))

    def end(self) -> None:
        self.agent.stop()
        self.agent.join()


def test_the_first_event_of_every_start_says_how_long_nobody_looked(house):
    first = house(a_raw_io_error())
    opening, error = first.wait("", 2)
    assert (opening["sequence"], opening["data"]["reason"]) == ("000000000001", "agent_down")
    assert opening["data"]["previous"] is None
    assert error["sequence"] == "000000000002"
    first.end()
    second = house()
    (gap,) = second.wait("gap")
    assert gap["data"]["previous"] == {"epoch": opening["epoch"], "last_sequence": 2}
    assert gap["data"]["started_at"] <= gap["data"]["ended_at"]
    assert gap["epoch"] != opening["epoch"]


def test_a_source_that_is_not_there_does_not_hold_up_the_backlog(house, monkeypatch):
    monkeypatch.setattr("virtbus.agent.intake.SOURCE_GRACE_SECONDS", 0.2)
    monkeypatch.setattr(FakeSource, "run", lambda self, sink, stop: stop.wait())
    one = house()
    (gap,) = one.wait("gap")
    assert gap["data"]["reason"] == "agent_down"
    assert one.agent.not_ready() == ["source is starting"]
    # When it comes at last, what lies between is a gap of its own.
    one.agent.queue.put(SourceReady(a_host(), time.time_ns(), ()))
    assert one.wait("gap", 2)[1]["data"]["reason"] == "source_lost"
    assert one.agent.not_ready() == []


def test_a_host_that_needs_no_libvirt_is_ready_without_it_wherever_that_is_asked(house, monkeypatch):
    monkeypatch.setattr("virtbus.agent.intake.SOURCE_GRACE_SECONDS", 0.2)
    monkeypatch.setattr(FakeSource, "run", lambda self, sink, stop: stop.wait())
    absent = True
    one = house(libvirt_absent=lambda: absent)
    one.wait("gap")
    # /readyz and `virtbus status` ask not_ready, systemd shows summary; the metric says why.
    assert one.agent.not_ready() == one.agent.status()["not_ready"] == []
    assert one.agent.summary() == "no libvirt on this host; 0 events wait; 0 incidents open"
    assert one.agent.not_observing() == ["source is starting"]
    assert METRICS.registry.get_sample_value("virtbus_source_absent") == 1.0
    # That excuses the source, not the disk; and only as long as there is no libvirt.
    monkeypatch.setattr(one.agent.intake.writer, "troubles", lambda: ["spool: the disk is full"])
    assert one.agent.not_ready() == ["spool: the disk is full"]
    absent = False
    assert one.agent.not_ready() == ["source is starting", "spool: the disk is full"]


def test_before_its_start_no_agent_is_ready_although_its_pages_answer(tmp_path):
    one = House(tmp_path, libvirt_absent=lambda: True)
    assert one.agent.not_ready() == ["the agent is starting"]
    one.start()
    assert one.agent.not_ready() == []
    one.agent.stop()
    one.agent.join()


def test_being_cut_off_is_a_gap_from_the_last_sign_of_life_to_the_next_look(house):
    one = house()
    one.wait("gap")
    lost_ns = 1_000_000_000 * 10**9  # long before anything was seen
    one.source.play(SourceLost(lost_ns, "the daemon went away"))
    wait_until(lambda: one.agent.not_ready() == ["source is disconnected"])
    one.source.play(SourceReady(a_host(), lost_ns + 4 * 10**9, ()))
    gap = one.wait("gap", 2)[1]["data"]
    assert (gap["reason"], gap["detail"]) == ("source_lost", "the daemon went away")
    assert gap["started_at"] == "2001-09-09T01:46:40.000000Z"
    assert gap["ended_at"] == "2001-09-09T01:46:44.000000Z"


def test_a_storm_becomes_few_events_that_lose_no_count(house):
    one = house()
    one.wait("gap")
    one.source.play(*(a_raw_io_error() for _ in range(5000)))
    wait_until(lambda: one.counted() == 5000, what="all counts")
    assert len(one.delivered("io_error.v1")) < 20


def test_without_folding_each_callback_of_a_storm_is_an_event_of_its_own(house):
    one = house(limits=IncidentLimits(fold=False))
    one.wait("gap")
    one.source.play(*(a_raw_io_error() for _ in range(500)))
    events = one.wait("io_error.v1", 500)
    assert [event["data"]["occurrences"]["total"] for event in events] == list(range(1, 501))
    assert {event["data"]["occurrences"]["count"] for event in events} == {1}


@pytest.fixture
def hanging_disk(monkeypatch):
    """Between the two events that it gives, commits hang."""
    commit, hangs, goes_on = Committer.commit, threading.Event(), threading.Event()

    def waits(self, *words):
        if hangs.is_set():
            goes_on.wait(60)
        return commit(self, *words)

    monkeypatch.setattr(Committer, "commit", waits)
    yield hangs, goes_on
    goes_on.set()


def test_a_commit_that_hangs_costs_time_and_neither_memory_nor_a_count(hanging_disk, house):
    hangs, goes_on = hanging_disk
    one = house()
    one.wait("gap")
    dropped = METRICS.registry.get_sample_value("virtbus_dropped_total")
    hangs.set()
    one.source.play(*(a_raw_io_error(alias=f"disk{number % 7}") for number in range(60_000)))
    wait_until(lambda: one.source._more.empty(), timeout=30)
    assert one.counted() == 0
    assert len(one.agent.queue) <= 10_007
    goes_on.set()
    wait_until(lambda: one.counted() == 60_000, what="all counts", timeout=30)
    assert METRICS.registry.get_sample_value("virtbus_dropped_total") == dropped


def test_errors_that_found_no_room_are_named_with_their_number(hanging_disk, house, monkeypatch):
    monkeypatch.setattr("virtbus.agent.agent.IntakeQueue", lambda: IntakeQueue(limit=1, fold_limit=1))
    hangs, goes_on = hanging_disk
    one = house()
    one.wait("gap")
    hangs.set()
    one.source.play(*(a_raw_io_error(domain_uuid=uuid7(number)) for number in range(100)))
    wait_until(lambda: one.source._more.empty())
    goes_on.set()

    def named():
        gaps = [event["data"] for event in one.delivered("gap")]
        return sum(gap["missing_occurrences"] for gap in gaps if gap["reason"] == "observations_dropped")

    wait_until(lambda: one.counted() + named() == 100, what="all counts")
    assert named() > 0


def test_a_disk_that_fails_for_a_while_costs_no_count_and_is_told(house, monkeypatch):
    commit, broken = Committer.commit, threading.Event()

    def fails(self, *words):
        if broken.is_set():
            raise SpoolFull("the disk is full")
        return commit(self, *words)

    monkeypatch.setattr(Committer, "commit", fails)
    with no_waiting():
        one = house()
        one.wait("gap")
        dropped = METRICS.registry.get_sample_value("virtbus_dropped_total")
        broken.set()
        one.source.play(*(a_raw_io_error() for _ in range(30_000)))
        wait_until(lambda: one.agent.not_ready() == ["spool: the disk is full"])
        assert METRICS.registry.get_sample_value("virtbus_spool_writable") == 0
        wait_until(lambda: one.source._more.empty())
        assert len(one.agent.queue) <= 10_001
        broken.clear()
        wait_until(lambda: one.counted() == 30_000, what="all counts")
        reasons = [event["data"]["reason"] for event in one.delivered("gap")]
        assert "spool_unwritable" in reasons
        assert one.agent.not_ready() == []
        assert METRICS.registry.get_sample_value("virtbus_dropped_total") == dropped


def writable():
    return METRICS.registry.get_sample_value("virtbus_spool_writable")


def test_a_disk_that_fails_shows_before_the_first_error_needs_it(house, monkeypatch):
    monkeypatch.setattr("virtbus.agent.intake.ALIVE_SECONDS", 0.1)
    monkeypatch.setattr("virtbus.spool.committing.ALIVE_SECONDS", 0.1)
    broken = threading.Event()

    def grant(self):
        if broken.is_set():
            raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr("virtbus.spool.committing.Committer._grant", grant)
    one = house()
    one.wait("gap")
    wait_until(lambda: one.agent.not_ready() == [])
    assert writable() == 1
    broken.set()
    wait_until(lambda: any("disk I/O error" in reason for reason in one.agent.not_ready()))
    assert writable() == 0
    broken.clear()
    wait_until(lambda: one.agent.not_ready() == [])
    assert writable() == 1


@pytest.mark.parametrize("where", ["commit", "alive"])
def test_a_disk_that_hangs_shows_in_readiness_and_metric(house, monkeypatch, where):
    done, hangs, real = threading.Event(), threading.Event(), getattr(Committer, where)

    def hang(self, *words):
        if hangs.is_set():
            done.wait(60)
        return real(self, *words)

    monkeypatch.setattr(Committer, where, hang)
    one = house()
    one.wait("gap")
    wait_until(lambda: one.agent.not_ready() == [])
    hangs.set()
    one.source.play(a_raw_io_error())
    wait_until(lambda: one.agent.intake.writer.busy_since is not None)
    one.agent.intake.writer.busy_since -= 10.5  # as if it had hung for so long
    (reason,) = one.agent.not_ready()
    assert "a write has been hanging for 1" in reason
    assert writable() == 0
    assert one.agent.dead_threads() == []
    done.set()
    hangs.clear()
    wait_until(lambda: one.agent.not_ready() == [])
    assert writable() == 1


@pytest.mark.parametrize("commit_fails", [False, True])
def test_counts_that_wait_for_their_windows_end_are_told_by_the_next_start(house, monkeypatch, commit_fails):
    commit, broken, committed = Committer.commit, threading.Event(), {}

    def fails_once(self, events, states=None):
        if broken.is_set():
            broken.clear()
            raise SpoolFull("the disk is full")
        stamps = commit(self, events, states)
        committed.update(states or {})
        return stamps

    def waiting():
        kept = [msgspec.json.decode(state) for key, state in list(committed.items()) if "incident/" in key]
        return sum(pending["count"] for state in kept for pending in state.get("pending", ()))

    monkeypatch.setattr(Committer, "commit", fails_once)
    a_minute = IncidentLimits(first_window_seconds=60.0)
    error = a_raw_io_error()
    with no_waiting():
        one = house(error, limits=a_minute)
        (opened,) = one.wait("io_error.v1")
        if commit_fails:
            broken.set()
        one.source.play(*[error] * 100)
        wait_until(lambda: waiting() == 100, what="a commit of what waits")
        one.agent.abort()
        one.agent.join()
    two = house(limits=a_minute)
    two.source.play(DomainGone(error.domain_uuid, time.time_ns(), "domain_stopped"))
    (ended,) = two.wait("resolved")
    (update,) = [event for event in two.delivered("io_error.v1") if event["id"] != opened["id"]]
    assert update["data"]["occurrences"]["count"] == 100
    assert ended["data"]["occurrences"]["total"] == 101
    assert ended["data"]["incident"]["id"] == opened["data"]["incident"]["id"]


def test_a_state_that_cant_be_read_is_named_in_a_gap_and_the_agent_starts(house):
    one = house()
    one.wait("gap")
    one.end()
    with closing(Spool.open(one.folder, limits=SpoolLimits(), agent_id=AGENT)) as spool:
        spool.commit([], {"incident/guest/disk": b'{"format":2}'})
    two = house(a_raw_io_error())
    two.wait("io_error.v1")
    gaps = [event["data"] for event in two.wait("gap", 2)]
    assert [gap["reason"] for gap in gaps] == ["agent_down", "spool_damaged"]
    assert "incident/guest/disk" in gaps[1]["detail"]


def test_an_event_and_what_its_incident_remembers_of_it_are_in_one_commit(house, monkeypatch):
    commit, told, remembered = Committer.commit, [], []

    def notes(self, events, states=None):
        stamps = commit(self, events, states)
        for event in events:
            if isinstance(event, IoError):
                state = (states or {}).get(f"incident/{event.domain.uuid}/{event.device.alias}")
                told.append(event.occurrences.total)
                remembered.append(state and msgspec.json.decode(state)["told"])
        return stamps

    monkeypatch.setattr(Committer, "commit", notes)
    one = house(limits=IncidentLimits(first_window_seconds=0.05, max_window_seconds=0.05))
    one.wait("gap")
    for _ in range(5):
        one.source.play(*(a_raw_io_error() for _ in range(20)))
        time.sleep(0.1)
    wait_until(lambda: one.counted() == 100, what="all counts")
    assert len(told) >= 2
    assert remembered == told


def test_errors_of_a_storm_that_are_only_counted_share_a_commit(house, monkeypatch):
    commit, committed = Committer.commit, []

    def notes(self, events, states=None):
        stamps = commit(self, events, states)
        committed.extend(state for key, state in (states or {}).items() if "incident/" in key)
        return stamps

    monkeypatch.setattr(Committer, "commit", notes)
    monkeypatch.setattr("virtbus.agent.intake.GATHER_SECONDS", 0.5)
    one = house(a_raw_io_error(), limits=IncidentLimits(first_window_seconds=60.0))
    one.wait("io_error.v1")
    for _ in range(50):
        one.source.play(a_raw_io_error())
        time.sleep(0.002)

    def waiting():
        return sum(pending["count"] for pending in msgspec.json.decode(committed[-1]).get("pending", ()))

    wait_until(lambda: waiting() == 50, what="a commit with all that waits for its window")
    assert len(committed) < 10


def test_an_observation_that_cant_be_handled_is_named_and_the_next_one_goes_on(house, monkeypatch):
    one = house()
    one.wait("gap")
    apply = one.agent.incidents.apply

    def poisoned(observation, *words):
        if getattr(observation, "raw", None) and observation.raw.alias == "poison":
            raise RuntimeError("a bug")
        return apply(observation, *words)

    monkeypatch.setattr(one.agent.incidents, "apply", poisoned)
    one.source.play(a_raw_io_error(alias="poison"), a_raw_io_error())
    one.wait("io_error.v1")
    gap = one.wait("gap", 2)[1]["data"]
    assert (gap["reason"], gap["missing_occurrences"]) == ("observations_dropped", 1)
    assert gap["started_at"] < gap["ended_at"]  # it happened before it was handled


def test_a_broker_that_is_away_costs_nothing_but_time(house):
    one = house()
    one.bus.unavailable = BusUnavailable("no route")
    with no_waiting():
        one.source.play(a_raw_io_error())
        wait_until(lambda: one.spool.stats().pending >= 1)
        assert one.agent.not_ready() == []
        assert one.agent.dead_threads() == []
        wait_until(lambda: one.agent.status()["bus"]["error"] == "no route")
        one.bus.unavailable = None
        one.wait("io_error.v1")
    wait_until(lambda: one.spool.stats().pending == 0)


def test_what_nobody_is_bound_for_waits_and_other_domains_go_on(house):
    lonely = "aaaaaaaa-0000-4000-8000-000000000001"
    one = house(decide=lambda record: Unroutable() if record.key == lonely else Confirmed())
    one.source.play(a_raw_io_error(domain_uuid=lonely), a_raw_io_error())
    one.wait("io_error.v1")
    wait_until(lambda: one.agent.status()["spool"]["parked_keys"] == 1)
    assert one.spool.stats().pending == 1


def test_what_the_broker_refuses_is_set_aside_and_named_in_a_gap(house):
    def decide(record):
        return (
            Refused(BusUnavailable("too large"))
            if "io_error.v1" in record.attributes["type"]
            else Confirmed()
        )

    one = house(decide=decide)
    one.source.play(a_raw_io_error())
    gap = one.wait("gap", 2)[1]["data"]
    assert gap["reason"] == "dead_letter"
    assert gap["missing"] == [{"epoch": one.spool.epoch, "first": 2, "last": 2}]
    assert gap["missing_occurrences"] == 1
    assert one.agent.status()["spool"]["dead"] == 1


def test_a_deferred_event_is_sent_again_with_the_same_id(house):
    seen: list[str] = []

    def decide(record):
        seen.append(record.id)
        return Deferred(BusUnavailable("cut")) if len(seen) == 2 else Confirmed()

    with no_waiting():
        one = house(decide=decide)
        one.source.play(a_raw_io_error())
        one.wait("io_error.v1")
    assert seen.count(seen[1]) == 2


def test_a_heartbeat_has_no_sequence_and_is_not_spooled(house):
    one = house(heartbeat_seconds=0.05)
    beats = one.wait("heartbeat", 3)
    assert "sequence" not in beats[0]
    assert beats[-1]["data"]["source"]["state"] == "connected"
    assert beats[-1]["data"]["committed_sequence"] == 1


def test_a_drain_publishes_what_is_there(house):
    one = house()
    one.wait("gap")
    one.source.play(*(a_raw_io_error(domain_uuid=uuid7(number)) for number in range(200)))
    wait_until(lambda: one.source._more.empty())
    one.end()
    assert len(one.delivered("io_error.v1")) == 200


def test_a_drain_takes_in_what_still_waits_in_the_queue(hanging_disk, house):
    hangs, goes_on = hanging_disk
    one = house()
    one.wait("gap")
    hangs.set()
    one.source.play(a_raw_io_error(alias="first"))
    wait_until(lambda: one.agent.incidents.open_count == 1)  # its commit hangs
    one.source.play(*(a_raw_io_error() for _ in range(100)))
    wait_until(lambda: len(one.agent.queue) == 100)
    one.agent.stop()
    goes_on.set()
    one.agent.join()
    assert one.counted() == 101


def test_a_drain_ends_at_its_deadline_and_the_rest_stays(house, tmp_path):
    one = house(drain_seconds=0.3)
    one.wait("gap")
    one.bus.unavailable = BusUnavailable("away")
    one.source.play(a_raw_io_error())
    wait_until(lambda: one.spool.stats().pending == 1)
    one.end()
    again = house()
    assert [event["type"] for event in again.wait("io_error.v1")]


def test_a_source_that_refuses_us_ends_the_agent_with_its_error(house, monkeypatch):
    def refuse(self, sink, stop):
        raise SourceDenied("no rights on the socket")

    monkeypatch.setattr(FakeSource, "run", refuse)
    one = house()
    assert one.agent.wait(5)
    with pytest.raises(SourceDenied):
        one.agent.join()


def test_a_dead_thread_is_told(house, monkeypatch):
    monkeypatch.setattr(Agent, "_observe", lambda self: None)
    one = house()
    wait_until(lambda: one.agent.dead_threads() == ["source"])


def test_a_source_that_breaks_is_begun_again_and_its_absence_is_a_gap(house, monkeypatch):
    run, broken = FakeSource.run, threading.Event()

    def breaks(self, sink, stop):
        sink(self.snapshot())
        if not broken.is_set():
            stop.wait(0.2)
            raise RuntimeError("a bug")
        run(self, sink, stop)

    monkeypatch.setattr(FakeSource, "run", breaks)
    with no_waiting():
        one = house()
        wait_until(lambda: len(one.delivered("gap")) >= 2, what="the gap of the first break")
        broken.set()
        wait_until(lambda: one.agent.not_ready() == [])
    gap = one.delivered("gap")[1]["data"]
    assert (gap["reason"], gap["detail"]) == ("source_lost", "the source ended: a bug")


def test_what_the_bus_left_without_an_outcome_is_sent_again(house):
    one = house()
    one.wait("gap")
    publish, broken = one.bus.publish, []

    def breaks(feed):
        if not broken:
            broken.append(feed.take(1, frozenset()))
            raise RuntimeError("a bug of an adapter")
        return publish(feed)

    one.bus.publish = breaks
    with no_waiting():
        one.source.play(a_raw_io_error())
        one.wait("io_error.v1")


def test_the_time_of_a_drain_lies_in_the_next_starts_gap(house):
    first = house(drain_seconds=1.0)
    first.wait("gap")
    first.bus.unavailable = BusUnavailable("away")
    first.source.play(a_raw_io_error())
    wait_until(lambda: first.spool.stats().pending == 1)
    stopped = time.time_ns()
    first.end()
    second = house()
    since = second.wait("gap")[0]["data"]["started_at"]
    assert to_ns(datetime.fromisoformat(since)) <= stopped + 100_000_000


def test_a_drain_ends_in_time_while_the_broker_takes_events_slowly(house):
    def slowly(record):
        time.sleep(0.02)
        return Confirmed()

    one = house(decide=slowly, drain_seconds=0.5)
    one.wait("gap")
    one.source.play(*(a_raw_io_error(domain_uuid=uuid7(number)) for number in range(500)))
    wait_until(lambda: one.spool.stats().committed_sequence >= 400, timeout=20)
    one.end()


def test_a_log_that_cant_be_written_stops_nothing(house):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    telemetry.configure(level="info", fmt="json", stream=Full())
    one = house(a_raw_io_error())
    one.wait("io_error.v1")


def test_an_agent_keeps_its_id_and_a_cloned_disk_gets_a_new_one(tmp_path):
    machine = tmp_path / "machine-id"
    machine.write_text("0123456789abcdef0123456789abcdef\n")
    first, previous = load_agent_id(tmp_path, machine)
    assert previous is None
    assert load_agent_id(tmp_path, machine) == (first, None)
    assert machine.read_text().strip() not in (tmp_path / "agent-id").read_text()
    machine.write_text("fedcba9876543210fedcba9876543210\n")
    second, previous = load_agent_id(tmp_path, machine)
    assert (second != first, previous) == (True, first)
    assert load_agent_id(tmp_path, tmp_path / "none") == (second, None)


def test_a_changed_identity_is_a_gap(tmp_path):
    one = House(tmp_path / "state")
    one.agent.speaker.previous_id = "before"
    one.start()
    assert [event["data"]["reason"] for event in one.wait("gap", 2)] == ["agent_down", "identity_changed"]
    one.end()
