"""`make matrix`: the agent against four releases of libvirt and QEMU, with a table at the end.

Each Debian suite runs in a folder, made at its first use (chroot.py); one release also with its modular
daemon, virtqemud, as the system's and as a session's (modular.py). The agent and the consumer are the
installed commands, outside of it: they reach each libvirtd over its read-only socket. Every scenario ends
with the guest's end, so that the agent tells what is still pending; `told` is the sum of all counts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import need
from tests.lab import chroot, modular
from tests.lab.demo import wait_ready
from tests.lab.lab import PAUSED_IOERROR, Guest, Lab, missing, wait_until
from tests.ports import free_ports
from virtbus.sources import SourceOptions
from virtbus.sources.libvirt import LibvirtSource
from virtbus.sources.link import ACTION_REPORT

pytestmark = [pytest.mark.lab, pytest.mark.slow, pytest.mark.timeout(1200)]

COMMAND = [sys.executable, "-m", "virtbus"]
MODULAR = {"virtqemud": modular.VIRTQEMUD, "virtqemud, session": modular.SESSION_VIRTQEMUD}
LOSES_UNNAMED = ("bullseye", "bookworm", *MODULAR)
MERGES = ("trixie", "forky")
SCENARIOS = ("stop-eio", "stop-enospc", "unnamed", "storm")


@dataclass
class Told:
    """What the bus delivered about one scenario's guest."""

    injected: int
    callbacks: int  # heard by a bare listener beside the agent; a lower bound in a storm
    events: list[dict[str, Any]] = field(default_factory=list)

    @property
    def count(self) -> int:
        """The sum of all counts."""
        return sum(event["occurrences"]["count"] for event in self.events)

    def values(self, *path: str) -> set[Any]:
        """The different values at a place in the events."""
        found = set()
        for event in self.events:
            value: Any = event
            for step in path:
                value = value[step]
            found.add(value)
        return found


@dataclass
class Suite:
    """One release: its versions as the agent reported them, and each scenario's result."""

    name: str
    libvirt: str = ""
    qemu: str = ""
    told: dict[str, Told] = field(default_factory=dict)
    found: list[tuple[str, str, int, str | None]] = field(default_factory=list)  # after an absence


@contextmanager
def delivered(lab: Lab, folder: Path) -> Iterator[list[dict[str, Any]]]:
    """An agent and a consumer of this lab; the I/O-error events' data, as they arrive."""
    bus, port = f"embedded://{folder}/bus.db", free_ports(1)[0]
    events: list[dict[str, Any]] = []
    with (folder / "agent.log").open("wb") as log:
        agent = subprocess.Popen(
            [*COMMAND, "run", "--libvirt", lab.uri_ro, "--bus", bus, "--state-dir", f"{folder}/state",
             "--http-listen", f"127.0.0.1:{port}", "--control-socket", ""],
            stderr=log,
        )  # fmt: skip
    consumer = subprocess.Popen(
        [*COMMAND, "consume", "--bus", bus, "--group", "matrix"], stdout=subprocess.PIPE
    )

    def read() -> None:
        assert consumer.stdout is not None
        for line in consumer.stdout:
            event = json.loads(line)
            if event["type"] == "io.virtbus.domain.io_error.v1":
                events.append(event["data"])

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        wait_ready(agent, f"http://127.0.0.1:{port}", folder / "agent.log")
        yield events
    finally:
        for process in (agent, consumer):
            process.terminate()
            process.wait(30)
        reader.join(10)
        assert consumer.stdout is not None
        consumer.stdout.close()


def run_scenario(lab: Lab, name: str) -> tuple[Guest, int]:
    """One guest's failure and end; the guest, and how many callbacks a bare listener heard."""
    with lab.listen() as listener:
        if name == "storm":
            guest = lab.guest(name, bus="ide", policy="report").start()
            guest.fail()
            wait_until(lambda: guest.injected() > 3000, "a storm rages", 60)
            guest.heal()
        else:
            error = "ENOSPC" if name == "stop-enospc" else "EIO"
            guest = lab.guest(name, error=error, nbd_name="" if name == "unnamed" else "disk0").start()
            guest.fail()
            guest.wait_state(PAUSED_IOERROR)
        time.sleep(2.5)  # the grace time of the cross-check; the last merged event
        guest.destroy()
        heard = listener.heard()
    return guest, sum(each["event"] == "io_error_reason" for each in heard)


def found_after_absence(lab: Lab) -> list[tuple[str, str, int, str | None]]:
    """An error that is only reported (no pause), with nobody there; what a look finds afterwards."""
    guest = lab.guest("absent", bus="ide", policy="report", boot="tick").start()
    since_ns = time.time_ns()
    guest.fail()
    wait_until(lambda: guest.injected() > 0, "an error is reported", 20)
    guest.heal()
    time.sleep(1.5)
    ready = LibvirtSource(
        lab.uri_ro, options=SourceOptions(since_ns=since_ns, lookup_deadline_seconds=60.0)
    ).snapshot()
    guest.destroy()
    return [(b.origin.value, b.raw.alias, b.raw.action_code, b.message) for b in ready.findings]


