"""The observer on a simulated host: many domains, calls that hang, connections that go."""

from __future__ import annotations

import gc
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from tests.sources.simulated import DEADLINE, Guest, Seen, SimulatedHost
from tests.waiting import wait_until
from virtbus.errors import SourceDenied, SourceUnavailable
from virtbus.model import Clock
from virtbus.observations import (
    Burst,
    DeviceRemoved,
    DomainGone,
    DomainResumed,
    Observation,
    RawIoError,
    SourceLost,
    SourceReady,
)
from virtbus.retry import no_waiting
from virtbus.sources import SourceOptions
from virtbus.sources.crew import Pulse
from virtbus.sources.guests import LOOK_AFTER_SECONDS
from virtbus.sources.link import (
    ACTION_REPORT,
    PAUSED,
    PAUSED_IOERROR,
    PAUSED_UNKNOWN,
    RESUMED,
    RUNNING,
    STOPPED,
    STOPPED_MIGRATED,
    SUSPENDED,
    SUSPENDED_IOERROR,
    SUSPENDED_PAUSED,
)
from virtbus.sources.observer import POLL_SECONDS, Observer
from virtbus.words import GapReason, Origin

OPTIONS = SourceOptions(grace_seconds=0.2, lookup_deadline_seconds=0.2)


@contextmanager
def observed(host: SimulatedHost, options: SourceOptions = OPTIONS) -> Iterator[tuple[Observer, Seen]]:
    observer, seen, stop = Observer(host, options=options), Seen(), threading.Event()
    with no_waiting():
        thread = threading.Thread(target=observer.run, args=(seen, stop))
        thread.start()
        try:
            yield observer, seen
        finally:
            stop.set()
            host.release.set()
            host.frozen.clear()
            thread.join(DEADLINE)
            assert not thread.is_alive()


def is_finding(item: Observation) -> bool:
    return isinstance(item, Burst) and item.count > 0


def only(items: list[Observation]) -> Observation:
    (item,) = items
    return item


# ----------------------------------------------------------------------------------------- connecting


def test_a_standstill_is_why_a_connection_ended_that_closed_before_it_was_noticed() -> None:
    """The daemon gives up on a frozen client: its close is read in the step in which the process goes on."""
    real, slept, host, seen = Clock(), [0.0], SimulatedHost(1), Seen()
    observer = Observer(host, options=OPTIONS, clock=lambda: real()._replace(suspended=slept[0]))
    pulse = Pulse(observer.clock())
    observer.begin(seen, lambda: None, pulse)
    try:
        wait_until(lambda: (observer.step(), observer.connected)[1])
        pulse.beat(observer.clock(), POLL_SECONDS)
        slept[0] = 40.0
        host.cut()
        observer.step()
        (lost,) = seen.of(SourceLost)
        assert isinstance(lost, SourceLost)
        assert (lost.reason, "stood still" in lost.why) == (GapReason.AGENT_STANDSTILL, True)
    finally:
        observer.end()


def test_what_is_there_is_seen_once_connected_with_the_hosts_name_and_uuid() -> None:
    host = SimulatedHost(3)
    with observed(host) as (observer, seen):
        ready = seen.wait(SourceReady)[0]
        assert isinstance(ready, SourceReady)
        assert (ready.host.name, ready.host.uuid) == ("simulated", "8205ba32-5064-4f22-a9f1-ef2a4c104c2b")
        assert {domain.aliases for domain in ready.domains} == {frozenset({"virtio-disk0"})}
        description = observer.describe(ready.domains[0].uuid)
        assert description is not None
        assert description.domain.state == "running"


def test_a_thousand_domains_are_all_described_by_the_first_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("virtbus.sources.guests.SNAPSHOT_SECONDS", 60.0)  # however busy this machine is
    host = SimulatedHost(1000)
    with observed(host) as (_, seen):
        ready = seen.wait(SourceReady)[0]
    assert isinstance(ready, SourceReady)
    assert sum(domain.aliases is not None for domain in ready.domains) == 1000


def test_a_daemon_that_is_away_is_tried_for_ever() -> None:
    host = SimulatedHost(1)
    host.down = True
    with observed(host) as (_, seen):
        time.sleep(0.1)
        assert seen.all == []
        host.down = False
        seen.wait(SourceReady)


