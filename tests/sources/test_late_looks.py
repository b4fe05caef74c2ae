"""Looks that fail, hang or come late: what is known is told at once, once, and refined when they come."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from tests.sources.simulated import Guest, Seen, SimulatedHost
from tests.sources.test_observer import OPTIONS, is_finding, observed
from tests.waiting import wait_until
from virtbus.agent.incidents import IncidentLimits, Incidents
from virtbus.model import Clock, Event, Hypervisor, IoError, IoErrorResolved
from virtbus.observations import (
    Burst,
    DevicesKnown,
    HostKnown,
    Observation,
    RawIoError,
    SourceLost,
    SourceReady,
)
from virtbus.retry import no_waiting
from virtbus.sources import domain_xml
from virtbus.sources.descriptions import Cache
from virtbus.sources.link import (
    ACTION_PAUSE,
    ACTION_REPORT,
    PAUSED,
    PAUSED_IOERROR,
    RESUMED,
    RUNNING,
    STOPPED,
    STOPPED_MIGRATED,
)
from virtbus.sources.observer import Observer
from virtbus.words import ResolutionCause

FOR_EVER = float("inf")


@pytest.fixture(autouse=True)
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("virtbus.sources.lookups.FIRST_WAIT", 0.05)
    monkeypatch.setattr("virtbus.sources.lookups.LONGEST_WAIT", 0.1)


def paused_guest(host: SimulatedHost) -> Guest:
    guest = host.add()
    guest.state, guest.reason, guest.disk_errors = PAUSED, PAUSED_IOERROR, {"vda": 1}
    return guest


class Run:
    """One run of an agent: what a source tells becomes incidents, whose states survive it."""

    def __init__(self, host: SimulatedHost, states: dict[str, bytes], *, since_ns: int | None = None) -> None:
        self.observer = Observer(host, options=replace(OPTIONS, since_ns=since_ns))
        self.seen = Seen()
        self.events: list[Event] = []
        self._states = states
        ids = iter(range(10**6))
        self._incidents = Incidents(IncidentLimits(), new_id=lambda: f"{id(self)}-{next(ids)}")
        assert self._incidents.restore(states, Clock()()) == ()
        self._done = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self.observer.run, args=(self.seen, self._stop))

    def __enter__(self) -> Run:
        with no_waiting():
            self._thread.start()
        self.seen.wait(SourceReady)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)
        self.take_in()
        for key, state in self._incidents.changes().items():
            if state is None:
                self._states.pop(key, None)
            else:
                self._states[key] = state

    def take_in(self) -> list[Event]:
        """Apply what was observed since, and let every window end."""
        items, self._done = self.seen.all[self._done :], len(self.seen.all)
        for item in items:
            self.events += self._incidents.apply(item, Clock()(), self.observer.describe)
        now = Clock()()
        self.events += self._incidents.tick(
            now._replace(monotonic=now.monotonic + 61.0), self.observer.describe
        )
        return self.events

    def counts(self) -> list[int]:
        """The count of each error event so far."""
        return [event.occurrences.count for event in self.take_in() if isinstance(event, IoError)]

    def causes(self) -> list[ResolutionCause]:
        """Why each incident ended that did."""
        return [event.resolution.cause for event in self.take_in() if isinstance(event, IoErrorResolved)]

    def aliases(self) -> set[str | None]:
        """The devices that the error events name."""
        return {event.device.alias for event in self.take_in() if isinstance(event, IoError)}


# ------------------------------------------------------------------------------- the look after a start


@pytest.mark.parametrize(
    "failures",
    [
        {"xml": FOR_EVER},
        {"xml": 1.0},
        {"state": 1.0},
        {"disk_errors": 1.0},
        {"messages": 1.0},
        {"state": FOR_EVER, "xml": FOR_EVER, "disk_errors": FOR_EVER},
    ],
    ids=str,
)
def test_a_guest_that_is_listed_as_paused_is_told_at_once_and_once_whatever_becomes_of_its_look(
    failures: dict[str, float],
) -> None:
    host = SimulatedHost(1, keeps_messages="messages" in failures)
    paused_guest(host)
    host.failures = dict(failures)
    with Run(host, {}) as run:
        ready = run.seen.wait(SourceReady)[0]
        assert isinstance(ready, SourceReady)
        assert sum(finding.count for finding in ready.findings) == 1
        if failures.get("state") != FOR_EVER:
            wait_until(
                lambda: not host.failures or all(left in (0, FOR_EVER) for left in host.failures.values())
            )
            if "xml" not in failures or failures["xml"] != FOR_EVER:
                wait_until(lambda: "virtio-disk0" in run.aliases())
        assert sum(run.counts()) == 1


def test_a_guest_whose_look_hangs_is_told_at_once_and_named_when_the_look_returns() -> None:
    host = SimulatedHost()
    guest = paused_guest(host)
    host.hanging.add(guest.uuid)
    with Run(host, {}) as run:
        assert run.counts() == [1]
        assert run.aliases() == {None}
        host.release.set()
        wait_until(lambda: "virtio-disk0" in run.aliases())
        assert sum(run.counts()) == 1


def test_what_was_told_is_not_told_again_by_late_looks_over_three_restarts_of_the_agent() -> None:
    host = SimulatedHost()
    guests = [paused_guest(host), paused_guest(host)]
    states: dict[str, bytes] = {}
    told = 0
    for _ in range(4):
        host.hanging, host.release = {guest.uuid for guest in guests}, threading.Event()
        with Run(host, states) as run:
            host.release.set()
            wait_until(lambda: all(host_knows(run, guest) for guest in guests))
            wait_until(lambda: not run.observer.guests.reconciling)
            told += sum(run.counts())
    assert told == 2


def host_knows(run: Run, guest: Guest) -> bool:
    return run.observer.describe(guest.uuid) is not None


def test_an_old_disk_error_that_is_kept_is_not_told_again_after_a_restart_in_another_disks_pause() -> None:
    host = SimulatedHost()
    two = (
        "<disk type='file' device='disk'><source file='/img/b'/><target dev='vdb' bus='virtio'/>"
        "<alias name='virtio-disk1'/></disk></devices>"
    )
    guest = host.add()
    guest.xml = guest.xml.replace("</devices>", two)
    states: dict[str, bytes] = {}
    with Run(host, states) as run:
        host.io_error(guest, "virtio-disk1", path="/img/b")
        guest.state, guest.reason, guest.disk_errors = PAUSED, PAUSED_IOERROR, {"vdb": 1}
        host.lifecycle(guest, 3, 2)
        guest.state, guest.reason = RUNNING, 1
        host.lifecycle(guest, RESUMED)
        wait_until(lambda: sum(run.counts()) == 1)
        run._incidents.tick(Clock()()._replace(monotonic=Clock()().monotonic + 1000), run.observer.describe)
        host.io_error(guest)
        guest.state, guest.reason, guest.disk_errors = PAUSED, PAUSED_IOERROR, {"vda": 1, "vdb": 1}
        host.lifecycle(guest, 3, 2)
        wait_until(lambda: sum(run.counts()) == 2)
    with Run(host, states) as again:
        wait_until(lambda: not again.observer.guests.reconciling)
        assert sum(again.counts()) == 0


@pytest.mark.parametrize("over", [False, True], ids=["incident open", "incident over"])
@pytest.mark.parametrize("late", [False, True], ids=["first look", "late look"])
def test_a_disk_that_failed_before_is_not_blamed_for_the_pause_that_another_one_explains_after_a_restart(
    over: bool, late: bool
) -> None:
    host = SimulatedHost()
    guest = host.add()
    two = (
        "<disk type='file' device='disk'><source file='/img/b'/><target dev='vdb' bus='virtio'/>"
        "<alias name='virtio-disk1'/></disk></devices>"
    )
    guest.xml = guest.xml.replace("</devices>", two)
    states: dict[str, bytes] = {}
    with Run(host, states) as run:
        host.io_error(guest)
        host.suspend(guest)
        guest.state, guest.reason = RUNNING, 1
        host.lifecycle(guest, RESUMED)
        wait_until(lambda: sum(run.counts()) == 1)
        if over:
            now = Clock()()
            run._incidents.tick(now._replace(monotonic=now.monotonic + 1000), run.observer.describe)
    # The other one fails while nobody looks; QEMU keeps what it knew of the first.
    guest.state, guest.reason, guest.disk_errors = PAUSED, PAUSED_IOERROR, {"vda": 1, "vdb": 1}
    if late:
        host.hanging = {guest.uuid}
    with Run(host, states) as again:
        if late:
            again.take_in()
            host.release.set()
        wait_until(lambda: not again.observer.guests.reconciling)
        found = [event for event in again.take_in() if isinstance(event, IoError) and event.occurrences.count]
    assert [event.occurrences.count for event in found] == [1]
    # What is told before the look may be without a name, never with the wrong one.
    assert found[0].device.alias in (("virtio-disk1", None) if late else ("virtio-disk1",))


def restart(guest: Guest) -> None:
    """Destroyed and started again: libvirt numbers each run of a domain."""
    before, guest.number = guest.number, guest.number + 100
    guest.xml = guest.xml.replace(f"<domain id='{before}'", f"<domain id='{guest.number}'")
    guest.state, guest.reason, guest.disk_errors = RUNNING, 1, {}


@pytest.mark.parametrize("agent_restarts", [False, True])
@pytest.mark.parametrize("fails_again", [False, True])
def test_a_guest_that_was_started_anew_unseen_ends_its_incident_and_an_error_of_its_new_run_is_told(
    agent_restarts: bool, fails_again: bool
) -> None:
    host = SimulatedHost(1)
    guest = next(iter(host.guests.values()))
    states: dict[str, bytes] = {}
    events: list[Event] = []

    def unseen() -> None:
        restart(guest)
        if fails_again:
            guest.state, guest.reason, guest.disk_errors = PAUSED, PAUSED_IOERROR, {"vda": 1}

    with Run(host, states) as run:
        host.io_error(guest)
        host.suspend(guest)
        wait_until(lambda: sum(run.counts()) == 1)
        if not agent_restarts:
            host.down = True
            host.cut()
            run.seen.wait(SourceLost)
            unseen()
            host.down = False
            run.seen.wait(SourceReady, 2)
            wait_until(lambda: not run.observer.guests.reconciling)
    events += run.events
    if agent_restarts:
        unseen()
        with Run(host, states, since_ns=time.time_ns()) as again:
            wait_until(lambda: not again.observer.guests.reconciling)
        events += again.events
    ended = [event for event in events if isinstance(event, IoErrorResolved)]
    assert [event.resolution.cause for event in ended] == ["domain_stopped"]
    counts = [event.occurrences.count for event in events if isinstance(event, IoError)]
    assert sum(counts) == 1 + fails_again
    ids = {event.incident.id for event in events if isinstance(event, IoError)}
    assert len(ids) == 1 + fails_again


@pytest.mark.parametrize("event", [True, False], ids=["told by its event", "told as missed"])
def test_a_first_look_that_saw_a_told_pause_and_answers_after_its_end_tells_nothing(
    event: bool,
) -> None:
    host = SimulatedHost(1)
    guest = next(iter(host.guests.values()))
    guest.state, guest.reason = PAUSED, 0  # of unknown reason: it is looked at
    host.failures = {"state": FOR_EVER}
    with Run(host, {}) as run:
        guest.state, guest.reason = RUNNING, 1
        host.lifecycle(guest, RESUMED)
        if event:
            host.io_error(guest)
        host.suspend(guest)
        wait_until(lambda: run.observer.check.undecided() == [guest.uuid])
        wait_until(lambda: not run.observer.check.undecided())
        # A look that is asked now answers after the resume.
        host.hanging, host.failures = {guest.uuid}, {}
        wait_until(lambda: host.calls > 0)
        paused = replace(guest)
        host.guests[guest.uuid] = paused
        host.lifecycle(guest, RESUMED)
        host.release.set()
        wait_until(lambda: not run.observer.guests.reconciling)
        assert sum(run.counts()) == 1


# -------------------------------------------------------------------- errors that libvirt remembers


def remembered(disk: str = "vda", *, seconds_ago: float = 5.0) -> str:
    at = datetime.fromtimestamp(time.time() - seconds_ago, UTC)
    return (
        f"I/O error: disk='{disk}', index='1', path='/img/a', "
        f"timestamp='{at:%Y-%m-%d %H:%M:%S.%f}+0000', message='Input/output error'"
    )


@pytest.mark.parametrize("trouble", ["fails", "hangs"])
def test_what_was_to_be_found_since_a_moment_is_still_found_when_the_connection_is_lost_before_the_answer(
    trouble: str,
) -> None:
    host = SimulatedHost(keeps_messages=True)
    guest = host.add()
    guest.messages = [remembered()]
    if trouble == "hangs":
        host.hanging.add(guest.uuid)
    else:
        host.failures = {"messages": FOR_EVER}
    with Run(host, {}, since_ns=time.time_ns() - 20 * 10**9) as run:
        assert run.counts() == []
        for connections in (2, 3):
            host.cut()
            run.seen.wait(SourceReady, connections)
        host.failures, host.hanging = {}, set()
        host.release.set()
        wait_until(lambda: run.counts() == [1])


def test_a_connection_that_answered_nothing_before_it_was_lost_has_seen_nothing() -> None:
    """What libvirt remembers is asked for since the connection began, not since it was lost."""
    host = SimulatedHost(keeps_messages=True)
    guest = host.add()
    host.answers.clear()
    with Run(host, {}, since_ns=time.time_ns()) as run:
        host.down = True
        time.sleep(1.5)  # the margin of what is on its way is a second
        guest.messages = [remembered(seconds_ago=1.3)]
        host.cut()
        host.down = False
        run.seen.wait(SourceReady, 2)
        host.answers.set()
        wait_until(lambda: run.counts() == [1])


def test_evidence_that_is_late_does_not_hide_the_error_that_nobody_saw() -> None:
    """The look after the connection came back answers for both: the newer error's message is found first."""
    host = SimulatedHost(keeps_messages=True)
    guest = host.add()
    host.failures = {"messages": FOR_EVER}
    with Run(host, {}, since_ns=time.time_ns()) as run:
        host.io_error(guest, action=ACTION_REPORT)
        wait_until(lambda: run.counts() == [1])
        host.down = True
        host.cut()
        guest.messages, host.failures = [remembered(seconds_ago=-5.0)], {}
        host.down = False
        run.seen.wait(SourceReady, 2)
        wait_until(lambda: sum(run.counts()) == 2)