_suites: dict[str, Suite] = {}


def lab_of(name: str) -> Lab:
    """The lab of a suite, or of a modular daemon."""
    if name in MODULAR:
        return Lab(root=modular.modular_root(), daemon=MODULAR[name])
    return Lab(root=chroot.suite_root(name))


@pytest.fixture(params=[*chroot.SUITES, *MODULAR])
def suite(request: pytest.FixtureRequest) -> Suite:
    """A suite after all of its scenarios; they run once."""
    need([*missing(inside=False), *chroot.missing()])
    name = str(request.param)
    if name not in _suites:
        made = Suite(name)
        with tempfile.TemporaryDirectory(prefix="virtbus-matrix-") as temporary:
            folder = Path(temporary)
            with lab_of(name) as lab, delivered(lab, folder) as events:
                guests = {}
                for scenario in SCENARIOS:
                    guest, callbacks = run_scenario(lab, scenario)
                    guests[guest.uuid] = scenario
                    made.told[scenario] = Told(guest.injected(), callbacks)
                time.sleep(2.0)
                made.found = found_after_absence(lab)
            for event in events:
                scenario = guests.get(event["domain"]["uuid"])
                if scenario is not None:
                    made.told[scenario].events.append(event)
                made.libvirt = event["host"]["hypervisor"]["libvirt_version"]
                made.qemu = event["host"]["hypervisor"]["version"]
        _suites[name] = made
    return _suites[name]


@pytest.fixture(scope="module", autouse=True)
def table(request: pytest.FixtureRequest) -> Iterator[None]:
    """Print what was found, after the last test."""
    yield
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or not _suites:
        return
    row = "{:18} {:8} {:8} {:12} {:>8} {:>9} {:>6} {:>6}  {:10} {:9} {}"
    lines = [row.format("suite", "libvirt", "qemu", "scenario", "injected", "callbacks", "told", "events",
                        "origin", "reason", "lower bound")]  # fmt: skip
    for found in _suites.values():
        for scenario, told in found.told.items():
            words = [
                ("+".join(sorted(told.values("origin")))),
                "+".join(repr(each) for each in sorted(told.values("error", "reason"))),
                "+".join(str(each) for each in told.values("occurrences", "lower_bound")),
            ]
            figures = (told.injected, told.callbacks, told.count, len(told.events))
            lines.append(row.format(found.name, found.libvirt, found.qemu, scenario, *figures, *words))
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture is not None else nullcontext():
        for line in ("", *lines):
            reporter.write_line(line)


@pytest.mark.parametrize(
    ("scenario", "old_reason", "new_reason"),
    [("stop-eio", "", "message"), ("stop-enospc", "enospc", "enospc")],
)
def test_a_pause_is_told_once_with_the_suites_own_reason(
    suite: Suite, scenario: str, old_reason: str, new_reason: str
) -> None:
    told = suite.told[scenario]
    assert (told.injected, told.callbacks, told.count) == (1, 1, 1)
    assert told.values("origin") == {"event"}
    assert told.values("error", "reason") == {old_reason if suite.name in LOSES_UNNAMED else new_reason}
    assert told.values("device", "alias") == {"virtio-disk0"}
    assert told.values("device", "target") == {"vda"}
    assert told.values("enriched") == {True}


def test_an_unnamed_disks_error_is_told_once_also_where_libvirt_loses_its_event(suite: Suite) -> None:
    told, lost = suite.told["unnamed"], suite.name in LOSES_UNNAMED
    assert (told.injected, told.callbacks, told.count) == (1, 0 if lost else 1, 1)
    assert told.values("origin") == {"lifecycle" if lost else "event"}
    assert told.values("device", "alias") == {"virtio-disk0"}


def test_a_storms_count_is_every_callback_and_says_when_it_is_a_lower_bound(suite: Suite) -> None:
    told, merges = suite.told["storm"], suite.name in MERGES
    # The bare listener can't keep up with a whole storm; with a merged one it can.
    assert told.count == (told.callbacks if merges else told.injected)
    assert (told.count < told.injected) is merges
    assert told.values("occurrences", "lower_bound") == {merges}
    assert told.values("device", "alias") == {"ide0-0-0"}


def test_an_error_reported_in_the_agents_absence_is_found_where_libvirt_remembers_it(suite: Suite) -> None:
    remembered = [("reconcile", "ide0-0-0", ACTION_REPORT, "Input/output error")]
    assert suite.found == (remembered if suite.name in MERGES else [])