def test_a_refusal_before_the_first_connection_ends_the_run() -> None:
    class Refusing(SimulatedHost):
        def open(self, handler: object) -> None:  # type: ignore[override]
            raise SourceDenied("not you")

    with pytest.raises(SourceDenied, match="not you"):
        Observer(Refusing(), options=OPTIONS).run(Seen(), threading.Event())


def test_a_daemon_that_lets_one_connect_and_says_nothing_does_not_hold_up_the_stop() -> None:
    host, stop = SimulatedHost(1), threading.Event()
    host.frozen.set()
    thread = threading.Thread(target=Observer(host, options=OPTIONS).run, args=(Seen(), stop))
    thread.start()
    stop.set()
    thread.join(DEADLINE)
    ended = not thread.is_alive()
    host.frozen.clear()
    assert ended


def test_each_cut_is_told_once_and_callbacks_are_registered_exactly_once_again() -> None:
    host = SimulatedHost(1)
    guest = next(iter(host.guests.values()))
    with observed(host) as (_, seen):
        for round_ in range(1, 21):
            seen.wait(SourceReady, round_)
            assert len(host.handlers()) == 1
            host.io_error(guest, action=ACTION_REPORT)
            host.cut()
            seen.wait(SourceLost, round_)
        seen.wait(SourceReady, 21)
    assert len(seen.of(RawIoError)) == 20
    kinds = [type(item) for item in seen.all if isinstance(item, SourceReady | SourceLost)]
    assert kinds == [SourceReady, SourceLost] * 20 + [SourceReady]


def test_a_connection_that_is_dead_without_saying_so_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("virtbus.sources.observer.ALIVE_SECONDS", 0.05)
    host = SimulatedHost(1)
    with observed(host) as (_, seen):
        seen.wait(SourceReady)
        for link in host.links:
            link.open = False
        seen.wait(SourceLost)
        seen.wait(SourceReady, 2)


def test_a_snapshot_looks_once_and_leaves() -> None:
    host = SimulatedHost(2)
    ready = Observer(host, options=OPTIONS).snapshot()
    assert len(ready.domains) == 2
    assert not any(link.open for link in host.links)


def test_a_snapshot_of_a_daemon_that_is_away_says_so() -> None:
    host = SimulatedHost()
    host.down = True
    with pytest.raises(SourceUnavailable, match="refused"):
        Observer(host, options=OPTIONS).snapshot()


# --------------------------------------------------------------------------------------- cross-checks


def test_a_pause_without_an_event_is_told_with_origin_lifecycle() -> None:
    host = SimulatedHost(1)
    guest = next(iter(host.guests.values()))
    with observed(host) as (_, seen):
        seen.wait(SourceReady)
        host.suspend(guest)
        found = only(seen.wait(is_finding))
    assert isinstance(found, Burst)
    assert (found.origin, found.raw.alias, found.count) == (Origin.LIFECYCLE, "virtio-disk0", 1)


def test_a_pause_with_its_event_is_told_by_the_event_and_evidence_follows() -> None:
    host = SimulatedHost(1)
    guest = next(iter(host.guests.values()))
    with observed(host) as (_, seen):
        seen.wait(SourceReady)
        host.io_error(guest)
        host.suspend(guest)
        more = only(seen.wait(Burst))
    assert isinstance(more, Burst)
    assert (more.count, more.disk_error) == (0, "unspecified")
    assert len(seen.of(RawIoError)) == 1


def test_a_guest_that_was_paused_while_we_were_away_is_a_finding_of_the_next_look() -> None:
    host = SimulatedHost(2)
    guest = next(iter(host.guests.values()))
    with observed(host) as (_, seen):
        seen.wait(SourceReady)
        host.down = True
        host.cut()
        guest.state, guest.reason, guest.disk_errors = PAUSED, PAUSED_IOERROR, {"vda": 2}
        host.down = False
        ready = seen.wait(SourceReady, 2)[1]
    assert isinstance(ready, SourceReady)
    (found,) = ready.findings
    assert (found.origin, found.raw.reason, found.disk_error) == (Origin.RECONCILE, "enospc", "no_space")
    assert [d.uuid for d in ready.domains if d.paused_by_io_error] == [guest.uuid]


