"""A canary in every field that a hypervisor can put a secret into is found nowhere that others can read."""

from __future__ import annotations

import io
import json
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from prometheus_client import generate_latest

from tests.sources.simulated import Guest, SimulatedHost, SimulatedLink
from tests.waiting import wait_until
from virtbus import envelope, telemetry
from virtbus.agent.agent import Agent, AgentOptions
from virtbus.agent.incidents import IncidentLimits, Incidents
from virtbus.commands import watch
from virtbus.envelope.encoding import plain
from virtbus.errors import SourceUnavailable
from virtbus.observations import RawIoError
from virtbus.sources import SourceOptions
from virtbus.sources.link import ACTION_REPORT, STARTED, SUSPENDED, SUSPENDED_IOERROR
from virtbus.sources.observer import Observer
from virtbus.spool import Spool, SpoolLimits
from virtbus.testing import FakeBus, no_waiting

# Where a secret stands in the name of an image, as QEMU, libvirt and operators write it.
NAMES = (
    "https://user:{}@host/p.iso",
    "https://{}@host/p.iso",
    "https://host/p.iso?X-Amz-Signature={}&part=1",
    "https://host/p.iso?{}",
    "iso/a.iso?token={}",
    "/export/a.iso?sig={}",
    "rbd:vms/db1:id=admin:key={}:mon_host=h",
    "vms/db1:id=admin:key={}",
    "vol/a,size=10,password={}",
    "user:{}@host/share",
    'json:{{"driver":"https","url":"https://u:{}@h/a","password":"{}"}}',
)
AGENT = "11111111-2222-4333-8444-555555555555"
CANARIES = st.text("aZ09+%~.-_!*$", min_size=4, max_size=24).map(lambda middle: f"kan4r1{middle}v0gel")


def image(name: str, kind: str = "network", below: str = "<backingStore/>") -> str:
    attribute = {"network": "protocol='https' name", "file": "file", "block": "dev"}[kind]
    return f"<source {attribute}={quoteattr(name)}/>{below}"


def domain(guest: Guest, canary: str) -> str:
    """Disks with the canary in every place: names, chains, hosts, logins, cookies, queries, metadata."""
    disks = []
    for number, form in enumerate(NAMES):
        name = form.format(canary, canary)
        chain = "".join(
            f"<backingStore type='{kind}'><format type='raw'/><source {attribute}={quoteattr(name)}/>"
            for kind, attribute in (("network", "protocol='rbd' name"), ("file", "file"), ("block", "dev"))
            if kind == "network" or not name.startswith("/")
        )
        chain += "<backingStore/>" + "</backingStore>" * chain.count("<backingStore ")
        disks.append(
            f"<disk type='network' device='disk'><auth username={quoteattr(canary)}>"
            f"<secret type='ceph' uuid={quoteattr(canary)}/></auth>"
            f"<source protocol='https' name={quoteattr(name)} query={quoteattr('sig=' + canary)}>"
            f"<host name={quoteattr('user:' + canary + '@host')} port='443'/>"
            f"<cookies><cookie name='c'>{escape(canary)}</cookie></cookies>"
            f"<encryption format='luks'><secret type='passphrase' uuid={quoteattr(canary)}/></encryption>"
            "</source>"
            f"{chain}<target dev='vd{chr(97 + number)}'/><alias name='virtio-disk{number}'/></disk>"
        )
    owner = f"see https://user:{canary}@host/ or token={canary}"
    return (
        f"<domain id='{guest.number}'><name>{guest.name}</name><uuid>{guest.uuid}</uuid>"
        f"<description>{escape(canary)}</description><metadata>"
        f"<n:instance xmlns:n='http://openstack.org/xmlns/libvirt/nova/1.1'><n:name>{escape(owner)}</n:name>"
        f"<n:owner><n:project uuid='p'>{escape(owner)}</n:project></n:owner></n:instance></metadata>"
        f"<devices>{''.join(disks)}"
        f"<serial type='tcp'><source host={quoteattr('u:' + canary + '@h')} service='1'/>"
        f"<target port='0'/><alias name='serial0'/></serial></devices></domain>"
    )  # fmt: skip


class TellingLink(SimulatedLink):
    """A daemon whose errors repeat what it was given."""

    canary = ""

    def space(self, uuid: str, target: str) -> object:  # type: ignore[override]
        raise SourceUnavailable(f"domain {uuid}: can't open rbd:vms/db1:id=admin:key={self.canary}")

    def capabilities(self) -> str:
        raise SourceUnavailable(f"capabilities: https://user:{self.canary}@host/ is not there")