@pytest.mark.parametrize("xml", ["<domain/>", "<network/>", "<!DOCTYPE domain><domain/>", " "])
def test_an_error_whose_device_no_description_has_is_told_once(xml: str) -> None:
    host = SimulatedHost()
    guest = host.add(xml=xml)
    with Run(host, {}) as run:
        host.io_error(guest)
        host.suspend(guest)
        wait_until(lambda: run.observer.check.undecided() == [guest.uuid])
        wait_until(lambda: not run.observer.check.undecided())
        assert sum(run.counts()) == 1
        assert run.aliases() == {"virtio-disk0"}


def test_errors_of_two_disks_are_two_also_when_the_description_comes_after_them() -> None:
    host = SimulatedHost(keeps_messages=True)
    guest = host.add()
    guest.xml = guest.xml.replace(
        "</devices>",
        "<disk type='file' device='disk'><source file='/img/b'/><target dev='vdb' bus='virtio'/>"
        "<alias name='virtio-disk1'/></disk></devices>",
    )
    guest.messages = [remembered("vda"), remembered("vdb")]
    host.failures = {"xml": 1.0}
    with Run(host, {}, since_ns=time.time_ns() - 20 * 10**9) as run:
        wait_until(lambda: run.counts() == [1, 1])
        assert run.aliases() == {"virtio-disk0", "virtio-disk1"}


