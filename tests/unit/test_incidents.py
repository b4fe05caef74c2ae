"""Errors become incidents: told at once, counted in widening windows, resolved when they are over."""

import itertools
from dataclasses import replace

import pytest

from virtbus.agent.incidents import UNKNOWN_HOST, WHOLE_HOST, IncidentLimits, Incidents
from virtbus.model import (
    Device,
    DeviceSource,
    Domain,
    Evidence,
    Host,
    Hypervisor,
    IoError,
    IoErrorResolved,
    Now,
    Owner,
    to_datetime,
)
from virtbus.observations import (
    Burst,
    CallbackLost,
    Description,
    DeviceRemoved,
    DomainGone,
    DomainHalted,
    DomainResumed,
    DomainState,
    HostKnown,
    RawIoError,
    SourceLost,
    SourceReady,
    SourceSeen,
    Surveyed,
)
from virtbus.words import Action, Origin, Phase, Platform, Scope

SECOND = 1_000_000_000
START = 1_795_353_029 * SECOND
HOST = Host("compute-17")
REPORT, PAUSE = 2, 1
DISK, OTHER_DISK = "virtio-disk0", "virtio-disk1"


def an_error(
    alias=DISK, *, count=1, action=REPORT, reason="", domain="guest-a", path="/disk", at=None, **more
):
    raw = RawIoError(domain, f"name of {domain}", 7, path, alias, action, reason, at)
    return Burst(raw, count, at, at, **more)


def a_state(uuid="guest-a", state="running", *, paused=False, aliases=frozenset({DISK, OTHER_DISK})):
    return DomainState(uuid, f"name of {uuid}", state, paused, aliases)


def described(uuid):
    return Description(
        Domain(uuid, f"name of {uuid}", 7, "running", Owner(Platform.OPENSTACK, "owner of " + uuid)),
        {alias: Device(alias, target=f"target of {alias}") for alias in (DISK, OTHER_DISK)},
    )


class Bench:
    """Incidents on a clock of our own, with a store that commits when it is told to."""

    def __init__(self, *, describe=described, host=HOST, **limits):
        self.limits = IncidentLimits(**limits)
        self.ids = (f"incident-{number}" for number in itertools.count(1))
        self.incidents = Incidents(self.limits, new_id=lambda: next(self.ids), host=host)
        self.describe = describe
        self.wall_ns, self.monotonic = START, 1000.0
        self.states = {}

    @property
    def now(self):
        return Now(self.wall_ns, self.monotonic)

    def see(self, observation):
        """Apply it now; an error without a time happens now."""
        if isinstance(observation, Burst) and observation.first_ns is None:
            raw = observation.raw._replace(observed_at=self.wall_ns)
            observation = replace(observation, raw=raw, first_ns=self.wall_ns, last_ns=self.wall_ns)
        return self.incidents.apply(observation, self.now, self.describe)

    def wait(self, seconds):
        """Let time pass, ticking whenever something is due."""
        events, end = [], self.monotonic + seconds
        while (due := self.incidents.next_due()) is not None and due <= end:
            self._move_to(max(due, self.monotonic))
            events += self.incidents.tick(self.now, self.describe)
            after = self.incidents.next_due()
            assert after is None or after > self.monotonic, "a tick at its time leaves nothing due"
        self._move_to(end)
        return events

    def _move_to(self, monotonic):
        self.wall_ns += round((monotonic - self.monotonic) * SECOND)
        self.monotonic = monotonic

    def commit(self):
        for key, value in self.incidents.changes().items():
            if value is None:
                self.states.pop(key, None)
            else:
                self.states[key] = value

    def restart(self, *, down_seconds=0.0, wall_jump_seconds=0.0):
        """A new process after a kill: another monotonic clock, the wall clock goes on."""
        self.wall_ns += round((down_seconds + wall_jump_seconds) * SECOND)
        self.monotonic = 5.0
        self.incidents = Incidents(self.limits, new_id=lambda: next(self.ids))
        return self.incidents.restore(self.states, self.now)

    def ready(self, *domains, **more):
        return self.see(SourceReady(HOST, self.wall_ns, domains or (a_state(),), **more))


def told(events):
    """(phase, count) of each event; a resolution is (resolved, cause)."""
    return [
        (event.incident.phase.value, event.occurrences.count)
        if isinstance(event, IoError)
        else (event.incident.phase.value, event.resolution.cause)
        for event in events
    ]


def counted(events, origin=Origin.EVENT):
    return sum(
        event.occurrences.count for event in events if isinstance(event, IoError) and event.origin is origin
    )


# ------------------------------------------------------------------------------------------- opening


def test_the_first_error_goes_out_at_once_with_libvirts_own_words():
    bench = Bench()
    (event,) = bench.see(an_error(action=PAUSE, reason="enospc", path="/images/a.qcow2"))
    assert event.incident.phase is Phase.OPENED
    assert event.incident.id == "incident-1"
    assert (event.error.action, event.error.action_code) == (Action.PAUSE, PAUSE)
    assert (event.error.reason, event.error.path) == ("enospc", "/images/a.qcow2")
    assert event.error.occurred_at == event.incident.opened_at == to_datetime(START)
    assert (event.occurrences.count, event.occurrences.total) == (1, 1)
    assert event.host == HOST
    assert event.origin is Origin.EVENT


def test_a_raw_callback_counts_as_one_error_of_origin_event():
    bench = Bench()
    (event,) = bench.see(RawIoError("guest-a", "web", 7, "", DISK, REPORT, "", START))
    assert (event.occurrences.count, event.origin) == (1, Origin.EVENT)
    assert event.error.path == ""


def test_an_action_code_that_nobody_knows_yet_goes_through():
    (event,) = Bench().see(an_error(action=9))
    assert (event.error.action, event.error.action_code) == (Action.UNKNOWN, 9)


def test_errors_of_two_devices_are_two_incidents():
    bench = Bench()
    (one,), (two,) = bench.see(an_error(DISK)), bench.see(an_error(OTHER_DISK))
    assert one.incident.id != two.incident.id
    assert bench.incidents.open_count == 2


# ------------------------------------------------------------------------------------------- windows


