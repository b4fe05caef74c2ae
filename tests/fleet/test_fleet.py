"""The fold: whatever order events come in, the fleet ends up knowing the same."""

from __future__ import annotations

import cProfile
import dataclasses
import itertools
from datetime import timedelta

import pytest

from virtbus.fleet import Blame, Fleet, FleetRules, StorageRules
from virtbus.fleet.storage import Sharing, identify
from virtbus.model import DeviceSource, Now, OpenIncident, OpenIncidents, SourceHealth, to_ns
from virtbus.testing import (
    AGENT_ID,
    DOMAIN_UUID,
    EPOCH,
    MOMENT,
    a_device,
    a_domain,
    a_heartbeat,
    a_host,
    a_resolved,
    an_io_error,
)
from virtbus.words import Action, Origin

LATER_EPOCH = EPOCH.replace("019a05f9", "019b0000")
INCIDENT = an_io_error().incident.id


def now(seconds: float = 0.0) -> Now:
    return Now(to_ns(MOMENT) + int(seconds * 1e9), 500.0 + seconds)


def attributes(sequence: int | None = None, *, agent: str = AGENT_ID, epoch: str = EPOCH) -> dict[str, str]:
    found = {"source": f"/virtbus/agents/{agent}", "epoch": epoch}
    return found if sequence is None else {**found, "sequence": f"{sequence:012d}"}


def listed(id_: str = INCIDENT) -> OpenIncidents:
    item = OpenIncident(
        id_, DOMAIN_UUID, "web-1", a_device(), Action.PAUSE, "enospc", MOMENT, MOMENT, 3, 1, True, False
    )
    return OpenIncidents(1, (item,))


def test_an_error_a_resolution_and_heartbeats_agree_in_any_order():
    told = [
        (an_io_error(), attributes(5)),
        (a_heartbeat(committed_sequence=5, incidents=listed()), attributes()),
        (a_resolved(), attributes(6)),
        (a_heartbeat(committed_sequence=6), attributes()),
    ]
    for order in itertools.permutations(told):
        fleet = Fleet()
        for event, words in order:
            fleet.saw(event, words, now())
        (host,) = fleet.view(now(1)).hosts
        assert host.incidents == 0, order


@pytest.mark.parametrize("odd", ["²", "9" * 5_000])
def test_a_sequence_that_is_no_number_ends_nothing(odd):
    fleet = Fleet()
    fleet.saw(an_io_error(), {**attributes(), "sequence": odd}, now())
    assert [host.incidents for host in fleet.view(now(1)).hosts] == [1]


def test_a_heartbeat_alone_tells_what_is_open():
    fleet = Fleet()
    fleet.saw(a_heartbeat(incidents=listed()), attributes(), now())
    (host,) = fleet.view(now(1)).hosts
    assert (host.incidents, host.guests, host.paused, host.blame) == (1, 1, 1, Blame.UNDETERMINED)
    assert host.fresh


def test_an_incident_that_a_complete_heartbeat_does_not_list_is_over():
    fleet = Fleet()
    fleet.saw(an_io_error(), attributes(5), now())
    fleet.saw(a_heartbeat(committed_sequence=4), attributes(), now())
    assert fleet.view(now()).incidents == 1
    fleet.saw(a_heartbeat(committed_sequence=5), attributes(), now())
    assert fleet.view(now()).incidents == 0


def test_a_heartbeat_that_lists_only_some_ends_nothing():
    fleet = Fleet()
    fleet.saw(an_io_error(), attributes(5), now())
    partial = OpenIncidents(150, listed("another").items)
    fleet.saw(a_heartbeat(committed_sequence=9, incidents=partial), attributes(), now())
    (host,) = fleet.view(now()).hosts
    assert host.incidents == 2
    assert not host.fresh


def test_a_restarted_agent_speaks_for_what_its_last_run_left_open():
    fleet = Fleet()
    fleet.saw(an_io_error(), attributes(900), now())
    beat = a_heartbeat(epoch=LATER_EPOCH, committed_sequence=1)
    fleet.saw(beat, attributes(epoch=LATER_EPOCH), now())
    assert fleet.view(now()).incidents == 0


def test_an_agent_that_misses_three_heartbeats_of_its_own_interval_is_silent():
    fleet = Fleet()
    fleet.saw(a_heartbeat(interval_seconds=10.0), attributes(), now())
    quiet = a_host(name="compute-2", uuid=None)
    fleet.saw(a_heartbeat(interval_seconds=0.0, host=quiet), attributes(agent="b"), now())
    assert [one.state for one in fleet.view(now(29)).hosts] == ["observing", "observing"]
    assert [one.state for one in fleet.view(now(31)).hosts] == ["silent", "observing"]


def test_a_cut_off_agent_is_blind():
    fleet = Fleet()
    fleet.saw(a_heartbeat(source=SourceHealth("disconnected", MOMENT)), attributes(), now())
    assert fleet.view(now()).hosts[0].state == "blind"


