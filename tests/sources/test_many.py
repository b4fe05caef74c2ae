"""Many hypervisors behind sockets that come and go, each a simulated one."""

from __future__ import annotations

import os
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from tests.sources.simulated import DEADLINE, Guest, Seen, SimulatedHost, SimulatedLink
from tests.sources.test_observer import OPTIONS
from tests.waiting import wait_until
from virtbus.config import Discover
from virtbus.errors import SourceDenied, SourceUnavailable
from virtbus.model import Clock, Hypervisor, Now
from virtbus.observations import (
    DomainGone,
    Observation,
    RawIoError,
    SourceGone,
    SourceLost,
    SourceReady,
    StoodStill,
    Surveyed,
)
from virtbus.retry import no_waiting
from virtbus.sources.link import PAUSED, Handler, NobodyListens
from virtbus.sources.many import KUBEVIRT, ManySource, SocketConnector
from virtbus.sources.sockets import Watch, look, one_each, unreadable

NAME = "libvirt-runtime/virtqemud-sock"


class Sockets:
    """A folder of pods, and the hypervisor behind each one's socket."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.hosts: dict[str, SimulatedHost] = {}
        self.opened: list[str] = []

    def add(self, pod: str, host: SimulatedHost | None = None) -> SimulatedHost:
        """A pod with one guest, whose UUID is its own."""
        path = self.folder / pod / NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        made = host or SimulatedHost()
        if host is None:
            number = 0xA000 + len(self.hosts)
            guest = Guest(f"00000000-0000-0000-0000-{number:012x}", pod, 1)
            made.guests[guest.uuid] = guest
        made.uri = str(path)
        self.hosts[str(path)] = made
        bind(path)
        return made

    def end(self, pod: str) -> None:
        """The pod's daemon and folder are gone."""
        path = self.folder / pod / NAME
        path.unlink()
        path.parent.rmdir()
        (self.folder / pod).rmdir()
        host = self.hosts.pop(str(path))
        host.down = True
        host.cut()

    def connector(self, path: str) -> SimulatedHost:
        """The connector of a path."""
        self.opened.append(path)
        return self.hosts[path]


def bind(path: Path) -> None:
    """A new socket in place of what is there."""
    path.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_PATH)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(f"/proc/self/fd/{folder}/{path.name}")
    os.close(folder)


def guest_of(host: SimulatedHost) -> Guest:
    return next(iter(host.guests.values()))


@pytest.fixture
def sockets(tmp_path: Path) -> Sockets:
    return Sockets(tmp_path)


@contextmanager
def observed(
    sockets: Sockets, clock: Callable[[], Now] | None = None, name: str = NAME
) -> Iterator[tuple[ManySource, Seen]]:
    source = ManySource(
        Discover(sockets=(f"{sockets.folder}/*/{name}",), host="node-1"),
        options=OPTIONS,
        connector=sockets.connector,
        clock=clock,
    )
    seen, stop = Seen(), threading.Event()
    with no_waiting():
        thread = threading.Thread(target=source.run, args=(seen, stop))
        thread.start()
        try:
            yield source, seen
        finally:
            stop.set()
            for host in sockets.hosts.values():
                host.release.set()
                host.probed.set()
                host.answers.set()
                host.frozen.clear()
            thread.join(DEADLINE)
            assert not thread.is_alive()


def of(path: str, kind: type) -> Callable[[Observation], bool]:
    return lambda item: isinstance(item, kind) and getattr(item, "connection", None) == path