@pytest.mark.parametrize("named", [True, False])
def test_an_error_that_is_told_after_its_guest_left_is_over_at_once(named: bool) -> None:
    """A hypervisor that merges errors holds one back for a second; nothing more comes of that guest."""
    host = SimulatedHost(1)
    guest = next(iter(host.guests.values()))
    with Run(host, {}) as run:
        host.io_error(guest)
        host.suspend(guest)
        wait_until(lambda: not run.observer.check.undecided())
        del host.guests[guest.uuid]
        host.lifecycle(guest, STOPPED, STOPPED_MIGRATED)
        host.io_error(guest, *([] if named else ["", ACTION_PAUSE, "", ""]))
        run.take_in()
    ended = [event.resolution.cause for event in run.events if isinstance(event, IoErrorResolved)]
    assert ended == ["migrated", "migrated"]
    assert run.counts()[-1] == 1


# ------------------------------------------------------------------------------------ other questions


def test_a_description_that_failed_is_asked_for_again_without_another_event() -> None:
    host = SimulatedHost(1)
    host.failures = {"xml": 3.0}
    with observed(host) as (observer, seen):
        ready = seen.wait(SourceReady)[0]
        assert isinstance(ready, SourceReady)
        wait_until(lambda: observer.cache.aliases(ready.domains[0].uuid) is not None)


