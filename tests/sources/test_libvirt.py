"""The libvirt adapter without a hypervisor: libvirt's own test driver, and what its errors become."""

from __future__ import annotations

import threading
from pathlib import Path

import libvirt
import pytest

from tests.sources.simulated import Seen
from virtbus.errors import ConfigError, SourceUnavailable
from virtbus.observations import SourceReady
from virtbus.sources import SourceOptions
from virtbus.sources.libvirt import LibvirtConnector, LibvirtSource, checks_of, is_local
from virtbus.sources.link import HostFacts


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


def facts(throttles: bool = False) -> HostFacts:
    host = LibvirtSource("test:///default").snapshot().host
    return HostFacts("h", host.hypervisor, throttles=throttles, keeps_messages=False, local=True)


def test_a_probe_warns_of_events_that_the_daemon_lacks_and_of_merged_counts() -> None:
    events = {"LIFECYCLE": None, "IO_ERROR_REASON": None, "METADATA_CHANGE": "unknown event"}
    checks = {check.name: check for check in checks_of("u", facts(throttles=True), 0, events)}
    assert checks["libvirt events"].status == "warning"
    assert "METADATA_CHANGE" in checks["libvirt events"].summary
    assert checks["error counts"].status == "warning"


def test_a_probe_fails_without_lifecycle_events() -> None:
    checks = {check.name: check for check in checks_of("u", facts(), 0, {"LIFECYCLE": "unknown event"})}
    assert (checks["libvirt events"].status, checks["libvirt events"].exit_code) == ("failed", 69)


def test_observation_ends_when_it_is_told_to() -> None:
    seen, stop = Seen(), threading.Event()
    thread = threading.Thread(target=LibvirtSource("test:///default").run, args=(seen, stop))
    thread.start()
    seen.wait(SourceReady)
    stop.set()
    thread.join(5)
    assert not thread.is_alive()