def test_a_host_that_was_installed_anew_is_one_host():
    fleet = Fleet()
    fleet.saw(a_heartbeat(), attributes(), now())
    fleet.saw(a_heartbeat(epoch=LATER_EPOCH), attributes(agent="new", epoch=LATER_EPOCH), now(5))
    assert [one.agent_id for one in fleet.view(now(6)).hosts] == ["new"]


def test_a_replayed_error_is_no_trouble_unless_the_rules_say_so():
    replayed = an_io_error(origin=Origin.REPLAY)
    for drills, expected in ((False, 0), (True, 1)):
        fleet = Fleet(FleetRules(drills=drills))
        fleet.saw(replayed, attributes(5), now())
        fleet.saw(a_heartbeat(committed_sequence=5, incidents=listed()), attributes(), now())
        assert fleet.view(now()).incidents == expected


def test_a_drill_that_only_a_heartbeat_tells_of_is_no_trouble_either():
    (item,) = listed().items
    drill = OpenIncidents(1, (dataclasses.replace(item, drill=True),))
    for drills, expected in ((False, 0), (True, 1)):
        fleet = Fleet(FleetRules(drills=drills))
        fleet.saw(a_heartbeat(incidents=drill), attributes(), now())
        assert fleet.view(now()).incidents == expected


def test_the_rate_of_errors_fades():
    fleet = Fleet()
    fleet.saw(an_io_error(), attributes(1), now())
    first = fleet.view(now()).errors_per_minute
    assert first > 0
    assert fleet.view(now(600)).errors_per_minute < first / 5


def test_most_agents_silent_at_once_makes_us_suspect_ourselves():
    fleet = Fleet()
    for number in range(4):
        host = a_host(name=f"compute-{number}", uuid=None)
        fleet.saw(a_heartbeat(host=host, interval_seconds=10.0), attributes(agent=str(number)), now())
    assert not fleet.view(now(5)).suspect_ourselves
    assert fleet.view(now(100)).suspect_ourselves


def test_the_work_of_a_view_grows_with_the_fleet_and_no_faster():
    """Counted in calls, because machines and their load differ."""

    def calls(hosts: int) -> int:
        fleet = Fleet()
        for number in range(hosts):
            host = a_host(name=f"compute-{number:05d}", uuid=None)
            fleet.saw(a_heartbeat(host=host), attributes(agent=str(number)), now())
            if number % 5 == 0:
                error = an_io_error(host=host, domain=a_domain(uuid=f"domain-{number}"))
                fleet.saw(error, attributes(100, agent=str(number)), now())
        profile = cProfile.Profile()
        view = profile.runcall(fleet.view, now(1))
        assert (len(view.hosts), view.incidents) == (hosts, hosts // 5)
        return sum(entry.callcount for entry in profile.getstats())

    small, large = calls(500), calls(2_000)
    assert large < 4.4 * small
    assert large < 100 * 2_000


def test_a_storm_of_incidents_stays_bounded():
    fleet = Fleet()
    error = an_io_error()
    for number in range(6_000):
        incident = type(error.incident)(
            f"i-{number}", error.incident.phase, MOMENT + timedelta(seconds=number)
        )
        fleet.saw(an_io_error(incident=incident), attributes(number + 1), now())
    assert fleet.view(now()).incidents == 5_000


def test_addresses_of_one_network_are_akin_and_the_port_does_not_count():
    one = identify("h", DeviceSource("network", "rbd", "vms/a", hosts=("10.0.0.1:6789",)), StorageRules())
    other = identify("h", DeviceSource("network", "rbd", "vms/b", hosts=("10.0.0.1:3300",)), StorageRules())
    near = identify("h", DeviceSource("network", "nfs", "/x", hosts=("10.0.0.9:2049",)), StorageRules())
    assert one.names == other.names == ("10.0.0.1",)
    assert one.kin & near.kin
    assert not set(one.names) & set(near.names)


def test_a_file_is_shared_only_where_its_path_or_the_operator_says_so():
    def sharing(path: str, rules: StorageRules | None = None) -> tuple[Sharing, str]:
        found = identify("h", DeviceSource("file", path=path), rules or StorageRules())
        return found.sharing, found.names[0]

    assert sharing("/var/lib/nova/mnt/abc/volume-1") == (Sharing.SHARED, "share:/var/lib/nova/mnt/abc")
    assert sharing("/var/lib/libvirt/images/x") == (Sharing.UNKNOWN, "unidentified@h")
    told = StorageRules(local_paths=("/var/lib/libvirt/images",))
    assert sharing("/var/lib/libvirt/images/x", told) == (Sharing.LOCAL, "local@h")
    ovirt = "/rhev/data-center/mnt/nfs1.lan:_export_data/0f/images/1"
    assert "nfs1.lan" in identify("h", DeviceSource("file", path=ovirt), StorageRules()).names