def test_what_a_running_guest_has_left_over_is_asked_for_until_it_is_known() -> None:
    host = SimulatedHost(1)
    guest = next(iter(host.guests.values()))
    guest.disk_errors = {"vda": 1}
    host.failures = {"disk_errors": 3.0}
    with observed(host) as (observer, seen):
        seen.wait(SourceReady)
        wait_until(lambda: len(observer.check) == 1)  # it remembers the old disk error


def test_what_a_running_guest_has_left_over_is_asked_for_again_once_its_disks_are_known() -> None:
    host = SimulatedHost(1)
    (guest,) = host.guests.values()
    guest.disk_errors = {"vda": 1}
    host.failures = {"xml": 3.0}
    with observed(host) as (observer, seen):
        seen.wait(SourceReady)
        wait_until(lambda: len(observer.check) == 1)
        assert observer.check._cases[guest.uuid].stale == {"virtio-disk0": 1}


def test_a_hosts_uuid_that_could_not_be_had_at_first_is_told_when_it_is_known() -> None:
    host = SimulatedHost(1)
    host.failures = {"capabilities": 2.0}
    with observed(host) as (_, seen):
        ready = seen.wait(SourceReady)[0]
        assert isinstance(ready, SourceReady)
        assert ready.host.uuid is None
        known = seen.wait(HostKnown)[0]
    assert isinstance(known, HostKnown)
    assert known.host.uuid == "8205ba32-5064-4f22-a9f1-ef2a4c104c2b"