def test_a_resume_during_the_first_look_is_not_overwritten_by_it() -> None:
    host = SimulatedHost(1)
    guest = next(iter(host.guests.values()))
    guest.state, guest.reason, guest.disk_errors = PAUSED, PAUSED_IOERROR, {"vda": 1}
    host.hanging.add(guest.uuid)  # the look takes a while
    with observed(host) as (_, seen):
        wait_until(lambda: bool(host.handlers()) and host.calls > 0)
        guest.state, guest.reason = RUNNING, 1
        host.lifecycle(guest, RESUMED)
        host.release.set()
        ready = seen.wait(SourceReady)[0]
        seen.wait(DomainResumed)
    assert isinstance(ready, SourceReady)
    assert [(d.state, d.paused_by_io_error) for d in ready.domains] == [("running", False)]


@pytest.mark.parametrize("again", [False, True], ids=["resumed", "and fails again"])
def test_a_resume_during_the_first_look_is_reported_behind_the_pause_that_it_found(again: bool) -> None:
    """Else an agent that knew of the pause would take what the look found of it for another one."""
    host = SimulatedHost(2)
    guest, other = host.guests.values()
    guest.state, guest.reason, guest.disk_errors = PAUSED, PAUSED_IOERROR, {"vda": 1}
    host.hanging.add(other.uuid)  # the first look takes a while
    with observed(host) as (observer, seen):
        wait_until(lambda: bool(observer.guests._first and observer.guests._first.looks))
        guest.state, guest.reason = RUNNING, 1
        host.lifecycle(guest, RESUMED)
        if again:
            host.io_error(guest, action=ACTION_REPORT)
        seen.wait(SourceReady)
        seen.wait(DomainResumed)
    order = [DomainResumed, RawIoError, SourceReady] if again else [SourceReady, DomainResumed]
    assert [type(item) for item in seen.all if type(item) in order] == order


def test_what_a_guest_keeps_of_a_pause_that_no_look_saw_is_asked_for_when_it_runs_again() -> None:
    host = SimulatedHost(1)
    guest = next(iter(host.guests.values()))
    with observed(host) as (observer, seen):
        seen.wait(SourceReady)
        wait_until(
            lambda: not observer.guests._lookups.busy()
        )  # the first questions about a guest that runs are answered
        host.hanging.add(guest.uuid)
        guest.state, guest.reason, guest.disk_errors = PAUSED, PAUSED_IOERROR, {"vda": 1}
        host.lifecycle(guest, SUSPENDED, SUSPENDED_IOERROR)
        guest.state, guest.reason = RUNNING, 1
        host.lifecycle(
            guest, RESUMED
        )  # before the look is answered, which asks no running guest for disk errors
        wait_until(lambda: observer.check._cases[guest.uuid].pauses == [])
        host.release.set()
        wait_until(lambda: observer.check._cases[guest.uuid].stale == {"virtio-disk0": 1})


def test_lifecycle_becomes_what_resolves_an_incident() -> None:
    host = SimulatedHost(3)
    one, two, three = host.guests.values()
    with observed(host) as (observer, seen):
        seen.wait(SourceReady)
        host.lifecycle(one, RESUMED)
        host.lifecycle(two, STOPPED, STOPPED_MIGRATED)
        host.stop(three)
        for handler in host.handlers():
            handler.device_removed(one.uuid, "virtio-disk0")
        assert [
            (type(item), getattr(item, "cause", None))
            for item in seen.all
            if not isinstance(item, SourceReady)
        ] == [
            (DomainResumed, None),
            (DomainGone, "migrated"),
            (DomainGone, "domain_stopped"),
            (DeviceRemoved, None),
        ]
        wait_until(lambda: len(observer.cache) == 1)
        assert observer.describe(three.uuid) is not None  # its end is still to be described


def test_a_guest_whose_error_comes_after_its_resume_is_said_to_run() -> None:
    host = SimulatedHost(1)
    guest = next(iter(host.guests.values()))
    with observed(host) as (_, seen):
        seen.wait(SourceReady)
        # Its pause is long over: a hypervisor that throttles held the error back.
        host.io_error(guest)
        wait_until(lambda: len(seen.of(DomainResumed)) == 1)
        of_guest = [type(item) for item in seen.all if isinstance(item, RawIoError | DomainResumed)]
    assert of_guest == [RawIoError, DomainResumed]


def test_a_device_that_is_unplugged_is_forgotten() -> None:
    host = SimulatedHost(1)
    guest = next(iter(host.guests.values()))
    with observed(host) as (observer, seen):
        seen.wait(SourceReady)
        host.io_error(guest, action=ACTION_REPORT, reason="enospc")
        assert observer.check.out_of_space(guest.uuid) == {"virtio-disk0"}
        for handler in host.handlers():
            handler.device_removed(guest.uuid, "virtio-disk0")
        assert observer.check.out_of_space(guest.uuid) == frozenset()


