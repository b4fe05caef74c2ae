"""One host's agent as a fleet hears it: heartbeats, errors, resolutions, restarts, by a clock of its own."""

from __future__ import annotations

import dataclasses
from datetime import datetime, timedelta
from typing import Any

from virtbus.fleet import Fleet, FleetView
from virtbus.model import (
    Backlog,
    DeviceSource,
    Event,
    Heartbeat,
    Incident,
    Now,
    OpenIncident,
    OpenIncidents,
    PreviousRun,
    SourceHealth,
    to_ns,
)
from virtbus.testing import MOMENT, a_device, a_domain, a_gap, a_host, a_resolved, an_io_error
from virtbus.words import Action, Phase, SourceState

CEPH = DeviceSource(type="network", protocol="rbd", path="vms/x", hosts=("10.61.0.7:6789",))
FILER = DeviceSource(type="network", protocol="nfs", path="/x", hosts=("172.16.0.9:2049",))


def at_second(at: float) -> Now:
    """Our clocks, `at` seconds into the play."""
    return Now(to_ns(MOMENT) + int(at * 1e9), 5000.0 + at)


def epoch_at(hours: float) -> str:
    """An epoch that is greater the later the host's clock was."""
    return f"019a05f9-{int(hours * 60):04d}-7000-8000-000000000000"


def uuid_of(number: int, kind: int = 0) -> str:
    return f"{number:08d}-{kind:04d}-4000-8000-000000000000"


class Machine:
    """One host's agent as the fleet hears it."""

    def __init__(self, fleet: Fleet, number: int, *, name: str | None = None, skew: float = 0.0) -> None:
        self.fleet, self.number, self.skew = fleet, number, skew
        self.host = a_host(name=name or f"compute-{number}", uuid=uuid_of(number, 1))
        self.agent = uuid_of(number)
        self.epoch, self.sequence = epoch_at(1), 0
        self.open: dict[str, OpenIncident] = {}
        self.interval = 60.0
        self.queued_until: float | None = None  # what is said waits in the broker until then
        self.said: list[tuple[Event, dict[str, str]]] = []

    def say(self, event: Event, at: float, *, numbered: bool = True, epoch: str | None = None) -> None:
        attributes = {
            "source": f"/virtbus/agents/{self.agent}",
            "id": f"{len(self.said):08x}-0000-7000-8000-000000000000",  # as UUIDv7s grow
            "epoch": epoch or self.epoch,
        }
        self.said.append((event, attributes))
        if numbered:
            self.sequence += 1
            attributes["sequence"] = f"{self.sequence:012d}"
        came = at if self.queued_until is None else max(at, self.queued_until)
        self.fleet.saw(event, attributes, at_second(came))

    def is_heard_again(self, at: float, *numbers: int) -> None:
        """The broker delivers some of what was said once more."""
        for number in numbers:
            self.fleet.saw(*self.said[number], at_second(at))

    def clock(self, at: float) -> datetime:
        return MOMENT + timedelta(seconds=at + self.skew)

    def beat(self, at: float, **more: Any) -> None:
        event = Heartbeat(
            host=self.host,
            agent_id=self.agent,
            agent_version="1.0.0",
            epoch=self.epoch,
            started_at=MOMENT,
            sent_at=self.clock(at),
            interval_seconds=self.interval,
            source=SourceHealth(SourceState.CONNECTED, MOMENT),
            backlog=Backlog(0, 0, None),
            committed_sequence=self.sequence,
            confirmed_sequence=self.sequence,
            incidents=OpenIncidents(len(self.open), tuple(self.open.values())),
        )
        self.say(dataclasses.replace(event, **more) if more else event, at, numbered=False)

    def fails(self, at: float, guest: int, source: DeviceSource = CEPH) -> None:
        moment, id_ = self.clock(at), f"{self.agent}/{guest}"
        device = a_device(source=source)
        domain = uuid_of(self.number, 100 + guest)
        self.open[id_] = OpenIncident(
            id_, domain, "g", device, Action.PAUSE, "eio", moment, moment, 1, 1, True, False
        )
        error = dataclasses.replace(an_io_error().error, reason="eio", disk_error=None, occurred_at=moment)
        event = an_io_error(
            host=self.host,
            device=device,
            error=error,
            domain=a_domain(uuid=domain, state="paused"),
            incident=Incident(id_, Phase.OPENED, moment, 1),
        )
        self.say(event, at)

    def recovers(self, at: float) -> None:
        """All its guests run again."""
        for id_, one in list(self.open.items()):
            del self.open[id_]
            resolved = a_resolved(host=self.host, device=one.device, domain=a_domain(uuid=one.domain_uuid))
            incident = Incident(id_, Phase.RESOLVED, one.opened_at, 1)
            self.say(dataclasses.replace(resolved, incident=incident), at)

    def restarts(self, at: float, epoch: str, *, heard: bool = True) -> None:
        previous, self.epoch, self.sequence = PreviousRun(self.epoch, self.sequence), epoch, 0
        if heard:
            self.say(a_gap(host=self.host, agent_id=self.agent, previous=previous), at)


def view(fleet: Fleet, at: float) -> FleetView:
    """What the fleet says then."""
    return fleet.view(at_second(at))