def test_a_hypervisor_that_is_slow_to_say_its_version_holds_nothing_up() -> None:
    host = SimulatedHost(1)
    host.probed.clear()
    with observed(host) as (_, seen):
        ready = seen.wait(SourceReady)[0]
        assert isinstance(ready, SourceReady)
        assert ready.host.hypervisor == Hypervisor("QEMU", None, "9.0.0")
        host.probed.set()
        (known,) = seen.wait(
            lambda item: isinstance(item, HostKnown) and item.host.hypervisor.version == "7.2.0"
        )
    assert isinstance(known, HostKnown)
    assert known.host.hypervisor.merges is False


def test_the_look_after_a_lost_callback_is_taken_until_it_is_answered() -> None:
    host = SimulatedHost(2)
    guest = next(iter(host.guests.values()))
    with observed(host) as (_, seen):
        seen.wait(SourceReady)
        guest.state, guest.reason, guest.disk_errors = PAUSED, PAUSED_IOERROR, {"vda": 1}
        host.failures = {"state": 4.0}
        for handler in host.handlers():
            handler.undecodable()
        found = seen.wait(is_finding)
    assert [item.raw.domain_uuid for item in found if isinstance(item, Burst)] == [guest.uuid]


def test_a_look_that_began_before_the_connection_was_lost_does_not_speak_for_the_next_one() -> None:
    host = SimulatedHost()
    guest = paused_guest(host)
    host.hanging.add(guest.uuid)
    with Run(host, {}) as run:
        host.cut()
        run.seen.wait(SourceReady, 2)
        guest.state, guest.reason = RUNNING, 1  # resumed while nobody heard: the old call will say so
        host.release.set()
        wait_until(lambda: not run.observer.guests.reconciling)
        assert sum(run.counts()) == 1


TWO_DISKS = """<domain id='1'><name>guest1</name><uuid>00000000-0000-0000-0000-000000000001</uuid><devices>
<disk type='file' device='disk'><source file='/img/a'/><target dev='vda'/><alias name='virtio-disk0'/></disk>
<disk type='file' device='disk'><source file='/img/b'/><target dev='vdb'/><alias name='virtio-disk1'/></disk>
</devices></domain>"""


