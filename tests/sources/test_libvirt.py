"""The libvirt adapter without a hypervisor: libvirt's own test driver, and what its errors become."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import libvirt
import pytest

from tests.sources.simulated import Seen
from tests.waiting import wait_until
from virtbus.errors import ConfigError, SourceUnavailable
from virtbus.model import Hypervisor
from virtbus.observations import SourceReady
from virtbus.sources import SourceOptions
from virtbus.sources.libvirt import LibvirtConnector, LibvirtLink, LibvirtSource
from virtbus.sources.link import HostFacts
from virtbus.sources.probing import checks_of
from virtbus.sources.sockets import is_local


def test_the_test_driver_is_seen_with_its_one_domain() -> None:
    ready = LibvirtSource("test:///default").snapshot()
    assert [domain.name for domain in ready.domains] == ["test"]
    assert ready.host.hypervisor.kind == "TEST"


def test_a_uri_that_no_driver_takes_is_an_error_of_the_configuration() -> None:
    with pytest.raises(ConfigError, match=r"libvirt\.uri qemu\+nonsense"):
        LibvirtSource("qemu+nonsense://host/system").run(Seen(), threading.Event())


def test_a_daemon_that_is_not_there_is_unavailable_and_named(tmp_path: Path) -> None:
    uri = f"qemu:///system?socket={tmp_path}/none"
    with pytest.raises(SourceUnavailable, match="none"):
        LibvirtSource(uri).snapshot()


def test_libvirts_errors_do_not_reach_standard_error(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SourceUnavailable):
        LibvirtSource(f"qemu:///system?socket={tmp_path}/none").snapshot()
    assert "libvirt:" not in capfd.readouterr().err


def test_a_callback_that_could_not_be_decoded_is_noticed() -> None:
    class Deaf(Seen):
        def undecodable(self) -> None:
            told.set()

        def closed(self, why: str, silent_seconds: float) -> None:
            pass

    told, deaf = threading.Event(), Deaf()
    link = LibvirtConnector("test:///default", SourceOptions()).open(deaf)  # type: ignore[arg-type]

    def undecodable(timer: int, _opaque: object) -> None:
        libvirt.virEventRemoveTimeout(timer)
        b"\xff".decode()  # as libvirt-python does with a path that is not UTF-8

    libvirt.virEventAddTimeout(0, undecodable, None)
    assert told.wait(5)
    link.close()


class Daemon:
    """A connection that remembers who registered and left, and brings an event to some registrations."""

    def __init__(self, brings: int | None) -> None:
        self.brings, self.story, self.rounds = brings, [], 0
        self.numbers = itertools.count()

    def domainEventRegisterAny(self, _domain, event, callback, _opaque):
        number = next(self.numbers)
        if event == libvirt.VIR_DOMAIN_EVENT_ID_LIFECYCLE:
            self.rounds += 1
        self.story.append(number)
        if event == libvirt.VIR_DOMAIN_EVENT_ID_METADATA_CHANGE and self.rounds == self.brings:
            callback(None, mock.Mock())
        return number

    def domainEventDeregisterAny(self, number):
        self.story.remove(number)

    def isAlive(self):
        return 1


@pytest.mark.parametrize(("brings", "rounds"), [(None, 3), (1, 1), (2, 2), (3, 3)])
def test_a_queue_that_may_be_stuck_is_left_until_something_is_heard(brings, rounds, monkeypatch) -> None:
    """libvirt delivers nothing more when its last listener left in a storm, until all have left again."""
    monkeypatch.setattr("virtbus.sources.libvirt._HEARD_SECONDS", 0.001)
    daemon, registered = Daemon(brings), []
    connector = LibvirtConnector("qemu:///system", SourceOptions())
    connector._listen(daemon, mock.Mock(), registered, may_be_stuck=True)
    assert daemon.rounds == rounds
    assert daemon.story == registered, "what is registered is what close() drops"
    assert len(registered) == 8


@pytest.mark.parametrize(
    ("uri", "local"),
    [
        ("qemu:///system", True),
        ("qemu:///system?socket=/run/x", True),
        ("qemu+unix:///system", True),
        ("test:///default", True),
        ("qemu+tcp://127.0.0.1/system", False),
        ("qemu+tls://host/system", False),
        ("qemu+ssh://user@host/system", False),
    ],
)
def test_a_uri_tells_whether_paths_are_ours(uri: str, local: bool) -> None:
    assert is_local(uri) is local


FACTS = HostFacts("h", Hypervisor("QEMU", None, "11.3.0"), keeps_messages=False, local=True)


def test_a_probe_warns_of_events_that_the_daemon_lacks_and_of_merged_counts() -> None:
    events = {"LIFECYCLE": None, "IO_ERROR_REASON": None, "METADATA_CHANGE": "unknown event"}
    checks = {check.name: check for check in checks_of("u", FACTS, "10.0.0", 0, events)}
    assert checks["libvirt events"].status == "warning"
    assert "METADATA_CHANGE" in checks["libvirt events"].summary
    assert checks["error counts"].status == "warning"


def test_a_probe_fails_without_lifecycle_events() -> None:
    checks = {
        check.name: check for check in checks_of("u", FACTS, "7.2.22", 0, {"LIFECYCLE": "unknown event"})
    }
    assert (checks["libvirt events"].status, checks["libvirt events"].exit_code) == ("failed", 69)


def test_a_connection_that_lacks_a_needed_event_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The source tries again every 2 s: a daemon has room for so many clients."""
    closed = threading.Event()
    daemon = mock.Mock(close=closed.set)
    daemon.domainEventRegisterAny.side_effect = libvirt.libvirtError("unknown event")
    monkeypatch.setattr(libvirt, "openReadOnly", lambda uri: daemon)
    with pytest.raises(SourceUnavailable, match="none of the events LIFECYCLE"):
        LibvirtConnector("qemu:///system", SourceOptions()).open(mock.Mock())
    assert closed.wait(10)