class TellingHost(SimulatedHost):
    """A host whose every word holds the canary."""

    def __init__(self, canary: str) -> None:
        super().__init__(keeps_messages=True)
        self.canary = canary
        guest = self.add(xml="<domain/>")
        guest.xml = domain(guest, canary)
        guest.messages = [
            f"I/O error: disk='vd{chr(97 + number)}', index='1', path='{form.format(canary, canary)}', "
            f"timestamp='2026-01-01 00:00:00.000+0000', message='{message}'"
            for number, form in enumerate(NAMES)
            for message in (f"Could not open '{form.format(canary, canary)}': Input/output error",)
        ]
        # Without a message of its own the whole line is told.
        guest.messages.append(f"I/O error: disk='vdb', path='rbd:vms/db1:id=admin:key={canary}'")
        self.guest = guest
        for number in range(len(NAMES)):
            guest.disk_errors[f"vd{chr(97 + number)}"] = 2

    def open(self, handler: object) -> SimulatedLink:  # type: ignore[override]
        if self.down:
            raise SourceUnavailable(f"qemu+tcp://user:{self.canary}@host/system: refused")
        link = TellingLink(self, handler)  # type: ignore[arg-type]
        link.canary = self.canary
        self.links.append(link)
        return link

    def fail(self) -> None:
        """An error of each disk, and the pause."""
        for handler in self.handlers():
            for number, form in enumerate(NAMES):
                path = form.format(self.canary, self.canary)
                alias = f"virtio-disk{number}"
                why = f"https://user:{self.canary}@host/"
                guest, now = self.guest, time.time_ns()
                handler.io_error(RawIoError(guest.uuid, guest.name, 1, path, alias, ACTION_REPORT, why, now))
        self.guest.state, self.guest.reason = 3, 5
        self.lifecycle(self.guest, SUSPENDED, SUSPENDED_IOERROR)


@contextmanager
def logged() -> Iterator[io.StringIO]:
    lines = io.StringIO()
    telemetry.configure(level="debug", fmt="json", stream=lines)
    try:
        yield lines
    finally:
        telemetry.configure()


def everything_told(canary: str) -> dict[str, str]:
    """Place → all that an agent of such a host lets others read."""
    host = TellingHost(canary)
    with (
        tempfile.TemporaryDirectory() as folder,
        logged() as lines,
        no_waiting(),
        closing(Spool.open(Path(folder), limits=SpoolLimits(), agent_id=AGENT)) as spool,
    ):
        bus = FakeBus()
        limits = IncidentLimits(first_window_seconds=0.05, max_window_seconds=0.05)
        ids = lambda: envelope.uuid7(time.time_ns())  # noqa: E731
        agent = Agent(
            source=Observer(host, options=SourceOptions(grace_seconds=0.1)),  # type: ignore[arg-type]
            bus=bus,
            spool=spool,
            incidents=Incidents(limits, new_id=ids),
            agent_id=AGENT,
            options=AgentOptions(heartbeat_seconds=0.05, drain_seconds=2.0),
        )
        agent.start()

        def told(kind: str) -> int:
            return sum(kind in record.attributes["type"] for record in list(bus.delivered))

        wait_until(lambda: told("gap") > 0, what="the first gap")
        host.fail()
        wait_until(lambda: told("io_error.v1") >= len(NAMES), what="the errors")
        wait_until(
            lambda: any(b"Input/output error" in record.body for record in list(bus.delivered)),
            what="the kept messages",
        )
        host.down = True
        host.cut()
        wait_until(lambda: "source is disconnected" in agent.not_ready(), what="the loss")
        status = json.dumps(plain(agent.status()), default=str)
        host.down = False
        wait_until(lambda: agent.not_ready() == [], what="the source again")
        agent.stop()
        agent.join()
        return {
            "wire": "\n".join(f"{record.attributes} {record.body.decode()}" for record in bus.delivered),
            "spool": "".join(path.read_text("latin-1") for path in Path(folder).iterdir()),
            "status": status,
            "log": lines.getvalue(),
            "metrics": generate_latest(telemetry.METRICS.registry).decode(),
        }


@settings(max_examples=8, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(CANARIES)
def test_no_secret_of_a_hypervisor_is_on_the_wire_in_the_log_the_status_or_the_metrics(canary: str) -> None:
    told = everything_told(canary)
    assert "virtio-disk0" in told["wire"]  # what is searched is what was told
    assert {place: around(text, canary) for place, text in told.items() if canary in text} == {}


@settings(max_examples=8, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(CANARIES, st.booleans())
def test_no_secret_of_a_hypervisor_is_in_a_recording(canary: str, as_json: bool) -> None:
    host, out = TellingHost(canary), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "LibvirtConnector", lambda uri, options: host)
        thread = threading.Thread(
            target=watch.run,
            args=("qemu:///system",),
            kwargs={"as_json": as_json, "out": out, "timeout": 0.5},
        )
        thread.start()
        wait_until(lambda: host.guest.name in out.getvalue(), what="the guest's line")
        host.fail()
        host.lifecycle(host.guest, STARTED)
        thread.join()
    assert out.getvalue().count("virtio-disk") >= len(NAMES)
    assert canary not in out.getvalue()


def around(text: str, canary: str) -> str:
    at = text.index(canary)
    return text[max(0, at - 120) : at + len(canary) + 20]