@pytest.mark.parametrize("restarted", [True, False], ids=["agent restarted", "connection lost"])
@pytest.mark.parametrize("late", [True, False], ids=["described late", "described at once"])
def test_a_disk_that_was_unplugged_unseen_ends_its_incident_whenever_the_description_comes(
    restarted: bool, late: bool
) -> None:
    host, states = SimulatedHost(1), dict[str, bytes]()
    (guest,) = host.guests.values()
    guest.xml = TWO_DISKS

    def unplug() -> None:
        guest.xml = TWO_DISKS.replace(TWO_DISKS.splitlines()[2], "")
        host.failures = {"xml": FOR_EVER if late else 0}

    with Run(host, states) as run:
        host.io_error(guest, "virtio-disk1", ACTION_REPORT, path="/img/b")
        run.seen.wait(Burst)
        assert [event.device.alias for event in run.take_in() if isinstance(event, IoError)] == [
            "virtio-disk1"
        ]
        if not restarted:
            unplug()
            host.cut()
            run.seen.wait(SourceReady, 2)
            host.failures = {}
            wait_until(lambda: ResolutionCause.DEVICE_REMOVED in run.causes())
    if restarted:
        unplug()
        with Run(host, states) as run:
            host.failures = {}
            wait_until(lambda: ResolutionCause.DEVICE_REMOVED in run.causes())


def test_an_error_without_a_name_is_not_blamed_on_the_disk_that_stayed_when_another_left_unseen() -> None:
    host = SimulatedHost(1)
    (guest,) = host.guests.values()
    guest.xml = TWO_DISKS
    with Run(host, {}) as run:
        host.io_error(guest, "", ACTION_REPORT, path="")
        run.seen.wait(RawIoError)
        assert run.aliases() == {None}
        guest.xml = TWO_DISKS.replace(TWO_DISKS.splitlines()[2], "")
        host.failures = {"xml": FOR_EVER}
        host.cut()
        run.seen.wait(SourceReady, 2)
        host.failures = {}
        run.seen.wait(DevicesKnown)
        assert run.aliases() == {None}


# ---------------------------------------------------------------------------------- facts as they are now


def source_path(run: Run) -> list[str | None]:
    return [
        None if event.device.source is None else event.device.source.path
        for event in run.take_in()
        if isinstance(event, IoError)
    ]


def test_after_a_snapshot_nobody_told_of_the_blame_never_falls_on_the_old_image() -> None:
    host = SimulatedHost(1)
    guest = next(iter(host.guests.values()))
    with Run(host, {}) as run:
        wait_until(lambda: host_knows(run, guest))
        guest.xml = guest.xml.replace(
            "<source file='/img/a'/>",
            "<source file='/img/overlay'/><backingStore type='file'><format type='raw'/>"
            "<source file='/img/a'/><backingStore/></backingStore>",
        )
        host.io_error(guest, path="/img/overlay")
        host.suspend(guest)

        def described_anew() -> bool:
            found = run.observer.describe(guest.uuid)
            source = None if found is None else found.devices["virtio-disk0"].source
            return source is not None and source.backing == ("/img/a",)

        assert source_path(run) == ["/img/overlay"]
        wait_until(described_anew)
        wait_until(lambda: any(isinstance(item, Burst) for item in run.seen.all))
        assert set(source_path(run)) == {"/img/overlay"}


def test_an_eject_nobody_told_of_is_seen_by_the_look_at_the_trouble() -> None:
    host = SimulatedHost(1)
    guest = next(iter(host.guests.values()))
    with Run(host, {}) as run:
        wait_until(lambda: host_knows(run, guest))
        guest.xml = guest.xml.replace("/img/a", "/img/other")
        host.suspend(guest)  # and the error's event, with its path, is lost
        wait_until(lambda: "/img/other" in source_path(run))