def test_an_operators_pause_is_no_error() -> None:
    host = SimulatedHost(1)
    guest = next(iter(host.guests.values()))
    with observed(host) as (_, seen):
        seen.wait(SourceReady)
        guest.state, guest.reason = PAUSED, 1
        host.lifecycle(guest, SUSPENDED, 0)
        time.sleep(0.6)
    assert not [item for item in seen.all if is_finding(item)]


def test_a_lost_callback_makes_every_domain_be_looked_at() -> None:
    host = SimulatedHost(2)
    guest = next(iter(host.guests.values()))
    with observed(host) as (_, seen):
        seen.wait(SourceReady)
        guest.state, guest.reason, guest.disk_errors = PAUSED, PAUSED_IOERROR, {"vda": 1}
        for handler in host.handlers():
            handler.undecodable()
        found = only(seen.wait(is_finding))
    assert isinstance(found, Burst)
    assert found.raw.domain_uuid == guest.uuid


class AskedHost(SimulatedHost):
    """Remembers when it was asked about a guest."""

    def __init__(self, guests: int) -> None:
        super().__init__(guests)
        self.asked: list[float] = []

    def call(self, uuid: str) -> Guest:
        self.asked.append(time.monotonic())
        return super().call(uuid)


def test_an_error_goes_first_and_the_look_at_its_guest_follows_once() -> None:
    host = AskedHost(1)
    guest = next(iter(host.guests.values()))
    with observed(host) as (_, seen):
        seen.wait(SourceReady)
        wait_until(lambda: len(host.asked) >= 2)  # its description, and what is left over from before
        host.asked.clear()
        at = time.monotonic()
        host.io_error(guest)
        host.suspend(guest)
        seen.wait(RawIoError)
        wait_until(lambda: len(host.asked) >= 3)
        time.sleep(0.1)
    assert min(host.asked) >= at + LOOK_AFTER_SECONDS
    assert len(host.asked) == 3  # its description, its state and its disks' errors


@pytest.mark.parametrize("detail", [SUSPENDED_PAUSED, SUSPENDED_IOERROR])
@pytest.mark.parametrize("ends", [False, True], ids=["runs again", "ends"])
def test_a_pause_of_milliseconds_without_an_event_is_told_with_its_device(detail: int, ends: bool) -> None:
    """Only a look while the guest is paused can tell: it does not wait for an event."""
    host = SimulatedHost(1)
    guest = next(iter(host.guests.values()))
    with observed(host, replace(OPTIONS, grace_seconds=3.0)) as (observer, seen):
        seen.wait(SourceReady)
        reason = PAUSED_IOERROR if detail == SUSPENDED_IOERROR else PAUSED_UNKNOWN
        guest.state, guest.reason, guest.disk_errors = PAUSED, reason, {"vda": 1}
        host.lifecycle(guest, SUSPENDED, detail)
        pauses = observer.check.cases[guest.uuid].pauses
        wait_until(lambda: pauses[0].look is not None)
        if ends:
            host.stop(guest)
        else:
            guest.state, guest.reason = RUNNING, 1
            host.lifecycle(guest, RESUMED)
        found = only(seen.wait(is_finding))
    assert isinstance(found, Burst)
    assert (found.raw.alias, found.count) == ("virtio-disk0", 1)


# -------------------------------------------------------------------------------------------- hanging


def hanging_host(guests: int, hang: int) -> tuple[SimulatedHost, list[Guest]]:
    host = SimulatedHost(guests)
    every = list(host.guests.values())
    host.hanging = {guest.uuid for guest in every[:hang]}
    return host, every


def test_events_flow_while_five_look_ups_hang_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    host, guests = hanging_host(10, 5)
    patient = replace(OPTIONS, lookup_deadline_seconds=1.0)  # also a busy machine answers for the other five
    monkeypatch.setattr("virtbus.sources.guests.SNAPSHOT_SECONDS", 60.0)
    with observed(host, patient) as (observer, seen):
        ready = seen.wait(SourceReady)[0]
        assert isinstance(ready, SourceReady)
        assert sum(domain.aliases is None for domain in ready.domains) == 5
        for guest in guests:
            host.io_error(guest)
        assert len(seen.of(RawIoError)) == 10
        assert [observer.describe(guest.uuid) is None for guest in guests] == [True] * 5 + [False] * 5