def test_each_socket_is_looked_at_and_speaks_for_its_own_guest_on_the_named_node(sockets: Sockets) -> None:
    hosts = [sockets.add(f"pod{number}") for number in range(10)]
    with observed(sockets) as (source, seen):
        (survey,) = seen.wait(Surveyed)
        assert isinstance(survey, Surveyed)
        assert survey.domains == {guest_of(host).uuid for host in hosts}
        ready = seen.of(SourceReady)
        assert all(isinstance(item, SourceReady) and not item.whole for item in ready)
        assert {item.connection for item in ready if isinstance(item, SourceReady)} == set(sockets.hosts)
        assert {item.host.name for item in ready if isinstance(item, SourceReady)} == {"node-1"}
        for host in hosts:
            host.io_error(guest_of(host))
        assert len(seen.of(RawIoError)) == 10
        known = source.describe(guest_of(hosts[3]).uuid)
        assert known is not None
        assert known.domain.name == "pod3"


def test_all_are_connected_before_one_after_the_other_is_asked_for_its_hypervisors_version(
    sockets: Sockets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon that was never asked probes its QEMU: 0.4 s of a core each."""
    monkeypatch.setattr("virtbus.sources.many.ASK_SECONDS", 1e9)
    hosts = [sockets.add(f"pod{number}") for number in range(10)]
    for number, host in enumerate(hosts):
        host.qemu = f"9.{number}.0"
        host.probed.clear()
    with observed(sockets) as (source, seen):
        ready = seen.wait(SourceReady, 10)
        assert {item.host.hypervisor for item in ready if isinstance(item, SourceReady)} == {Hypervisor()}
        wait_until(lambda: sum(host.probing for host in hosts) == 1)
        known = [source.describe(guest_of(host).uuid) for host in hosts]
        assert {each and each.hypervisor for each in known} == {Hypervisor("QEMU", None, "9.0.0")}
        for asked in range(1, 11):
            wait_until(lambda asked=asked: sum(host.probing for host in hosts) == asked)  # type: ignore[misc]
            next(host for host in hosts if host.probing and not host.probed.is_set()).probed.set()
        for host in hosts:
            wait_until(lambda host=host: version_of(source, host) == host.qemu)  # type: ignore[misc]
        assert [host.probing for host in hosts] == [1] * 10


def version_of(source: ManySource, host: SimulatedHost) -> str | None:
    known = source.describe(guest_of(host).uuid)
    return None if known is None or known.hypervisor is None else known.hypervisor.version


def test_a_daemon_that_does_not_say_its_hypervisors_version_keeps_no_other_from_being_asked(
    sockets: Sockets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("virtbus.sources.many.ASK_SECONDS", 0.01)
    hosts = [sockets.add(f"pod{number}") for number in range(4)]
    for host in hosts[:3]:
        host.probed.clear()
    with observed(sockets) as (source, _):
        wait_until(lambda: version_of(source, hosts[3]) == "7.2.0")
        for host in hosts[:3]:
            host.probed.set()
        wait_until(lambda: all(version_of(source, host) == "7.2.0" for host in hosts))


def test_another_daemon_on_a_socket_is_asked_for_its_own_hypervisors_version(sockets: Sockets) -> None:
    host = sockets.add("pod1")
    with observed(sockets) as (source, _):
        wait_until(lambda: version_of(source, host) == "7.2.0")
        host.qemu = "10.0.0"
        host.cut()
        wait_until(lambda: version_of(source, host) == "10.0.0")


def test_a_daemon_that_libvirt_uri_names_too_is_observed_once(sockets: Sockets) -> None:
    named, other = sockets.add("named"), sockets.add("other")
    source = ManySource(
        Discover(sockets=(f"{sockets.folder}/*/{NAME}",)),
        options=OPTIONS,
        uri=f"qemu:///system?socket={named.uri}-ro",
        connector=sockets.connector,
    )
    seen, stop = Seen(), threading.Event()
    thread = threading.Thread(target=source.run, args=(seen, stop))
    thread.start()
    seen.wait(of(other.uri, SourceReady))
    stop.set()
    thread.join(DEADLINE)
    assert set(sockets.opened) == {other.uri}


def test_a_description_and_a_look_call_a_connection_by_the_same_name() -> None:
    uri = "test:///default?authfile=/etc/libvirt/auth.conf"
    source = ManySource(Discover(sockets=("/nowhere/*",)), options=OPTIONS, uri=uri)
    seen, stop = Seen(), threading.Event()
    thread = threading.Thread(target=source.run, args=(seen, stop))
    thread.start()
    (ready,) = seen.wait(SourceReady)
    assert isinstance(ready, SourceReady)
    (domain,) = ready.domains
    known = source.describe(domain.uuid)
    stop.set()
    thread.join(DEADLINE)
    assert known is not None
    assert known.connection == ready.connection


def test_a_socket_appeared_when_it_was_first_seen_whatever_happens_to_its_rights(tmp_path: Path) -> None:
    """Until somebody lets us in its guest may run unseen."""
    path = tmp_path / "virtqemud-sock"
    bind(path)
    came = path.stat().st_ctime_ns
    connector = SocketConnector(str(path), "qemu+unix:///session?socket={socket}", OPTIONS)
    for change in (lambda: path.chmod(0o600), lambda: bind(path)):
        with pytest.raises(SourceUnavailable):
            connector.open(None)
        change()
        assert path.stat().st_ctime_ns > came
    with pytest.raises(SourceUnavailable):
        connector.open(None)
    assert connector.appeared_ns == came


def test_a_socket_that_comes_later_is_found_by_inotify(sockets: Sockets) -> None:
    with observed(sockets) as (_, seen):
        seen.wait(Surveyed)
        host = sockets.add("late")
        seen.wait(of(host.uri, SourceReady))


@pytest.mark.parametrize("hours", [0, -2, 2])
def test_a_sockets_stamp_says_since_when_its_guest_runs_only_where_it_was_seen_to_come(
    sockets: Sockets, hours: int
) -> None:
    real, skew = Clock(), [0]

    def clock() -> Now:
        now = real()
        return now._replace(wall_ns=now.wall_ns + skew[0])

    old = sockets.add("old")
    old.appeared_ns = clock().wall_ns + 10**9  # the clock was set back since then
    with observed(sockets, clock) as (_, seen):
        (ready,) = seen.wait(SourceReady)
        assert isinstance(ready, SourceReady)
        assert ready.appeared_ns is None
        came, new = real().wall_ns, SimulatedHost(guests=1)
        new.frozen.set()
        new.appeared_ns = came
        sockets.add("new", new)
        wait_until(lambda: new.uri in sockets.opened)
        skew[0] = hours * 3600 * 10**9
        new.frozen.clear()
        late = seen.wait(SourceReady, 2)[1]
        assert isinstance(late, SourceReady)
        assert late.appeared_ns is not None
        before = came + skew[0] - late.appeared_ns  # how long before it came
        assert 0 <= before < 30 * 10**9 if hours else late.appeared_ns == new.appeared_ns


def test_a_standstill_is_reported_of_the_host_and_before_the_losses_of_its_connections(
    sockets: Sockets,
) -> None:
    """Whatever else the agent's threads did when it began: only this one knows that it did not look."""
    real, slept = Clock(), [0.0]

    def clock() -> Now:
        now = real()
        return now._replace(suspended=now.suspended + slept[0])

    host = sockets.add("there")
    with observed(sockets, clock) as (_, seen):
        seen.wait(Surveyed)
        slept[0] = 60.0
        (lost,) = seen.wait(SourceLost)
        (stood,) = seen.of(StoodStill)
        assert isinstance(stood, StoodStill)
        assert isinstance(lost, SourceLost)
        assert (lost.connection, lost.why) == (host.uri, f"{host.uri}: {stood.why}")
        assert seen.all.index(stood) < seen.all.index(lost)
        assert stood.since.suspended < slept[0]


def test_a_standstill_is_reported_while_the_survey_waits_for_a_daemon_that_hangs(sockets: Sockets) -> None:
    """The gap of the agent's start ends without it: pods may have come and gone since."""
    real, slept = Clock(), [0.0]
    silent, well = sockets.add("silent"), sockets.add("well")
    silent.frozen.set()
    with observed(sockets, lambda: real()._replace(suspended=slept[0])) as (_, seen):
        seen.wait(of(well.uri, SourceReady))
        slept[0] = 20.0  # less than the survey waits
        seen.wait(StoodStill)
        assert seen.of(Surveyed) == []


def test_a_guest_that_a_look_missed_and_the_next_one_finds_is_not_gone(
    sockets: Sockets, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon is lost again before its first look is over."""
    monkeypatch.setattr("virtbus.sources.guests.SNAPSHOT_SECONDS", 60.0)
    monkeypatch.setattr("tests.sources.test_many.OPTIONS", replace(OPTIONS, lookup_deadline_seconds=60.0))
    host = sockets.add("pod", SimulatedHost())
    one, other = (host.add(state=PAUSED) for _ in range(2))  # nothing is asked of them but the XML
    with observed(sockets) as (_, seen):
        seen.wait(SourceReady)
        del host.guests[one.uuid]
        host.hanging.add(other.uuid)
        links = len(host.links)
        host.cut()
        wait_until(lambda: host.calls > 0 and len(host.links) > links)  # it looks at the other one
        host.guests[one.uuid] = one
        host.hanging.clear()
        host.cut()
        host.release.set()
        seen.wait(SourceReady, 2)
        host.stop(other)
        gone = seen.wait(DomainGone)
        assert [item.domain_uuid for item in gone if isinstance(item, DomainGone)] == [other.uuid]


def test_a_pod_that_ends_ends_its_guest_alone(sockets: Sockets) -> None:
    ending, staying = sockets.add("ending"), sockets.add("staying")
    with observed(sockets) as (_, seen):
        seen.wait(Surveyed)
        sockets.end("ending")
        (gone,) = seen.wait(SourceGone)
        assert isinstance(gone, SourceGone)
        assert (gone.connection, gone.domains) == (ending.uri, frozenset({guest_of(ending).uuid}))
        (end,) = seen.wait(DomainGone)
        assert isinstance(end, DomainGone)
        assert end.domain_uuid == guest_of(ending).uuid
        staying.io_error(guest_of(staying))
        assert len(seen.of(RawIoError)) == 1


def test_a_daemon_that_restarts_is_lost_and_found_alone_and_a_guest_that_vanished_meanwhile_is_gone(
    sockets: Sockets,
) -> None:
    host, other = sockets.add("restarts"), sockets.add("other")
    vanished = guest_of(host)
    with observed(sockets) as (_, seen):
        seen.wait(Surveyed)
        host.guests.clear()
        host.add()
        bind(Path(host.uri))  # its socket is replaced
        host.cut()
        (lost,) = seen.wait(SourceLost)
        assert isinstance(lost, SourceLost)
        assert (lost.connection, lost.domains) == (host.uri, frozenset({vanished.uuid}))
        seen.wait(of(host.uri, SourceReady), 2)
        (gone,) = seen.wait(DomainGone)
        assert isinstance(gone, DomainGone)
        assert gone.domain_uuid == vanished.uuid
        assert not [item for item in seen.of(SourceLost) if of(other.uri, SourceLost)(item)]


def test_a_daemon_that_restarts_slowly_is_not_gone_while_its_folder_is_there(sockets: Sockets) -> None:
    host = sockets.add("slow")
    with observed(sockets) as (_, seen):
        seen.wait(Surveyed)
        Path(host.uri).unlink()
        host.cut()
        seen.wait(SourceLost)
        later = sockets.add("later")  # found by a look that missed the first one's socket
        seen.wait(of(later.uri, SourceReady))
        bind(Path(host.uri))
        seen.wait(of(host.uri, SourceReady), 2)
        assert seen.of(DomainGone, SourceGone) == []


def test_one_that_says_nothing_blinds_nobody_and_holds_back_the_survey_alone(sockets: Sockets) -> None:
    silent = sockets.add("silent")
    silent.frozen.set()
    well = [sockets.add(f"well{number}") for number in range(20)]
    with observed(sockets) as (_, seen):
        seen.wait(SourceReady, 20)
        assert seen.of(Surveyed) == []
        for host in well:
            host.io_error(guest_of(host))
        assert len(seen.of(RawIoError)) == 20
        silent.frozen.clear()
        seen.wait(Surveyed)


def test_a_socket_that_hangs_at_the_start_holds_the_survey_back_for_a_time_only(
    sockets: Sockets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("virtbus.sources.many.SURVEY_SECONDS", 0.0)
    silent, ending, well = sockets.add("silent"), sockets.add("ending"), sockets.add("well")
    for host in (silent, ending):
        host.frozen.set()

    def leaves_out(*hosts: SimulatedHost) -> Callable[[Observation], bool]:
        paths = {host.uri for host in hosts}
        return lambda item: isinstance(item, Surveyed) and item.unreached == paths

    with observed(sockets) as (source, seen):
        (survey,) = seen.wait(leaves_out(silent, ending))
        assert isinstance(survey, Surveyed)
        assert survey.domains == {guest_of(well).uuid}
        known = source.describe(guest_of(well).uuid)
        assert known is not None
        assert known.connection == well.uri
        sockets.end("ending")  # whether its guest ended is told now
        seen.wait(leaves_out(silent))
        silent.frozen.clear()
        (survey,) = seen.wait(leaves_out())
        assert isinstance(survey, Surveyed)
        assert survey.domains == {guest_of(well).uuid, guest_of(silent).uuid}


def test_questions_that_hang_on_some_connections_are_still_answered_on_the_others(
    sockets: Sockets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("virtbus.sources.many.QUIET_SECONDS", 0.05)
    monkeypatch.setattr("virtbus.sources.crew.PROVE_SECONDS", 0.05)
    hosts = [sockets.add(f"hangs{number}") for number in range(12)]
    for host in hosts:
        host.answers.clear()
    well = sockets.add("well")
    with observed(sockets) as (_, seen):
        seen.wait(Surveyed)
        seen.wait(lambda item: type(item).__name__ == "SourceSeen" and of(well.uri, type(item))(item), 3)


class Refusing(SimulatedHost):
    """A socket on which nobody listens while it is `down`."""

    attempts = 0

    def open(self, handler: Handler | None) -> SimulatedLink:
        """See Connector."""
        if self.down:
            self.attempts += 1
            raise NobodyListens("connection refused")
        return super().open(handler)


def test_a_daemon_that_takes_a_stale_sockets_place_and_hangs_is_not_surveyed(sockets: Sockets) -> None:
    """That nobody listened before says nothing of the guest that it has."""
    silent, stale = sockets.add("silent"), Refusing(1)
    silent.frozen.set()
    stale.down = True
    sockets.add("stale", stale)
    with observed(sockets) as (source, seen):
        wait_until(lambda: stale.attempts == 4)
        stale.frozen.set()
        stale.down = False
        bind(Path(stale.uri))
        marker = sockets.add("marker")  # found by a look, and so was the new socket
        seen.wait(of(marker.uri, SourceReady))
        source._survey_at = 0.0
        silent.frozen.clear()
        survey = seen.wait(lambda item: isinstance(item, Surveyed) and silent.uri not in item.unreached)[-1]
        assert isinstance(survey, Surveyed)
        assert survey.unreached == {stale.uri}


def test_stale_sockets_are_left_alone_until_a_daemon_makes_a_new_one(
    sockets: Sockets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("virtbus.sources.many.RESTART_SECONDS", 0.1)
    stale = []
    for number in range(300):
        host = Refusing()
        host.down = True
        stale.append(host)
        sockets.add(f"stale{number}", host)
    well = sockets.add("well")
    with observed(sockets) as (_, seen):
        seen.wait(of(well.uri, SourceReady))
        seen.wait(Surveyed)
        assert {host.attempts for host in stale} == {5}
        stale[7].down = False
        bind(Path(stale[7].uri))
        seen.wait(of(stale[7].uri, SourceReady))
        assert {host.attempts for host in stale} == {5}


def test_links_and_files_are_no_sockets(tmp_path: Path) -> None:
    real, linked, plain = (tmp_path / pod / NAME for pod in ("real", "linked", "plain"))
    for path in (real, linked, plain):
        path.parent.mkdir(parents=True)
    bind(real)
    linked.symlink_to(real)
    plain.write_text("")
    assert set(look([f"{tmp_path}/*/{NAME}"])) == {str(real)}
    with pytest.raises(SourceUnavailable, match=r"is not a socket|Too many levels"):
        SocketConnector(str(linked), "qemu+unix:///session?socket={socket}", OPTIONS).open(None)


def test_a_daemon_that_is_found_by_several_names_is_observed_once(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "run"
    folder.mkdir(parents=True)
    for name in ("virtqemud-sock", "virtqemud-sock-ro"):
        bind(folder / name)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert set(look([f"{tmp_path}/*/run/virtqemud-sock"])) == {f"{folder}/virtqemud-sock"}
    found = look([f"{tmp_path}/*/run/virtqemud-sock*", f"{folder}/virtqemud-sock-ro"])
    assert set(one_each(found)) == {f"{folder}/virtqemud-sock-ro"}


def test_folders_are_watched_where_a_socket_may_come_and_not_where_the_way_is_fixed(tmp_path: Path) -> None:
    pod = tmp_path / "pod"
    pod.mkdir()
    watched: list[str] = []
    look([f"{tmp_path}/*/{NAME}"], watched.append)
    assert watched == [str(tmp_path), str(pod)]  # libvirt-runtime may come
    (pod / "libvirt-runtime").mkdir()
    watched.clear()
    look([f"{tmp_path}/*/{NAME}"], watched.append)
    assert watched == [str(tmp_path), f"{pod}/libvirt-runtime"]


def test_a_folder_of_a_fixed_name_that_is_made_again_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "libvirt"
    changed = threading.Event()
    watch = Watch(changed.set)
    try:
        for _ in range(2):
            look([f"{folder}/virtqemud-sock"], watch.add)  # neither is there
            folder.mkdir(parents=True)
            assert changed.wait(10)
            look([f"{folder}/virtqemud-sock"], watch.add)
            changed.clear()
            bind(folder / "virtqemud-sock")
            assert changed.wait(10)
            look([f"{folder}/virtqemud-sock"], watch.add)
            changed.clear()
            shutil.rmtree(folder.parent)
            assert changed.wait(10)
            changed.clear()
    finally:
        watch.close()


def test_the_preset_is_where_kubelet_puts_the_sockets() -> None:
    assert KUBEVIRT.startswith("/var/lib/kubelet/pods/*/volumes/kubernetes.io~empty-dir/libvirt-runtime/")


def test_no_thread_a_guest(sockets: Sockets) -> None:
    for number in range(40):
        sockets.add(f"pod{number}")
    before = threading.active_count()
    with observed(sockets) as (_, seen):
        seen.wait(Surveyed)
        # The source's own, inotify's, and none beside once the crew and the look-ups have rested.
        wait_until(lambda: threading.active_count() <= before + 2, timeout=20.0)


class Denying(SimulatedHost):
    """A daemon that lets nobody in while `denies`."""

    denies = True

    def open(self, handler: Handler | None) -> SimulatedLink:
        """See Connector."""
        if self.denies:
            raise SourceDenied("permission denied")
        return super().open(handler)


@pytest.mark.parametrize("let_in", [True, False])
def test_a_daemon_whose_second_socket_comes_a_moment_later_is_observed_once(
    sockets: Sockets, let_in: bool
) -> None:
    host = sockets.add("pod", SimulatedHost(1) if let_in else Denying(1))
    bare, read_only = Path(host.uri), Path(f"{host.uri}-ro")
    second = SimulatedHost()
    second.uri, second.guests = str(read_only), host.guests
    sockets.hosts[second.uri] = second
    with observed(sockets, name=f"{NAME}*") as (_, seen):
        wait_until(lambda: host.uri in sockets.opened)
        if let_in:
            seen.wait(SourceReady)
        bind(read_only)
        once, left = (host, second) if let_in else (second, host)
        seen.wait(of(once.uri, SourceReady))
        for number in range(2):
            for path in (bare, read_only):  # and both again, when the daemon starts again
                path.unlink()
            once.cut()
            for path in (bare, read_only):
                bind(path)
                marker = sockets.add(f"marker{path.name}{number}")  # found by a look, and so was the other
                seen.wait(of(marker.uri, SourceReady))
        seen.wait(of(once.uri, SourceReady), 3)
        for each in (host, second):
            each.io_error(guest_of(each))
        assert len(seen.of(RawIoError)) == 1
        assert seen.of(DomainGone, SourceGone) == []
        assert not [item for item in seen.all if of(left.uri, SourceReady)(item)]


def test_sockets_that_let_nobody_in_are_left_out_of_the_survey(
    sockets: Sockets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("virtbus.sources.many.SURVEY_SECONDS", 0.0)
    host = Denying(1)
    sockets.add("pod", host)
    with observed(sockets) as (_, seen):
        (survey,) = seen.wait(Surveyed)
        assert isinstance(survey, Surveyed)
        assert survey.unreached == {host.uri}
        host.denies = False
        survey = seen.wait(Surveyed, 2)[1]
        assert isinstance(survey, Surveyed)
        assert (survey.unreached, survey.domains) == (frozenset(), {guest_of(host).uuid})


@contextmanager
def as_nobody() -> Iterator[None]:
    """With the rights of a user who owns nothing."""
    was = os.geteuid()
    if was == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(was)


@pytest.mark.parametrize("pattern", ["*/run/virtqemud-sock", "*/*/virtqemud-sock", "*/run/virtqemud-*"])
def test_a_folder_that_may_not_be_read_hides_no_other_and_is_named(pattern: str) -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        for pod in ("closed", "open"):
            (folder / pod / "run").mkdir(parents=True)
            bind(folder / pod / "run" / "virtqemud-sock")
        (folder / "closed").chmod(0o000)
        with as_nobody():
            found, closed = look([f"{folder}/{pattern}"]), unreadable([f"{folder}/{pattern}"])
        (folder / "closed").chmod(0o700)
    assert set(found) == {f"{folder}/open/run/virtqemud-sock"}
    assert closed == {f"{folder}/closed"}


def test_a_folder_that_may_not_be_read_is_left_out_of_the_survey_with_all_that_is_in_it(
    sockets: Sockets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("virtbus.sources.many.SURVEY_SECONDS", 0.0)
    monkeypatch.setattr("virtbus.sources.many.LOOK_SECONDS", 0.1)
    closed = {f"{sockets.folder}/pod"}
    monkeypatch.setattr("virtbus.sources.many.unreadable", lambda _patterns: frozenset(closed))
    with observed(sockets) as (_, seen):
        (survey,) = seen.wait(Surveyed)
        assert isinstance(survey, Surveyed)
        assert survey.unreached == closed
        host = SimulatedHost(1)
        host.frozen.set()
        sockets.add("pod", host)
        wait_until(lambda: host.uri in sockets.opened)
        closed.clear()  # it can be read now, and what is in it has not answered yet
        survey = seen.wait(Surveyed, 2)[1]
        assert isinstance(survey, Surveyed)
        assert survey.unreached == {host.uri}
        host.frozen.clear()
        survey = seen.wait(Surveyed, 3)[2]
        assert isinstance(survey, Surveyed)
        assert survey.unreached == frozenset()