@pytest.mark.parametrize(
    ("path", "more", "alias"),
    [
        ("/img/a", "", "virtio-disk0"),
        ("", "", "virtio-disk0"),
        (
            "",
            "<disk type='file' device='cdrom'><target dev='sda'/><alias name='sata0'/></disk>",
            "virtio-disk0",
        ),
        ("", "<disk type='file'><source file='/img/b'/><target dev='vdb'/><alias name='b'/></disk>", ""),
        (
            "/img/b",
            "<disk type='file'><source file='/img/b'/><target dev='vdb'/><alias name='b'/></disk>",
            "b",
        ),
        (
            "/img/a",
            "<disk type='file'><source file='/img/a'/><target dev='vdb'/><alias name='b'/></disk>",
            "",
        ),
        (
            "",
            "</devices><commandline xmlns='http://libvirt.org/schemas/domain/qemu/1.0'><arg value='-drive'/>"
            "</commandline><devices>",
            "",
        ),
    ],
)
def test_an_event_without_an_alias_is_matched_by_path_or_by_the_only_candidate_and_never_guessed(
    path: str, more: str, alias: str
) -> None:
    host = SimulatedHost(1)
    guest = next(iter(host.guests.values()))
    guest.xml = guest.xml.replace("</devices>", f"{more}</devices>")
    with Run(host, {}) as run:
        wait_until(lambda: host_knows(run, guest))
        for _ in range(3):
            host.io_error(guest, "", ACTION_REPORT, path=path)
        assert run.aliases() == {alias or None}
        assert sum(run.counts()) == 3


SECOND_DISK = "<disk type='file'><source file='/img/b'/><target dev='vdb'/><alias name='b'/></disk></devices>"


@pytest.mark.parametrize("path", ["", "/img/a"])
def test_an_error_without_an_alias_is_not_blamed_on_a_disk_that_is_the_only_one_no_more(path: str) -> None:
    host = SimulatedHost(1)
    (guest,) = host.guests.values()
    with Run(host, {}) as run:
        wait_until(lambda: host_knows(run, guest))
        host.hanging.add(guest.uuid)
        guest.xml = guest.xml.replace("</devices>", SECOND_DISK)
        for handler in host.handlers():
            handler.changed(guest.uuid)
        host.io_error(guest, "", ACTION_REPORT, path=path)
        assert run.aliases() == {"virtio-disk0" if path else None}
        assert run.counts() == [1]
        host.release.set()


def test_a_pause_that_a_listing_shows_is_not_blamed_on_what_was_the_only_disk_before_the_connection() -> None:
    host = SimulatedHost(1)
    (guest,) = host.guests.values()
    with Run(host, {}) as run:
        wait_until(lambda: host_knows(run, guest))
        host.hanging.add(guest.uuid)
        guest.xml = guest.xml.replace("</devices>", SECOND_DISK)
        guest.state, guest.reason, guest.disk_errors = PAUSED, PAUSED_IOERROR, {"vdb": 1}
        host.cut()
        wait_until(lambda: sum(run.counts()) == 1)
        assert run.aliases() == {None}
        host.release.set()
        wait_until(lambda: run.aliases() == {None, "b"})
        assert sum(run.counts()) == 1


def test_a_description_that_was_asked_for_before_a_change_does_not_know_of_it() -> None:
    cache, uuid = Cache(), "one"
    xml = domain_xml.parse(SimulatedHost().add().xml)
    cache.saw(uuid, "guest1", 1, "running")
    cache.outdate(uuid, 2.0)
    cache.read(uuid, xml, 1.0)
    assert cache.only_disk(uuid) == ""
    cache.read(uuid, xml, 3.0)
    assert cache.only_disk(uuid) == "virtio-disk0"


def test_a_storm_without_an_alias_is_one_incident_that_is_named_when_a_candidate_is_known() -> None:
    host = SimulatedHost(1)
    guest = next(iter(host.guests.values()))
    plain = guest.xml
    other = "<disk type='file'><source file='/img/b'/><target dev='vdb'/><alias name='b'/></disk></devices>"
    guest.xml = plain.replace("</devices>", other)
    with Run(host, {}) as run:
        wait_until(lambda: host_knows(run, guest))
        guest.jobs = {"vdb"}
        host.io_error(guest, "", ACTION_REPORT, path="")
        wait_until(lambda: (entry := run.observer.cache.get(guest.uuid)) is not None and entry.jobs == {"b"})
        wait_until(lambda: any(isinstance(item, Burst) for item in run.seen.all))
        for _ in range(5):
            host.io_error(guest, "", ACTION_REPORT, path="")
        wait_until(lambda: sum(run.counts()) == 6)
        assert {event.incident.id for event in run.events if isinstance(event, IoError)} == {
            run.events[0].incident.id  # type: ignore[union-attr]
        }
        assert run.aliases() == {None, "b"}