def test_an_event_that_the_daemon_lacks_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("virtbus.sources.libvirt._HEARD_SECONDS", 0.001)
    told: list[object] = []
    monkeypatch.setattr("virtbus.sources.libvirt.emit", told.append)
    daemon = Daemon(None)
    register = daemon.domainEventRegisterAny

    def refusing(domain, event, callback, opaque):
        if event == libvirt.VIR_DOMAIN_EVENT_ID_METADATA_CHANGE:
            raise libvirt.libvirtError("unknown event")
        return register(domain, event, callback, opaque)

    daemon.domainEventRegisterAny = refusing
    connector = LibvirtConnector("qemu:///system", SourceOptions())
    connector._listen(daemon, mock.Mock(), [], may_be_stuck=True)
    assert daemon.rounds == 3
    assert len(told) == 1


@pytest.mark.parametrize(("in_company", "rounds"), [(True, 1), (False, 3)])
def test_a_daemon_to_which_somebody_else_always_listens_is_not_left(in_company, rounds, monkeypatch) -> None:
    monkeypatch.setattr("virtbus.sources.libvirt._HEARD_SECONDS", 0.001)
    daemon = Daemon(None)
    daemon.setKeepAlive = daemon.registerCloseCallback = mock.Mock()
    monkeypatch.setattr(libvirt, "openReadOnly", lambda uri: daemon)
    LibvirtConnector("qemu:///system", SourceOptions(), in_company=in_company).open(mock.Mock())
    assert daemon.rounds == rounds


def test_observation_ends_when_it_is_told_to() -> None:
    seen, stop = Seen(), threading.Event()
    thread = threading.Thread(target=LibvirtSource("test:///default").run, args=(seen, stop))
    thread.start()
    seen.wait(SourceReady)
    stop.set()
    thread.join(5)
    assert not thread.is_alive()


class Asked:
    """A connection of libvirt-python that notes what it is asked."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., object]:
        answers = {"getType": "QEMU", "getLibVersion": 9_000_000, "getVersion": 7_002_022, "getHostname": "h"}

        def call(*_: object) -> object:
            self.calls.append(name)
            return answers.get(name, [])

        return call


def test_nothing_that_connecting_asks_makes_a_daemon_probe_its_qemu() -> None:
    """Measured on virtqemud 9.0: these take 0.4 s of a core and more, at their first time; all else 1 ms."""
    connection = Asked()
    link = LibvirtLink(connection, "qemu:///system")
    found = link.facts()
    link.domains()
    assert not {"getVersion", "getCapabilities", "getDomainCapabilities"} & set(connection.calls)
    assert (found.hypervisor, found.keeps_messages) == (Hypervisor("QEMU", None, "9.0.0"), False)
    assert link.version() == "7.2.22"


@pytest.mark.parametrize(
    ("hypervisor", "merges"),
    [
        (Hypervisor("QEMU", "9.1.4"), False),
        (Hypervisor("QEMU", "9.2.0"), True),
        (Hypervisor("QEMU", "10.0.0"), True),
        (Hypervisor("QEMU", None), None),
        (Hypervisor(), None),
        (Hypervisor("Xen", "4.17.0"), False),
        (Hypervisor("QEMU", "devel"), None),  # of a recording
    ],
)
def test_from_its_version_on_qemu_merges_errors(hypervisor: Hypervisor, merges: bool | None) -> None:
    assert hypervisor.merges is merges


def test_a_connection_ends_after_the_call_that_is_under_way() -> None:
    """virConnectClose frees what a call still uses."""
    answer, order = threading.Event(), []

    def version() -> int:
        answer.wait(10)
        order.append("answered")
        return 9_000_000

    connection = mock.Mock()
    connection.getLibVersion = version
    connection.close = lambda: order.append("closed")
    link = LibvirtLink(connection, "qemu:///system")
    call = threading.Thread(target=link.facts)
    call.start()
    wait_until(lambda: connection.getHostname.called)
    link.close()
    (closing,) = (each for each in threading.enumerate() if each.name == "virtbus-close")
    closing.join(0.2)
    answer.set()
    call.join(10)
    closing.join(10)
    assert order == ["answered", "closed"]