def test_a_pause_of_a_guest_that_hangs_is_told_without_its_device() -> None:
    host, (guest,) = hanging_host(1, 1)
    with observed(host) as (_, seen):
        seen.wait(SourceReady)
        host.suspend(guest)
        found = only(seen.wait(is_finding))
    assert isinstance(found, Burst)
    assert found.raw.alias == ""
    assert found.evidence[-1].verdict == "unavailable"


def test_however_many_guests_hang_at_most_twice_the_limit_of_calls_is_held() -> None:
    host, guests = hanging_host(60, 50)
    with observed(host) as (observer, seen):
        seen.wait(SourceReady)
        for guest in guests:
            host.suspend(guest)
        time.sleep(1.0)
        assert host.calls <= 2 * OPTIONS.lookups_in_flight
        host.release.set()
        wait_until(lambda: all(observer.describe(guest.uuid) is not None for guest in guests))
    assert host.most_calls <= 2 * OPTIONS.lookups_in_flight


def test_an_answer_that_comes_late_is_still_used() -> None:
    host, (guest,) = hanging_host(1, 1)
    with observed(host) as (observer, seen):
        seen.wait(SourceReady)
        assert observer.describe(guest.uuid) is None
        host.release.set()
        wait_until(lambda: observer.describe(guest.uuid) is not None)


# ------------------------------------------------------------------------------------------- bad input


def test_a_domain_whose_xml_is_refused_goes_undescribed_and_is_not_asked_for_again() -> None:
    host = SimulatedHost()
    guest = host.add(xml="<!DOCTYPE d [<!ENTITY e 'x'>]><domain/>")
    with observed(host) as (observer, seen):
        seen.wait(SourceReady)
        before = host.most_calls
        for _ in range(100):
            host.io_error(guest, action=ACTION_REPORT)
            assert observer.describe(guest.uuid) is None
        assert len(seen.of(RawIoError)) == 100
        assert host.most_calls == before


def test_a_device_that_the_description_lacks_makes_it_be_read_again() -> None:
    host = SimulatedHost(1)
    guest = next(iter(host.guests.values()))
    with observed(host) as (observer, seen):
        seen.wait(SourceReady)
        guest.xml = guest.xml.replace("virtio-disk0", "virtio-disk7")
        host.io_error(guest, "virtio-disk7", ACTION_REPORT)

        def described() -> bool:
            found = observer.describe(guest.uuid)
            return found is not None and "virtio-disk7" in found.devices

        wait_until(described)


def test_an_error_of_a_domain_that_nobody_announced_is_told_and_then_described() -> None:
    host = SimulatedHost()
    with observed(host) as (observer, seen):
        seen.wait(SourceReady)
        guest = host.add()
        host.io_error(guest, action=ACTION_REPORT)
        assert len(seen.of(RawIoError)) == 1
        wait_until(lambda: observer.describe(guest.uuid) is not None)


# ---------------------------------------------------------------------------------------------- memory


def test_ten_thousand_domains_that_come_fail_and_go_leave_nothing_behind() -> None:
    host = SimulatedHost(5)
    with observed(host) as (observer, seen):
        seen.wait(SourceReady)

        def come_and_go(count: int) -> None:
            for _ in range(count):
                guest = host.start()
                host.io_error(guest)
                host.suspend(guest)
                host.stop(guest)
            wait_until(lambda: len(observer.cache) == 5)
            seen.all.clear()

        come_and_go(2000)
        gc.collect()
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        come_and_go(8000)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert len(observer.check) == 0
    assert after - before < 2 << 20


def test_an_attempt_to_connect_that_hangs_is_left_behind_and_another_is_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("virtbus.sources.crew.OPEN_SECONDS", 0.1)
    host = SimulatedHost(1)
    host.frozen.set()
    others = set(threading.enumerate())  # another test's may still idle

    def calls() -> int:
        return sum(t.name == "virtbus-call" for t in set(threading.enumerate()) - others)

    with observed(host) as (_, seen):
        wait_until(lambda: calls() == 4)
        time.sleep(0.5)
        assert calls() == 4  # and no more
        host.frozen.clear()
        seen.wait(SourceReady)
        wait_until(lambda: len([link for link in host.links if link.open and link.handler]) == 1)
        guest = next(iter(host.guests.values()))
        host.io_error(guest, action=ACTION_REPORT)
        assert len(seen.of(RawIoError)) == 1