def test_one_reported_error_is_one_event_when_the_look_finds_nothing_more() -> None:
    host = SimulatedHost(1)
    guest = next(iter(host.guests.values()))
    with Run(host, {}) as run:
        wait_until(lambda: host_knows(run, guest))
        host.io_error(guest, action=ACTION_REPORT)
        wait_until(lambda: any(isinstance(item, Burst) for item in run.seen.all))
        assert run.counts() == [1]


# --------------------------------------------------------------------------------- guests that stand still


def resolutions(run: Run, after: float) -> list[tuple[str, str | None]]:
    """(cause, state of the domain) of what is resolved when this many seconds have passed."""
    now = Clock()()
    run.take_in()
    later = now._replace(monotonic=now.monotonic + after)
    events = [*run.events, *run._incidents.tick(later, run.observer.describe)]
    return [(e.resolution.cause, e.domain.state) for e in events if isinstance(e, IoErrorResolved)]


@pytest.mark.parametrize(
    ("event", "detail", "state", "wakes"),
    [(3, 0, 3, (4, 0)), (3, 1, 3, (4, 1)), (3, 3, 3, (4, 0)), (7, 0, 7, (2, 4)), (8, 0, 6, (4, 0))],
    ids=["operator", "migration", "restored", "pmsuspended", "crashed"],
)
def test_the_silence_of_a_guest_that_does_not_run_is_no_recovery(
    event: int, detail: int, state: int, wakes: tuple[int, int]
) -> None:
    host = SimulatedHost(1)
    guest = next(iter(host.guests.values()))
    with Run(host, {}) as run:
        wait_until(lambda: host_knows(run, guest))
        host.io_error(guest, action=ACTION_REPORT)
        guest.state, guest.reason = state, 1
        host.lifecycle(guest, event, detail)
        assert resolutions(run, 10_000) == []
        guest.state, guest.reason = RUNNING, 1
        host.lifecycle(guest, *wakes)
        assert resolutions(run, 10_000) == [("quiet", "running")]


def test_a_guest_that_stood_still_before_the_agent_came_proves_nothing_by_its_silence() -> None:
    host = SimulatedHost(1)
    guest = next(iter(host.guests.values()))
    states: dict[str, bytes] = {}
    with Run(host, states) as run:
        host.io_error(guest, action=ACTION_REPORT)
    guest.state, guest.reason = 3, 1
    with Run(host, states) as run:
        assert resolutions(run, 10_000) == []


def stop(host: SimulatedHost, guest: Guest) -> None:
    host.stop(guest)


def run_again(host: SimulatedHost, guest: Guest) -> None:
    guest.state, guest.reason = RUNNING, 1
    host.lifecycle(guest, RESUMED)


@pytest.mark.parametrize(("ends", "state"), [(stop, "shut off"), (run_again, "running")])
def test_the_domain_of_a_resolution_is_as_it_is_then(
    ends: Callable[[SimulatedHost, Guest], None], state: str
) -> None:
    host = SimulatedHost(1)
    guest = next(iter(host.guests.values()))
    with Run(host, {}) as run:
        wait_until(lambda: host_knows(run, guest))
        host.io_error(guest)
        host.suspend(guest)
        wait_until(lambda: run.observer.cache.get(guest.uuid).state == "paused")  # type: ignore[union-attr]
        run.take_in()
        ends(host, guest)
        assert [found for _, found in resolutions(run, 10_000)] == [state]


def test_a_source_without_a_look_is_told_of_by_the_incidents_too() -> None:
    host = SimulatedHost()
    paused_guest(host)
    ready = Observer(host, options=OPTIONS).snapshot()
    bare: Observation = SourceReady(ready.host, ready.at_ns, ready.domains)
    incidents = Incidents(IncidentLimits(), new_id=lambda: "1")
    (event,) = incidents.apply(bare, Clock()(), lambda _uuid: None)
    assert isinstance(event, IoError)
    assert (event.occurrences.count, event.device.alias) == (1, "virtio-disk0")  # its only disk