def test_errors_in_a_window_are_told_in_one_update_when_it_ends():
    bench = Bench()
    bench.see(an_error())
    first = bench.wall_ns + SECOND // 4
    bench.wait(0.25)
    assert bench.see(an_error(count=3)) == []
    bench.wait(0.5)
    assert bench.see(an_error(count=4)) == []
    (update,) = bench.wait(0.5)
    assert update.incident.phase is Phase.UPDATED
    assert (update.occurrences.count, update.occurrences.total) == (7, 8)
    assert update.occurrences.first == to_datetime(first)
    assert update.occurrences.last == update.error.occurred_at == to_datetime(first + SECOND // 2)


def test_windows_double_up_to_the_limit_while_errors_go_on():
    bench = Bench()
    bench.see(an_error())
    times = []
    for _ in range(4 * 260):
        bench.see(an_error())
        times += [round(bench.monotonic - 1000) for _ in bench.wait(0.25)]
    assert times == [1, 3, 7, 15, 31, 63, 123, 183, 243]


def test_an_hour_of_storm_costs_few_messages_and_loses_no_count():
    bench = Bench()
    events = bench.see(an_error())
    for _ in range(3600):
        events += bench.see(an_error(count=4700)) + bench.wait(1.0)
    events += bench.wait(60)
    assert counted(events) == 1 + 3600 * 4700
    assert len(events) < 80


@pytest.mark.parametrize("seconds", [1.0, 1.02, 0.98])
def test_a_storm_that_the_hypervisor_throttles_to_one_a_second_is_folded_too(seconds):
    bench = Bench()
    events = []
    for _ in range(3600):
        events += bench.see(an_error()) + bench.wait(seconds)
    events += bench.wait(60)
    assert counted(events) == 3600
    assert len(events) < 80


def test_a_rare_error_is_told_at_once_however_wide_the_window_is():
    bench = Bench()
    for _ in range(200):
        bench.see(an_error())
        bench.wait(1)
    bench.wait(125)
    for _ in range(10):
        assert told(bench.see(an_error())) == [("updated", 1)]
        assert bench.wait(130) == []


def test_an_error_after_a_silent_window_goes_out_at_once():
    bench = Bench()
    bench.see(an_error())
    bench.see(an_error())
    assert told(bench.wait(5)) == [("updated", 1)]
    assert told(bench.see(an_error())) == [("updated", 1)]
    assert bench.see(an_error()) == []  # and its window is as wide as the last one was
    assert bench.wait(1.9) == []
    assert told(bench.wait(0.2)) == [("updated", 1)]


def test_a_late_tick_tells_what_the_window_counted():
    bench = Bench()
    bench.see(an_error())
    bench.see(an_error(count=5))
    bench.monotonic += 100
    assert told(bench.see(an_error(count=2))) == [("updated", 7)]


# -------------------------------------------------------------------------------------------- changes


@pytest.mark.parametrize("change", [{"reason": "enospc"}, {"action": PAUSE}])
def test_a_change_of_action_or_reason_goes_out_at_once(change):
    bench = Bench()
    bench.see(an_error())
    (event,) = bench.see(an_error(**change))
    assert event.incident.phase is Phase.UPDATED
    assert event.occurrences.count == 1


def test_a_change_of_path_alone_waits_for_the_windows_end():
    bench = Bench()
    bench.see(an_error(path="/top"))
    assert bench.see(an_error(path="/base")) == []
    assert bench.wait(1)[0].error.path == "/base"


def test_what_was_counted_before_a_change_goes_out_under_its_own_reason():
    bench = Bench()
    bench.see(an_error())
    bench.see(an_error(count=5))
    before, after = bench.see(an_error(reason="enospc"))
    assert (before.error.reason, before.occurrences.count) == ("", 5)
    assert (after.error.reason, after.occurrences.count) == ("enospc", 1)


def test_a_guest_that_alternates_reasons_is_held_to_one_message_a_second_after_ten():
    bench = Bench()
    events, times = [], []
    for number in range(10_000):
        new = bench.see(an_error(reason="enospc" if number % 2 else "eio")) + bench.wait(0.002)
        events += new
        times += [bench.monotonic] * len(new)
    events += bench.wait(2)
    assert counted(events) == 10_000
    assert len(times) <= 10 + 20
    assert all(later - earlier >= 0.99 for earlier, later in itertools.pairwise(times[9:]))


def test_a_change_that_had_to_wait_is_told_within_a_second():
    bench = Bench()
    for number in range(10):
        bench.see(an_error(reason=str(number)))
    assert bench.see(an_error(reason="the newest")) == []
    (event,) = bench.wait(1)
    assert event.error.reason == "the newest"


def test_a_change_that_had_to_wait_is_not_held_up_by_further_errors_nor_by_a_wide_window():
    bench = Bench()
    for _ in range(40):
        bench.see(an_error())
        bench.wait(0.9)
    for number in range(10):
        bench.see(an_error(reason=str(number)))
    bench.see(an_error(reason="the newest"))
    bench.see(an_error(reason="the newest"))
    assert bench.wait(1)[-1].error.reason == "the newest"


# -------------------------------------------------------------------------------------------- origins


def test_an_event_speaks_of_one_origin_only():
    bench = Bench()
    bench.see(an_error())
    bench.see(an_error(count=3))
    bench.see(an_error(origin=Origin.LIFECYCLE))
    events = bench.wait(2)
    assert [(event.origin, event.occurrences.count) for event in events] == [
        (Origin.EVENT, 3),
        (Origin.LIFECYCLE, 1),
    ]
    assert [event.occurrences.total for event in events] == [4, 5]


def test_a_drill_has_an_incident_of_its_own():
    bench = Bench()
    (drill,) = bench.see(an_error(origin=Origin.REPLAY))
    (live,) = bench.see(an_error())
    assert live.incident.phase is Phase.OPENED
    assert live.incident.id != drill.incident.id
    assert [one.drill for one in bench.incidents.open_incidents()] == [True, False]


def test_a_drill_does_not_keep_a_live_incident_open():
    bench = Bench()
    bench.see(an_error(action=PAUSE, origin=Origin.REPLAY))
    (live,) = bench.see(an_error())
    events = bench.wait(301)
    assert [event.incident.id for event in events] == [live.incident.id]


def test_without_folding_each_callback_is_an_event_of_its_own():
    bench = Bench(fold=False)
    events = [event for _ in range(100) for event in bench.see(an_error())]
    assert [event.occurrences.count for event in events] == [1] * 100
    assert events[-1].occurrences.total == 100
    assert {event.incident.id for event in events} == {"incident-1"}


def test_without_folding_a_burst_stays_one_event_with_its_count():
    bench = Bench(fold=False)
    bench.see(an_error())
    assert told(bench.see(an_error(count=500))) == [("updated", 500)]


# ------------------------------------------------------------------------------------------- evidence


def test_evidence_and_the_hypervisors_text_pass_through():
    evidence = (Evidence("block_info", "inconclusive", capacity_bytes=100, allocation_bytes=1),)
    (event,) = Bench().see(an_error(evidence=evidence, message="No space left", disk_error="no_space"))
    assert event.error.evidence == evidence
    assert (event.error.message, event.error.disk_error) == ("No space left", "no_space")


def test_evidence_stays_with_the_errors_that_are_told_with_it():
    bench = Bench()
    evidence = (Evidence("state", "confirms"),)
    bench.see(an_error())
    bench.see(an_error(evidence=evidence))
    bench.see(an_error())
    (update,) = bench.wait(1)
    assert update.error.evidence == evidence
    bench.see(an_error())
    (update,) = bench.wait(2)
    assert update.error.evidence == ()


def test_what_a_look_finds_out_later_is_told_without_a_count():
    bench = Bench()
    bench.see(an_error(action=PAUSE, reason="enospc"))
    happened = bench.wall_ns
    bench.wait(0.2)
    evidence = (Evidence("file_system", "inconclusive"),)
    assert bench.see(an_error(action=PAUSE, reason="enospc", count=0, at=happened, evidence=evidence)) == []
    (update,) = bench.wait(1)
    assert update.error.evidence == evidence
    assert (update.occurrences.count, update.occurrences.total) == (0, 1)
    assert update.error.occurred_at == to_datetime(happened)
    assert update.incident.pauses == 1


def test_what_a_look_finds_out_goes_with_the_errors_that_wait():
    bench = Bench()
    bench.see(an_error())
    bench.wait(0.2)
    first = bench.wall_ns
    bench.see(an_error(count=3))
    bench.see(an_error(count=0, at=START, evidence=(Evidence("state", "confirms"),)))
    (update,) = bench.wait(1)
    assert update.occurrences.count == 3
    assert update.occurrences.first == to_datetime(first)
    assert update.error.evidence != ()


def test_a_look_does_not_disturb_the_quiet_nor_pause_a_guest():
    bench = Bench()
    bench.see(an_error(action=PAUSE))
    bench.see(DomainResumed("guest-a", bench.wall_ns))
    bench.wait(100)
    bench.see(an_error(action=PAUSE, count=0))
    assert told(bench.wait(201)) == [("resolved", "resumed")]


def test_a_look_opens_no_incident():
    assert Bench().see(an_error(count=0)) == []


def test_an_event_that_comes_after_its_finding_adds_what_it_knows_to_the_unnamed_device():
    bench = Bench()
    bench.see(an_error("", action=PAUSE, origin=Origin.LIFECYCLE))
    (update,) = bench.see(an_error(DISK, action=PAUSE, reason="enospc", count=0))
    assert (update.error.reason, update.occurrences.count, update.occurrences.total) == ("enospc", 0, 1)
    assert bench.incidents.open_count == 1


# --------------------------------------------------------------------------------------- descriptions


def test_an_error_of_a_described_device_is_enriched():
    (event,) = Bench().see(an_error())
    assert event.enriched
    assert event.device.target == "target of virtio-disk0"
    assert event.domain.owner.id == "owner of guest-a"


@pytest.mark.parametrize("alias", ["", "not-in-the-xml"])
def test_a_device_that_the_description_does_not_have_is_not_called_enriched(alias):
    (event,) = Bench().see(an_error(alias))
    assert not event.enriched
    assert event.device == Device(alias or None)
    assert event.domain.owner is not None


def test_an_unknown_domain_is_told_with_what_the_callback_said():
    (event,) = Bench(describe=lambda _uuid: None).see(an_error())
    assert not event.enriched
    assert event.domain == Domain("guest-a", "name of guest-a", 7)
    assert event.device == Device(DISK)


def test_a_description_that_comes_later_enriches_the_updates():
    bench = Bench(describe=lambda _uuid: None)
    bench.see(an_error())
    bench.see(an_error())
    bench.describe = described
    (update,) = bench.wait(1)
    assert update.enriched
    assert update.device.target == "target of virtio-disk0"


def test_what_was_known_of_a_device_is_kept_when_its_description_is_gone():
    bench = Bench()
    bench.see(an_error())
    bench.describe = lambda _uuid: None
    (resolved,) = bench.see(DomainGone("guest-a", START, "domain_stopped"))
    assert resolved.device.target == "target of virtio-disk0"


# ------------------------------------------------------------------------------------------ resolution


def test_a_quiet_incident_resolves_with_its_length_and_all_its_errors():
    bench = Bench()
    bench.see(an_error())
    bench.see(an_error(count=4))
    bench.wait(1)
    assert bench.wait(298.9) == []
    (resolved,) = bench.wait(0.2)
    assert isinstance(resolved, IoErrorResolved)
    assert resolved.resolution.cause == "quiet"
    assert resolved.resolution.resolved_at == to_datetime(START + 300 * SECOND)
    assert resolved.resolution.duration_seconds == 300
    assert resolved.occurrences.total == 5
    assert resolved.incident.phase is Phase.RESOLVED
    assert bench.incidents.open_count == 0
    assert bench.incidents.next_due() is None


def test_an_incident_never_resolves_while_its_guest_is_paused():
    bench = Bench()
    bench.see(an_error(action=PAUSE))
    assert bench.wait(100_000) == []
    assert bench.incidents.next_due() is None


def test_after_a_resume_the_device_has_to_stay_quiet():
    bench = Bench()
    bench.see(an_error(action=PAUSE))
    bench.wait(3600)
    bench.see(DomainResumed("guest-a", bench.wall_ns))
    assert bench.wait(299.9) == []
    (resolved,) = bench.wait(0.2)
    assert resolved.resolution.cause == "resumed"
    assert resolved.resolution.duration_seconds == 3900


def test_silence_of_a_device_says_nothing_while_another_device_holds_the_guest_paused():
    bench = Bench()
    bench.see(an_error(DISK, action=PAUSE))
    bench.see(an_error(OTHER_DISK, action=REPORT))
    assert bench.wait(1000) == []
    bench.see(DomainResumed("guest-a", bench.wall_ns))
    assert told(bench.wait(301)) == [("resolved", "resumed"), ("resolved", "quiet")]


def test_a_standstill_is_told_until_the_guest_runs_although_the_device_that_caused_it_was_unplugged():
    bench = Bench()
    bench.see(an_error(DISK, action=PAUSE))
    bench.see(an_error(OTHER_DISK, action=REPORT))
    assert bench.see(DeviceRemoved("guest-a", DISK, bench.wall_ns)) == []
    assert bench.wait(1000) == []
    assert told(bench.see(DomainResumed("guest-a", bench.wall_ns))) == [("resolved", "device_removed")]
    assert told(bench.wait(301)) == [("resolved", "quiet")]


def test_a_standstill_by_an_unplugged_device_is_not_counted_again_after_a_restart():
    bench = Bench()
    bench.see(an_error(DISK, action=PAUSE))
    bench.see(DeviceRemoved("guest-a", DISK, bench.wall_ns))
    bench.commit()
    bench.restart()
    look = a_state(state="paused", paused=True, aliases=frozenset({OTHER_DISK}))
    assert bench.ready(look, findings=(an_error("", action=PAUSE, origin=Origin.RECONCILE),)) == []
    assert told(bench.ready(a_state(aliases=frozenset({OTHER_DISK})))) == [("resolved", "device_removed")]


@pytest.mark.parametrize("cause", ["domain_stopped", "migrated", "undefined"])
def test_a_guest_that_leaves_ends_its_incidents_at_once_with_the_cause(cause):
    bench = Bench()
    bench.see(an_error(DISK, action=PAUSE))
    bench.see(an_error(OTHER_DISK))
    bench.see(an_error(domain="guest-b"))
    events = bench.see(DomainGone("guest-a", START + 5, cause))
    assert told(events) == [("resolved", cause)] * 2
    assert events[0].resolution.resolved_at == to_datetime(START + 5)
    assert bench.incidents.open_count == 1


def test_what_is_pending_goes_out_before_the_resolution():
    bench = Bench()
    for number in range(10):  # from now on a message waits for a second
        bench.see(an_error(reason=str(number)))
    bench.see(an_error(reason="9", count=9))
    bench.see(an_error(reason="9", origin=Origin.LIFECYCLE))
    events = bench.see(DeviceRemoved("guest-a", DISK, START))
    assert told(events) == [("updated", 9), ("updated", 1), ("resolved", "device_removed")]
    assert events[-1].occurrences.total == 20


def test_a_guest_that_migrates_away_and_back_begins_anew():
    bench = Bench()
    (first,) = bench.see(an_error(action=PAUSE))
    bench.see(DomainGone("guest-a", bench.wall_ns, "migrated"))
    bench.wait(5)
    (second,) = bench.see(an_error())
    assert second.incident.phase is Phase.OPENED
    assert second.incident.id != first.incident.id
    assert (second.occurrences.total, second.incident.pauses) == (1, 0)
    assert told(bench.wait(301)) == [("resolved", "quiet")]


def test_a_renamed_guest_keeps_its_incident_under_its_new_name():
    bench = Bench()
    (first,) = bench.see(an_error())
    bench.describe = lambda uuid: Description(Domain(uuid, "renamed"), {})
    bench.see(an_error())
    (update,) = bench.wait(1)
    assert update.incident.id == first.incident.id
    assert update.domain.name == "renamed"


def test_an_error_after_a_resolution_opens_a_new_incident():
    bench = Bench()
    (first,) = bench.see(an_error())
    bench.wait(301)
    (second,) = bench.see(an_error())
    assert second.incident.phase is Phase.OPENED
    assert second.incident.id != first.incident.id
    assert second.occurrences.total == 1


def test_a_wall_clock_that_is_set_back_makes_no_negative_duration():
    bench = Bench()
    bench.see(an_error())
    bench.wall_ns -= 86_400 * SECOND
    (resolved,) = bench.wait(301)
    assert resolved.resolution.duration_seconds == 300


# --------------------------------------------------------------------------------------------- flapping


def test_a_pause_and_resume_loop_is_recognised_and_told_at_once():
    bench = Bench()
    (first,) = bench.see(an_error(action=PAUSE))
    assert (first.incident.pauses, first.incident.flapping) == (1, False)
    events = []
    for _ in range(2):
        bench.wait(0.4)
        bench.see(DomainResumed("guest-a", bench.wall_ns))
        events = bench.see(an_error(action=PAUSE))
    (event,) = events
    assert (event.incident.pauses, event.incident.flapping) == (3, True)
    assert event.incident.pauses_per_minute == pytest.approx(150)


def test_flapping_ends_when_the_pauses_are_long_ago():
    bench = Bench(quiet_seconds=3600)
    for _ in range(3):
        bench.see(an_error(action=PAUSE))
        bench.see(DomainResumed("guest-a", bench.wall_ns))
    bench.wait(601)
    (event,) = bench.see(an_error())
    assert (event.incident.pauses, event.incident.flapping) == (3, False)


def test_further_errors_of_a_paused_guest_are_no_further_pause():
    bench = Bench()
    bench.see(an_error(action=PAUSE))
    bench.see(an_error(action=PAUSE, count=7))
    assert bench.wait(1)[0].incident.pauses == 1


def test_pauses_that_were_told_late_count_all():
    bench = Bench()
    (event,) = bench.see(an_error(action=PAUSE, origin=Origin.LIFECYCLE, count=3))
    assert (event.occurrences.count, event.incident.pauses, event.incident.flapping) == (3, 3, True)


# ------------------------------------------------------------------------------------------------ bounds


def test_beyond_the_limit_errors_fold_into_one_incident_a_domain_and_then_one_a_host():
    bench = Bench(max_open=10)
    events = []
    for domain, disk in itertools.product(range(20), range(5)):
        events += bench.see(an_error(f"disk{disk}", domain=f"guest-{domain}"))
        assert bench.incidents.open_count <= 10
    events += bench.wait(60)
    assert counted(events) == 100
    opened = [event.incident.scope for event in events if event.incident.phase is Phase.OPENED]
    assert opened == [Scope.DEVICE] * 6 + [Scope.DOMAIN] * 2 + [Scope.HOST]
    wide = [event for event in events if event.incident.scope is Scope.HOST]
    assert {(event.domain, event.device) for event in wide} == {(WHOLE_HOST, Device(None))}


def test_a_domain_wide_incident_keeps_its_domains_new_devices():
    bench = Bench(max_open=10)
    for number in range(6):
        bench.see(an_error(domain=f"guest-{number}"))
    (wide,) = bench.see(an_error(domain="guest-x"))
    assert (wide.incident.scope, wide.device) == (Scope.DOMAIN, Device(None))
    assert wide.domain.uuid == "guest-x"
    for number in range(6):
        bench.see(DomainGone(f"guest-{number}", START, "domain_stopped"))
    assert bench.see(an_error(OTHER_DISK, domain="guest-x")) == []
    assert bench.incidents.open_count == 1


def test_a_host_wide_incident_waits_for_each_guest_that_it_paused():
    bench = Bench(max_open=1)
    (event,) = bench.see(an_error(domain="guest-a", action=PAUSE))
    assert event.incident.scope is Scope.HOST
    bench.see(an_error(domain="guest-b", action=PAUSE))
    bench.wait(2)
    bench.see(DomainResumed("guest-a", bench.wall_ns))
    assert bench.wait(1000) == []
    assert bench.see(DomainGone("guest-b", bench.wall_ns, "domain_stopped")) == []
    assert told(bench.wait(301)) == [("resolved", "resumed")]


def test_a_guest_that_a_host_wide_incident_holds_paused_keeps_its_other_incidents_open():
    bench = Bench(max_open=5)
    for domain in ("guest-a", "guest-b", "guest-c"):
        bench.see(an_error(domain=domain))
    (wide,) = bench.see(an_error(OTHER_DISK, domain="guest-a", action=PAUSE))
    assert wide.incident.scope is Scope.HOST
    ended = {event.domain.uuid for event in bench.wait(1000)}
    assert ended == {"guest-b", "guest-c"}


def test_a_host_wide_incident_lets_go_of_guests_that_were_gone_when_we_looked_again():
    bench = Bench(max_open=1)
    bench.see(an_error(domain="guest-a", action=PAUSE))
    bench.ready(a_state("guest-b"))
    assert told(bench.wait(301)) == [("resolved", "quiet")]


def test_ten_thousand_guests_that_come_and_go_leave_nothing():
    bench = Bench()
    for number in range(10_000):
        uuid = f"guest-{number}"
        bench.see(an_error(domain=uuid, action=PAUSE))
        bench.see(DomainResumed(uuid, bench.wall_ns))
        bench.see(DomainGone(uuid, bench.wall_ns, "undefined"))
        bench.commit()
    assert bench.incidents.open_count == 0
    assert set(bench.states) == {"incidents/meta"}


def test_what_is_kept_of_resolved_incidents_is_bounded():
    bench = Bench(max_open=10, quiet_seconds=1)
    for number in range(100):
        bench.see(an_error(domain=f"guest-{number}"))
        bench.wait(2)
        bench.commit()
    assert bench.incidents.open_count == 0
    assert len(bench.states) == 10 + 1  # and the host's name


# ------------------------------------------------------------------------------- blind, and looking again


def test_nothing_resolves_while_we_cannot_see():
    bench = Bench()
    bench.see(an_error())
    bench.see(SourceLost(bench.wall_ns, "libvirtd is gone"))
    assert bench.wait(10_000) == []
    assert bench.incidents.open_count == 1


def test_pending_counts_go_out_although_we_cannot_see():
    bench = Bench()
    bench.see(an_error())
    bench.see(an_error())
    bench.see(SourceLost(bench.wall_ns, "libvirtd is gone"))
    assert told(bench.wait(1)) == [("updated", 1)]


def test_after_a_gap_we_watch_the_widest_window_before_a_device_counts_as_quiet():
    bench = Bench()
    bench.see(an_error())
    bench.see(SourceLost(bench.wall_ns, "libvirtd is gone"))
    bench.wait(10_000)
    assert bench.ready() == []
    assert bench.wait(59.9) == []
    assert told(bench.wait(0.2)) == [("resolved", "quiet")]


@pytest.mark.parametrize(
    ("look", "cause"),
    [
        ((a_state("guest-b"),), "domain_stopped"),
        ((a_state(state="shut off"),), "domain_stopped"),
        ((a_state(aliases=frozenset({OTHER_DISK})),), "device_removed"),
    ],
)
def test_what_was_gone_when_we_looked_again_is_resolved(look, cause):
    bench = Bench()
    bench.see(an_error(action=PAUSE))
    bench.see(SourceLost(bench.wall_ns, "libvirtd is gone"))
    assert told(bench.ready(*look)) == [("resolved", cause)]


def test_a_guest_that_is_gone_leaves_no_state():
    bench = Bench()
    bench.see(an_error())
    bench.wait(301)
    bench.commit()
    assert len(bench.states) == 2
    bench.ready(a_state("guest-b"))
    bench.commit()
    assert set(bench.states) == {"incidents/meta"}


def test_a_drill_of_a_device_that_is_gone_keeps_the_guests_other_drills_held():
    bench = Bench()
    bench.see(an_error(DISK, action=PAUSE, origin=Origin.REPLAY))
    bench.see(an_error(OTHER_DISK, origin=Origin.REPLAY))
    look = a_state(state="paused", paused=True, aliases=frozenset({OTHER_DISK}))
    (live,) = bench.ready(look)
    assert live.origin is Origin.RECONCILE
    bench.see(an_error(domain="guest-b"))
    assert [event.domain.uuid for event in bench.wait(1000)] == ["guest-b"]


def test_a_device_that_the_xml_never_had_was_not_removed():
    bench = Bench()
    bench.see(an_error("not-in-the-xml"))
    assert bench.ready() == []


def test_a_device_whose_xml_could_not_be_read_was_not_removed():
    bench = Bench()
    bench.see(an_error())
    assert bench.ready(a_state(aliases=None)) == []


def test_a_guest_that_was_found_running_has_resumed():
    bench = Bench()
    bench.see(an_error(action=PAUSE))
    bench.see(SourceLost(bench.wall_ns, "libvirtd is gone"))
    bench.ready(a_state(state="running"))
    assert told(bench.wait(301)) == [("resolved", "resumed")]


def test_a_guest_that_was_found_paused_keeps_its_incidents_open():
    bench = Bench()
    bench.see(an_error(action=PAUSE))
    bench.see(DomainResumed("guest-a", bench.wall_ns))
    bench.see(SourceLost(bench.wall_ns, "libvirtd is gone"))
    bench.ready(a_state(state="paused", paused=True))
    assert bench.wait(1000) == []


def test_a_guest_that_was_found_paused_keeps_its_live_incident_open_although_a_drill_holds_it_too():
    bench = Bench()
    bench.see(an_error(action=PAUSE, origin=Origin.REPLAY))
    bench.see(an_error())
    bench.ready(a_state(state="paused", paused=True))
    assert bench.wait(1000) == []


# ---------------------------------------------------------------------------------------------- findings


def a_found_pause(alias=DISK, **more):
    return an_error(alias, action=PAUSE, origin=Origin.RECONCILE, **more)


def test_a_pause_that_was_found_and_not_told_is_an_error():
    bench = Bench()
    finding = a_found_pause(at=bench.wall_ns)
    (event,) = bench.ready(a_state(state="paused", paused=True), findings=(finding,))
    assert event.origin is Origin.RECONCILE
    assert event.incident.phase is Phase.OPENED
    assert bench.wait(1000) == []


@pytest.mark.parametrize("alias", [DISK, ""])
def test_a_pause_that_an_incident_tells_of_is_not_told_twice_not_even_after_a_restart(alias):
    bench = Bench()
    bench.see(an_error(DISK, action=PAUSE))
    bench.commit()
    bench.restart(down_seconds=20)
    finding = a_found_pause(alias, at=bench.wall_ns)
    assert bench.ready(a_state(state="paused", paused=True), findings=(finding,)) == []
    assert bench.wait(100) == []


def test_a_pause_by_a_second_disk_is_told():
    bench = Bench()
    bench.see(an_error(DISK, action=PAUSE))
    finding = a_found_pause(OTHER_DISK, at=bench.wall_ns)
    (event,) = bench.ready(a_state(state="paused", paused=True), findings=(finding,))
    assert event.device.alias == OTHER_DISK


def test_a_pause_that_was_missed_after_a_resume_that_was_seen_is_told():
    bench = Bench()
    bench.see(an_error(action=PAUSE))
    bench.see(DomainResumed("guest-a", bench.wall_ns))
    bench.see(SourceLost(bench.wall_ns, "libvirtd is gone"))
    bench.wait(10)
    finding = a_found_pause(at=bench.wall_ns)
    (event,) = bench.ready(a_state(state="paused", paused=True), findings=(finding,))
    assert event.incident.pauses == 2


def test_a_message_with_a_later_time_is_a_new_error_of_the_paused_guest():
    bench = Bench()
    bench.see(an_error(action=PAUSE))
    bench.see(SourceLost(bench.wall_ns, "libvirtd is gone"))
    bench.wait(10)
    finding = a_found_pause(at=bench.wall_ns - 5 * SECOND, message="Input/output error")
    (event,) = bench.ready(a_state(state="paused", paused=True), findings=(finding,))
    assert event.error.message == "Input/output error"


def test_a_message_of_an_error_that_was_told_is_not_told_again_after_its_incident_ended():
    bench = Bench()
    bench.see(an_error())
    happened = bench.wall_ns
    bench.wait(301)
    bench.commit()
    bench.restart(down_seconds=60)
    finding = an_error(at=happened, origin=Origin.RECONCILE, message="Input/output error")
    assert bench.ready(findings=(finding,)) == []
    newer = an_error(at=happened + 310 * SECOND, origin=Origin.RECONCILE, message="Input/output error")
    assert told(bench.ready(findings=(newer,))) == [("opened", 1)]


# ---------------------------------------------------------------------------------------------- restarts


def test_counts_that_were_pending_when_the_agent_was_killed_are_told_after_the_restart():
    bench = Bench()
    (first,) = bench.see(an_error())
    bench.see(an_error(count=41))
    bench.commit()
    assert bench.restart(down_seconds=0.5) == ()
    (update,) = bench.wait(0.51)
    assert (update.occurrences.count, update.occurrences.total) == (41, 42)
    assert update.incident.id == first.incident.id
    assert update.host == HOST


def test_errors_that_were_not_committed_are_not_told():
    bench = Bench()
    bench.see(an_error())
    bench.commit()
    bench.see(an_error(count=41))
    bench.restart()
    assert bench.wait(100) == []


def test_nothing_resolves_after_a_restart_before_the_first_look():
    bench = Bench()
    bench.see(an_error())
    bench.commit()
    bench.restart(down_seconds=10_000)
    assert bench.wait(10_000) == []
    bench.ready()
    assert told(bench.wait(61)) == [("resolved", "quiet")]


def test_a_wall_clock_that_went_back_while_the_agent_was_down_counts_as_no_time():
    bench = Bench()
    bench.see(an_error())
    bench.see(an_error())
    bench.commit()
    bench.restart(wall_jump_seconds=-86_400)
    assert bench.wait(0.9) == []
    assert told(bench.wait(0.2)) == [("updated", 1)]


def test_the_width_of_the_window_and_the_pauses_survive_a_restart():
    bench = Bench()
    for _ in range(2):
        bench.see(an_error(action=PAUSE))
        bench.see(DomainResumed("guest-a", bench.wall_ns))
    bench.wait(5)  # the first window ended with an update: the next is two seconds wide
    bench.commit()
    bench.restart()
    bench.ready()
    (event,) = bench.see(an_error(action=PAUSE))
    assert (event.incident.pauses, event.incident.flapping) == (3, True)
    bench.see(an_error(action=PAUSE))
    assert bench.wait(1.9) == []
    assert len(bench.wait(0.2)) == 1


def test_the_quiet_goes_on_over_a_restart():
    bench = Bench()
    bench.see(an_error())
    bench.wait(100)
    bench.commit()
    bench.restart(down_seconds=50)
    bench.ready()
    assert bench.wait(149.9) == []
    (resolved,) = bench.wait(0.2)
    assert resolved.resolution.cause == "quiet"
    assert resolved.resolution.duration_seconds == pytest.approx(300)


def test_pauses_before_a_restart_grow_old():
    bench = Bench()
    for _ in range(2):
        bench.see(an_error(action=PAUSE))
        bench.see(DomainResumed("guest-a", bench.wall_ns))
    bench.wait(10)
    bench.commit()
    bench.restart(down_seconds=600)
    bench.ready()
    (event,) = bench.see(an_error(action=PAUSE))
    assert (event.incident.pauses, event.incident.flapping) == (3, False)


def test_a_restart_lets_no_message_out_sooner():
    bench = Bench()
    for number in range(10):
        bench.see(an_error(reason=str(number)))
    bench.commit()
    bench.restart(down_seconds=0.2)
    assert bench.see(an_error(reason="the newest")) == []
    assert bench.wait(0.7) == []
    assert len(bench.wait(0.2)) == 1


def test_each_change_of_an_incident_is_in_the_states_of_its_own_commit():
    bench = Bench()
    bench.see(an_error())
    bench.commit()
    for count in (3, 4):
        bench.see(an_error(count=count))
        bench.commit()
    kept = dict(bench.states)
    assert told(bench.wait(1)) == [("updated", 7)]
    bench.commit()
    bench.restart()
    assert bench.wait(100) == []  # what was told is not pending any more
    bench.states = kept
    bench.restart()
    assert told(bench.wait(1)) == [("updated", 7)]


def test_a_state_that_cannot_be_read_is_reported_once_and_costs_no_other():
    bench = Bench()
    bench.see(an_error(domain="guest-a"))
    bench.see(an_error(domain="guest-b"))
    bench.commit()
    damaged = next(key for key in bench.states if "guest-a" in key)
    bench.states[damaged] = bench.states[damaged][:-5]
    bench.states["incident/guest-c/disk"] = bench.states["incident/guest-b/" + DISK].replace(
        b'"format":1', b'"format":2'
    )
    bench.states["somebody/else"] = b"not ours"
    problems = bench.restart()
    assert len(problems) == 2
    assert damaged in problems[0]
    assert bench.incidents.open_count == 1
    bench.commit()
    assert bench.restart() == ()
    assert "somebody/else" in bench.states


@pytest.mark.parametrize(
    "damage",
    [
        b'"last_ns":1' + b"0" * 30,  # no calendar has such a time
        b'"saved_ns":-1' + b"0" * 400,
        b'"later":' + b"[" * 100_000,
    ],
)
def test_a_state_that_is_damaged_beyond_its_form_is_reported_and_lets_the_agent_start(damage):
    bench = Bench()
    bench.see(an_error())
    bench.commit()
    whole = bench.states["incident/guest-a/" + DISK]
    bench.states["incident/guest-c/disk"] = whole[:-1] + b"," + damage + b"}"
    (problem,) = bench.restart()
    assert "guest-c" in problem
    assert len(bench.incidents.open_incidents()) == 1
    assert told(bench.ready(a_state("guest-b"))) == [("resolved", "domain_stopped")]


@pytest.mark.parametrize("key", ["incident", "drill", "seen"])
def test_a_key_that_is_not_quite_ours_is_left_alone(key):
    bench = Bench()
    bench.see(an_error())
    bench.wait(301)
    bench.commit()
    bench.states[key] = bench.states.pop("seen/guest-a/" + DISK)
    assert bench.restart() == ()
    assert bench.ready(a_state("guest-b")) == []
    bench.commit()
    assert key in bench.states


def test_a_field_that_a_later_release_added_does_no_harm():
    bench = Bench()
    bench.see(an_error())
    bench.commit()
    key = "incident/guest-a/" + DISK
    bench.states[key] = bench.states[key].replace(b'{"format"', b'{"new":[1],"format"')
    assert bench.restart() == ()
    assert bench.incidents.open_count == 1


def test_text_that_is_no_unicode_can_be_kept_and_told():
    bench = Bench()
    (event,) = bench.see(an_error("disk\ud800", path="/\udcff", reason="\udcfe"))
    event.error.path.encode()
    bench.see(an_error("disk\ud800", path="/\udcff", reason="\udcfe"))
    assert bench.incidents.open_count == 1
    bench.commit()
    assert bench.restart() == ()
    assert told(bench.wait(1)) == [("updated", 1)]


def test_descriptions_that_are_no_unicode_can_be_kept():
    def described_so(uuid):
        return Description(Domain(uuid, "guest\ud800"), {DISK: Device(DISK, target="\udcff")})

    bench = Bench(describe=described_so, host=Host("host\ud800"))
    bench.see(an_error(action=PAUSE))
    bench.see(an_error(action=PAUSE))
    bench.commit()
    assert bench.restart() == ()
    assert told(bench.wait(1)) == [("updated", 1)]
    assert bench.incidents.open_incidents()[0].paused


def test_states_of_a_commit_that_failed_merge_with_later_ones():
    bench = Bench()
    kept = bench.see(an_error())
    failed = bench.incidents.changes()
    kept += bench.see(an_error(count=5))
    kept += bench.wait(1)
    bench.states = {key: value for key, value in {**failed, **bench.incidents.changes()}.items() if value}
    bench.restart()
    assert counted(kept + bench.wait(100)) == 6


def test_changes_are_given_once():
    bench = Bench()
    bench.see(an_error())
    assert set(bench.incidents.changes()) == {"incidents/meta", "incident/guest-a/" + DISK}
    assert bench.incidents.changes() == {}


# --------------------------------------------------------------------------------------- the rest of it


def test_before_the_first_look_ever_the_host_is_called_unknown():
    (event,) = Bench(host=None).see(an_error())
    assert event.host is UNKNOWN_HOST


def test_the_first_look_names_the_host():
    bench = Bench(host=None)
    bench.ready()
    assert bench.incidents.host == HOST
    assert bench.see(an_error())[0].host == HOST


def on_qemu(version):
    return Host("compute-17", hypervisor=Hypervisor("QEMU", version, "9.0.0"))


def test_counts_are_lower_bounds_where_a_source_says_so_also_after_a_restart():
    bench = Bench(host=on_qemu("7.2.22"))
    bench.see(SourceReady(on_qemu("7.2.22"), bench.wall_ns, (a_state(),), throttles=True))
    (event,) = bench.see(an_error())
    assert event.occurrences.lower_bound
    bench.commit()
    bench.restart()
    (event,) = bench.see(an_error(OTHER_DISK))
    assert event.occurrences.lower_bound
    events = bench.see(DomainGone("guest-a", START, "migrated"))
    assert [event.occurrences.lower_bound for event in events] == [True, True]


def test_counts_of_a_hypervisor_that_merges_errors_are_lower_bounds_whatever_replaces_it():
    bench = Bench(host=on_qemu("10.0.0"))
    (event,) = bench.see(an_error())
    assert event.occurrences.lower_bound
    bench.see(HostKnown(on_qemu("7.2.22"), START))  # by now: what was merged stays so
    (event,) = bench.see(an_error(OTHER_DISK))
    assert not event.occurrences.lower_bound
    bench.commit()
    bench.restart()
    events = bench.see(DomainGone("guest-a", START, "migrated"))
    assert [event.occurrences.lower_bound for event in events] == [True, False]


def test_counts_are_lower_bounds_for_as_long_as_it_is_not_known_whether_errors_are_merged():
    bench = Bench(host=on_qemu(None))
    (event,) = bench.see(an_error())
    assert event.occurrences.lower_bound
    bench.commit()
    bench.restart()
    (event,) = bench.see(an_error(OTHER_DISK))
    assert event.occurrences.lower_bound
    bench.see(HostKnown(on_qemu("7.2.22"), START))
    events = bench.see(DomainGone("guest-a", START, "migrated"))
    assert [event.occurrences.lower_bound for event in events] == [False, False]


def test_where_a_host_has_several_hypervisors_an_event_speaks_of_its_guests_own():
    versions = {"guest-a": "7.2.22", "guest-b": "10.0.0", "guest-c": None}

    def describe(uuid):
        known = described(uuid)
        return replace(known, hypervisor=Hypervisor("QEMU", versions[uuid], "9.0.0"))

    bench = Bench(host=Host("node-1"), describe=describe)
    events = [event for uuid in versions for event in bench.see(an_error(domain=uuid))]
    assert [event.host for event in events] == [on_qemu_of_node(version) for version in versions.values()]
    assert [event.occurrences.lower_bound for event in events] == [False, True, True]
    bench.commit()
    versions |= {
        "guest-a": None,
        "guest-c": "7.2.22",
    }  # a new connection knows nothing yet; the last one does
    bench.restart()
    events = [event for uuid in versions for event in bench.see(DomainGone(uuid, START, "migrated"))]
    assert [event.host.hypervisor.version for event in events] == ["7.2.22", "10.0.0", "7.2.22"]
    assert [event.occurrences.lower_bound for event in events] == [False, True, False]


def on_qemu_of_node(version):
    return replace(on_qemu(version), name="node-1")


def test_open_incidents_are_listed_oldest_first_with_what_is_pending():
    bench = Bench()
    bench.see(an_error(DISK, action=PAUSE, reason="enospc"))
    bench.wait(0.5)
    bench.see(an_error(OTHER_DISK))
    bench.see(an_error(DISK, action=PAUSE, reason="enospc", count=3))
    first, second = bench.incidents.open_incidents()
    assert (first.device.alias, second.device.alias) == (DISK, OTHER_DISK)
    assert (first.total, first.paused, first.pauses, first.reason) == (4, True, 1, "enospc")
    assert first.action is Action.PAUSE
    assert not second.paused
    assert bench.incidents.open_incidents(limit=1) == (first,)


def test_a_quiet_house_needs_no_tick():
    bench = Bench(host=None)
    assert bench.incidents.next_due() is None
    assert bench.incidents.tick(bench.now) == []
    assert bench.incidents.changes() == {}


def test_observations_of_guests_without_incidents_change_nothing():
    bench = Bench(host=None)
    for observation in (
        DomainResumed("guest-a", START),
        DomainGone("guest-a", START, "domain_stopped"),
        DeviceRemoved("guest-a", DISK, START),
    ):
        assert bench.see(observation) == []
    assert bench.incidents.changes() == {}


def test_a_failing_look_up_costs_the_enrichment_and_no_count():
    def broken(_uuid):
        raise RuntimeError("the cache is broken")

    (event,) = Bench(describe=broken).see(an_error())
    assert not event.enriched
    assert event.occurrences.count == 1


def test_a_path_of_the_backing_chain_says_which_image_it_is():
    def layered(uuid):
        source = DeviceSource("file", path="/top.qcow2", backing=("/middle.qcow2", "/base.raw"))
        return Description(Domain(uuid, "guest"), {DISK: Device(DISK, source=source)})

    found = {}
    for path in ("/top.qcow2", "/base.raw", "/elsewhere", ""):
        (event,) = Bench(describe=layered).see(an_error(path=path))
        found[path] = event.device.chain_index
    assert found == {"/top.qcow2": 0, "/base.raw": 2, "/elsewhere": None, "": None}


def test_an_error_that_paused_the_guest_says_so_before_the_cache_knows():
    bench = Bench()
    (event,) = bench.see(an_error(action=PAUSE))
    assert described("guest-a").domain.state == "running"
    assert event.domain.state == "paused"


# ------------------------------------------------------------------------------ one error, one incident


def test_a_nameless_incident_takes_the_name_that_a_look_finds_and_goes_on_under_it():
    bench = Bench()
    (opened,) = bench.see(an_error("", action=PAUSE, origin=Origin.RECONCILE, path=""))
    bench.see(an_error(DISK, action=PAUSE, count=0, origin=Origin.RECONCILE, path=""))
    (named,) = bench.wait(1.1)
    assert (named.device.alias, named.occurrences.count, named.enriched) == (DISK, 0, True)
    bench.commit()
    bench.restart()
    (more,) = [*bench.see(an_error(DISK, action=PAUSE)), *bench.wait(1.1)]
    assert more.incident.id == named.incident.id == opened.incident.id
    assert more.occurrences.total == 2
    assert bench.incidents.open_count == 1


def test_an_update_that_says_nothing_new_is_not_sent():
    bench = Bench()
    bench.see(an_error())
    assert bench.see(an_error(count=0)) == []
    assert bench.wait(100) == []


@pytest.mark.parametrize(
    "news",
    [
        {"evidence": (Evidence("state", "confirms"),)},
        {"message": "Input/output error"},
        {"disk_error": "unspecified"},
        {"reason": "eio"},
    ],
    ids=str,
)
def test_an_update_that_says_something_new_is_sent_once(news):
    bench = Bench()
    bench.see(an_error())
    events = [*bench.see(an_error(count=0, **news)), *bench.wait(1.1)]
    assert told(events) == [("updated", 0)]
    assert [*bench.see(an_error(count=0, **news)), *bench.wait(100)] == []


def test_what_a_look_cannot_tell_of_an_error_does_not_replace_what_its_event_told():
    bench = Bench()
    bench.see(an_error(action=PAUSE, reason="message", path="/disk"))
    bench.see(an_error(action=PAUSE, count=0, origin=Origin.RECONCILE, path="", disk_error="unspecified"))
    (update,) = bench.wait(1.1)
    assert (update.error.reason, update.error.path) == ("message", "/disk")
    assert update.error.disk_error == "unspecified"


def test_a_look_of_any_time_does_not_count_what_an_earlier_run_told():
    bench = Bench()
    bench.see(an_error(DISK, action=PAUSE))
    bench.commit()
    for _ in range(3):
        bench.restart(down_seconds=20)
        assert bench.ready(a_state(state="paused", paused=True)) == []
        late = an_error(DISK, action=PAUSE, origin=Origin.RECONCILE, path="", disk_error="unspecified")
        assert counted([*bench.see(late), *bench.wait(100)], Origin.RECONCILE) == 0
        bench.commit()


def test_an_error_with_a_stamp_that_was_told_is_known_by_it_whatever_our_own_clock_said():
    """The hypervisor's clock may be another host's, and ahead of ours."""
    bench = Bench()
    bench.see(an_error(DISK, action=PAUSE))
    stamp = bench.wall_ns + 3600 * SECOND
    bench.see(an_error(DISK, action=PAUSE, count=0, message="I/O", stamp_ns=stamp, at=bench.wall_ns))
    bench.wait(2)
    bench.commit()
    bench.restart(down_seconds=20)
    again = a_found_pause(at=stamp, message="I/O", stamp_ns=stamp)
    assert (
        counted(bench.ready(a_state(state="paused", paused=True), findings=(again,)), Origin.RECONCILE) == 0
    )
    newer = a_found_pause(at=stamp + SECOND, message="I/O", stamp_ns=stamp + SECOND)
    events = [*bench.see(newer), *bench.wait(2)]
    assert counted(events, Origin.RECONCILE) == 1


def test_a_kept_disk_error_of_an_incident_that_is_over_is_not_told_again_in_another_disks_pause():
    bench = Bench()
    bench.see(an_error(OTHER_DISK, action=PAUSE))
    bench.see(DomainResumed("guest-a", bench.wall_ns))
    bench.wait(301)
    bench.commit()
    bench.restart(down_seconds=20)
    both = (a_found_pause(OTHER_DISK, at=bench.wall_ns), a_found_pause(DISK, at=bench.wall_ns))
    (event,) = bench.ready(a_state(state="paused", paused=True), findings=both)
    assert event.device.alias == DISK


def test_a_kept_disk_error_of_an_open_incident_is_not_told_again_in_another_disks_pause():
    bench = Bench()
    bench.see(an_error(OTHER_DISK, action=PAUSE))
    bench.see(DomainResumed("guest-a", bench.wall_ns))
    bench.commit()
    bench.restart(down_seconds=5)
    bench.ready(a_state())
    bench.see(an_error(DISK, action=PAUSE))
    events = [*bench.see(a_found_pause(OTHER_DISK, at=bench.wall_ns)), *bench.wait(2)]
    assert counted(events, Origin.RECONCILE) == 0


def test_a_guest_that_is_found_paused_by_an_error_that_nothing_tells_of_is_told():
    bench = Bench()
    (event,) = bench.ready(a_state(state="paused", paused=True, aliases=None))
    assert (event.origin, event.occurrences.count, event.device.alias) == (Origin.RECONCILE, 1, None)
    assert bench.ready(a_state(state="paused", paused=True, aliases=None)) == []


# --------------------------------------------------------------------------- guests that do not run


@pytest.mark.parametrize("state", ["paused", "pmsuspended", "crashed"])
def test_the_silence_of_a_guest_that_does_not_run_is_no_quiet(state):
    bench = Bench()
    bench.see(an_error())
    bench.see(DomainHalted("guest-a", bench.wall_ns, state))
    assert bench.wait(10_000) == []
    bench.see(DomainResumed("guest-a", bench.wall_ns))
    (resolved,) = bench.wait(301)
    assert (resolved.resolution.cause, resolved.domain.state) == ("quiet", "running")


@pytest.mark.parametrize("state", ["paused", "pmsuspended", "crashed"])
def test_a_guest_that_is_found_not_to_run_is_not_quiet_after_a_restart_either(state):
    bench = Bench()
    bench.see(an_error())
    bench.commit()
    bench.restart()
    assert bench.ready(a_state(state=state)) == []
    assert bench.wait(10_000) == []


def test_a_host_that_becomes_known_later_is_told_from_then_on():
    bench = Bench(host=Host("compute-17"))
    bench.see(HostKnown(Host("compute-17", uuid="8205ba32"), bench.wall_ns))
    (event,) = bench.see(an_error())
    assert event.host.uuid == "8205ba32"


@pytest.mark.parametrize(
    ("path", "index"),
    [
        ("/top", 0),
        ("/data", 0),
        ("base", 1),
        ("nbd://192.0.2.7:10809/base", 1),
        ("/raw", 2),
        ("/other", None),
    ],
)
def test_every_image_of_a_chain_has_its_index_also_a_network_image_that_libvirt_names_without_its_server(
    path, index
):
    source = DeviceSource(
        "file", path="/top", data_file="/data", backing=("nbd://192.0.2.7:10809/base", "/raw")
    )
    bench = Bench(describe=lambda uuid: Description(Domain(uuid, "g"), {DISK: Device(DISK, source=source)}))
    (event,) = bench.see(an_error(path=path))
    assert event.device.chain_index == index


def test_what_a_source_says_of_itself_alone_concerns_no_incident():
    bench = Bench()
    bench.see(an_error())
    for word in (SourceSeen(bench.now), CallbackLost(START, "not UTF-8")):
        assert bench.incidents.apply(word, bench.now, described) == []
    assert bench.incidents.open_count == 1


def test_a_guest_found_paused_by_an_error_is_told_with_its_disk_where_it_has_only_one():
    bench = Bench()
    for uuid, aliases in (("one", frozenset({DISK})), ("two", frozenset({DISK, OTHER_DISK})), ("none", None)):
        (event,) = bench.incidents.apply(
            SourceReady(HOST, START, (a_state(uuid, "paused", paused=True, aliases=aliases),)),
            bench.now,
            lambda _uuid: None,
        )[-1:]
        assert event.device.alias == (DISK if uuid == "one" else None)


@pytest.mark.parametrize("over", [False, True])
def test_a_clock_set_back_since_an_incidents_last_error_hides_no_error_that_a_look_finds(over):
    bench = Bench(quiet_seconds=10.0)
    bench.see(an_error())
    if over:
        bench.wait(30)
    bench.wall_ns -= 3600 * SECOND
    found = an_error(at=bench.wall_ns - SECOND, origin=Origin.RECONCILE, stamp_ns=bench.wall_ns - SECOND)
    events = bench.ready(a_state(), findings=(found,)) + bench.wait(120)
    assert counted(events, Origin.RECONCILE) == 1


@pytest.mark.parametrize("over", [False, True])
@pytest.mark.parametrize("since", [0, 1, 2])
def test_an_error_that_was_told_is_known_by_its_stamp_whichever_clock_wrote_it(over, since):
    """A disk's message may be of each image of its chain, and so of any clock that was set back since."""
    bench, stamps = Bench(quiet_seconds=10.0), []
    for back in (0, 3600, 30):
        bench.wall_ns -= back * SECOND
        bench.wait(1)
        bench.see(an_error())
        stamps.append(bench.wall_ns)
    bench.wait(2 + 30 * over)
    bench.commit()
    bench.restart(down_seconds=60)

    def found(stamp):
        return an_error(at=stamp, origin=Origin.RECONCILE, stamp_ns=stamp)

    known = bench.ready(a_state(), findings=(found(stamps[since]),)) + bench.wait(5)
    assert counted(known, Origin.RECONCILE) == 0
    events = bench.see(found(bench.wall_ns - SECOND)) + bench.wait(120)
    assert counted(events, Origin.RECONCILE) == 1, "and what nobody reported is reported"


# ------------------------------------------------------------------------- of many connections, one hangs


def on_connections(uuid):
    """Each guest behind a socket of its own."""
    return replace(described(uuid), connection=f"/run/{uuid}")


def surveyed(bench, *domains, unreached=()):
    return bench.see(
        Surveyed(bench.wall_ns, HOST, frozenset(domains), frozenset(f"/run/{uuid}" for uuid in unreached))
    )


@pytest.fixture
def restarted():
    """A new run with incidents of three guests, and no description: none of them was looked at yet."""
    bench = Bench(describe=on_connections)
    for uuid in ("ended", "hangs", "there"):
        bench.see(an_error(domain=uuid, action=PAUSE))
    bench.commit()
    bench.restart()
    bench.describe = lambda uuid: None
    return bench


def test_a_survey_that_could_not_reach_one_socket_ends_only_what_was_behind_others(restarted):
    (ended,) = surveyed(restarted, "there", unreached=["hangs"])
    assert (ended.domain.uuid, told([ended])) == ("ended", [("resolved", "domain_stopped")])
    # Of the guest behind the socket nothing is known: it neither ended nor recovered.
    assert told(restarted.wait(10_000.0)) == []
    assert {one.domain_uuid for one in restarted.incidents.open_incidents()} == {"hangs", "there"}


def test_the_guest_of_a_socket_that_answers_late_is_looked_at_then(restarted):
    surveyed(restarted, "there", unreached=["hangs"])
    restarted.ready(a_state("hangs", "paused", paused=True), connection="/run/hangs", whole=False)
    assert surveyed(restarted, "there", "hangs") == []
    assert restarted.incidents.open_count == 2


def test_the_guest_of_a_socket_that_goes_away_unreached_has_ended(restarted):
    surveyed(restarted, "there", unreached=["hangs"])
    # A second survey speaks of that guest alone: one that it does not list may be new.
    restarted.see(an_error(domain="new"))
    (ended,) = surveyed(restarted)
    assert (ended.domain.uuid, told([ended])) == ("hangs", [("resolved", "domain_stopped")])


def test_a_guest_that_came_back_behind_another_socket_was_started_again(restarted):
    """A pod was replaced while the agent was away: the same UUID and, in a new daemon, the same number."""
    paused = a_state("there", "paused", paused=True)
    first, second = restarted.ready(paused, connection="/run/its-next-pod", whole=False)
    assert told([first, second]) == [("resolved", "domain_stopped"), ("opened", 1)]


@pytest.mark.parametrize("name", ["qemu:///system?authfile=***", "/run/gu\udcffest"])
def test_a_connection_that_comes_back_is_the_same_whatever_its_name(name):
    bench = Bench(describe=lambda uuid: replace(described(uuid), connection=name))
    bench.see(an_error(domain="there", action=PAUSE))
    bench.commit()
    bench.restart()
    assert bench.ready(a_state("there", "paused", paused=True), connection=name, whole=False) == []
    bench.restart()
    hangs = Surveyed(bench.wall_ns, HOST, frozenset(), frozenset({name}))
    assert bench.see(hangs) == []


def test_a_guest_that_two_sockets_show_is_not_started_again_by_the_second(restarted):
    there = a_state("there", "paused", paused=True)
    assert restarted.ready(there, connection="/run/there", whole=False) == []
    assert restarted.ready(there, connection="/run/its-target", whole=False) == []


def test_a_guest_of_an_unknown_connection_waits_for_the_last_socket():
    bench = Bench(describe=lambda uuid: None)
    bench.see(an_error(domain="unknown"))
    bench.commit()
    bench.restart()
    assert surveyed(bench, unreached=["a", "b"]) == []
    assert surveyed(bench, unreached=["b"]) == []
    assert told(surveyed(bench)) == [("resolved", "domain_stopped")]


@pytest.mark.parametrize("found", ["virtio-disk0", ""], ids=["named", "of a listing"])
@pytest.mark.parametrize(("seconds", "counted"), [(5, 0), (120, 1)])
def test_an_event_behind_a_finding_that_an_earlier_run_had_reported_is_an_error_of_its_own(
    seconds, counted, found
):
    """A request that was on its way fails after the restart, of a guest that stands since long ago."""
    bench = Bench()
    bench.see(an_error(action=PAUSE))
    bench.commit()
    bench.wait(seconds)
    assert bench.restart() == ()
    finding = an_error(found, action=PAUSE, at=bench.wall_ns, origin=Origin.RECONCILE)
    assert bench.ready(a_state(state="paused", paused=True), findings=(finding,)) == []
    which = found or "virtio-disk1"  # a listing names none: it may be another one than fails now
    events = bench.see(replace(an_error(which, action=PAUSE), count=0, late=True)) + bench.wait(60)
    assert sum(event.occurrences.count for event in events if isinstance(event, IoError)) == counted


def test_a_pause_that_a_look_found_before_its_event_is_not_as_old_as_the_message_kept():
    """The message is of an error that an earlier run reported; the guest was paused since, by another one."""
    bench = Bench()
    bench.see(an_error())
    reported_at = bench.wall_ns
    bench.commit()
    bench.wait(60)
    bench.restart()
    finding = replace(
        an_error(action=PAUSE, at=reported_at, origin=Origin.RECONCILE), stamp_ns=reported_at, message="I/O"
    )
    events = bench.ready(a_state(state="paused", paused=True), findings=(finding,))
    assert sum(event.occurrences.count for event in events if isinstance(event, IoError)) == 1
    events = bench.see(replace(an_error(action=PAUSE), count=0, late=True)) + bench.wait(60)
    assert sum(event.occurrences.count for event in events if isinstance(event, IoError)) == 0


def test_what_one_connection_lost_says_nothing_of_a_guest_of_the_same_uuid_that_another_one_sees():
    """A guest was started again behind another socket while its first daemon hangs."""
    bench = Bench(describe=lambda uuid: replace(described(uuid), connection="/new"))
    bench.ready(a_state(), connection="/old", whole=False)
    bench.ready(a_state(), connection="/new", whole=False)
    bench.see(an_error())
    lost = frozenset({"guest-a"})
    bench.see(SourceLost(bench.wall_ns, "it hangs", "/old", domains=lost))
    bench.see(DomainGone("guest-a", bench.wall_ns, "domain_stopped", "/old"))
    assert told(bench.wait(600)) == [("resolved", "quiet")]
    bench.see(an_error())
    bench.see(SourceLost(bench.wall_ns, "it hangs", "/new", domains=lost))
    assert told(bench.wait(600)) == []
    assert told(bench.see(DomainGone("guest-a", bench.wall_ns, "domain_stopped", "/new"))) == [
        ("resolved", "domain_stopped")
    ]


def test_incidents_of_guests_in_a_folder_that_can_not_be_read_wait():
    bench = Bench(describe=lambda uuid: replace(described(uuid), connection="/pods/a/sock"))
    bench.see(an_error())
    bench.commit()
    bench.restart()
    nobody = frozenset()
    assert bench.see(Surveyed(bench.wall_ns, HOST, nobody, frozenset({"/pods/a", "/pods/b/sock"}))) == []
    assert told(bench.see(Surveyed(bench.wall_ns, HOST, nobody, frozenset({"/pods/b/sock"})))) == [
        ("resolved", "domain_stopped")
    ]
