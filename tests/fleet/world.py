"""A small world that plays a scenario: hosts with agents, storage, faults; out come typed events.

A scenario is a TOML file (see `scenarios/README.md`). Everything is deterministic: no random numbers, and
all time is the scenario's own.
"""

from __future__ import annotations

import hashlib
import tomllib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from virtbus.fleet import Fleet, FleetRules, FleetView, StorageRules, VerdictRules
from virtbus.model import (
    Backlog,
    Device,
    DeviceSource,
    Domain,
    ErrorFacts,
    Event,
    Evidence,
    Gap,
    Heartbeat,
    Host,
    Incident,
    IoError,
    IoErrorResolved,
    Now,
    Occurrences,
    OpenIncident,
    OpenIncidents,
    Resolution,
    ResolvedOccurrences,
    SourceHealth,
    to_ns,
)
from virtbus.words import Action, Origin, Phase

SCENARIOS = Path(__file__).parent / "scenarios"
START = datetime(2026, 5, 4, 3, 0, 0, tzinfo=UTC)
INTERVAL = 60.0


def uuid_of(name: str) -> str:
    return str(uuid.UUID(bytes=hashlib.sha256(name.encode()).digest()[:16], version=4))


def epoch_of(number: int) -> str:
    """Epochs rise with the runs, as UUIDv7 do."""
    return f"019a05f9-{number:04d}-7000-8000-000000000000"


def names_of(words: list[str]) -> list[str]:
    """ "4-6" → compute-04, compute-05, compute-06."""
    out = []
    for word in words:
        first, _, last = word.partition("-")
        out += [f"compute-{number:02d}" for number in range(int(first), int(last or first) + 1)]
    return out


def source_of(storage: dict[str, Any], host: str, guest: str) -> DeviceSource | None:
    """How a device of this storage is described to libvirt."""
    kind = storage["kind"]
    volume = f"volume-{uuid_of(guest)}"
    hosts = tuple(storage.get("addresses", ()))
    if kind == "none":
        return None
    if kind == "rbd":
        return DeviceSource(
            "network", "rbd", f"{storage.get('pool', 'vms')}/{volume}", hosts=hosts, format="raw"
        )
    if kind == "iscsi":
        return DeviceSource("network", "iscsi", f"{storage['target']}/1", hosts=hosts, format="raw")
    if kind in ("nbd", "gluster", "nfs", "https"):
        return DeviceSource("network", kind, f"{storage.get('export', 'vol')}/{volume}", hosts=hosts)
    if kind in ("file", "block"):
        path = storage["path"].format(
            host=host, volume=volume, hex=hashlib.sha256(guest.encode()).hexdigest()[:16]
        )
        return DeviceSource(kind, path=path)
    if kind == "pool":
        return DeviceSource("volume", pool=storage["pool"], volume=volume)
    raise AssertionError(f"unknown kind of storage {kind}")


@dataclass
class OneIncident:
    id: str
    host: str
    guest: str
    alias: str
    source: DeviceSource | None
    action: Action
    reason: str
    opens: float
    ends: float | None
    every: float | None
    unconfirmed: bool
    flapping: bool
    origin: Origin
    total: int = 0
    is_open: bool = False

    def device(self) -> Device:
        return Device(self.alias, "vda", "virtio", "disk", None, self.source)


@dataclass
class Agent:
    name: str
    offset: float
    runs: int = 1
    boots: int = 1
    sequence: int = 0
    silent_until: float = -1.0
    blind_until: float = -1.0
    agent_id: str = ""
    skew: float = 0.0
    incidents: dict[str, OneIncident] = field(default_factory=dict)

    @property
    def host(self) -> Host:
        return Host(self.name, uuid_of(self.name), boot_id=uuid_of(f"{self.name}/boot/{self.boots}"))


Told = tuple[float, Event, dict[str, str]]


class World:
    """One scenario; `events()` are what the agents send, in the order of time."""

    def __init__(self, path: Path) -> None:
        self.name = path.stem
        self.spec = spec = tomllib.loads(path.read_text(encoding="utf-8"))
        self.story: str = spec["story"]
        self.seconds: float = spec.get("seconds", 600)
        self.storage: dict[str, dict[str, Any]] = spec.get("storage", {})
        count = spec.get("hosts", 20)
        self.agents = {
            name: Agent(name, offset=(index * 37) % INTERVAL, agent_id=uuid_of(f"agent {name}"))
            for index, name in enumerate(names_of([f"1-{count}"]))
        }
        for name, skew in spec.get("skew", {}).items():
            self.agents[names_of([name])[0]].skew = skew
        self.truth_hosts = set(names_of(spec["truth"].get("hosts", [])))
        self.truth_systems = set(spec["truth"].get("backends", []))
        self.expected = {
            name: blame for words, blame in spec.get("expect", {}).items() for name in names_of([words])
        }
        self.expected_backends: dict[str, str] = spec.get("expect_backends", {})

    def rules(self) -> FleetRules:
        told = self.spec.get("rules", {})
        racks = {name: rack for words, rack in told.get("racks", {}).items() for name in names_of([words])}
        storage = StorageRules(
            local_paths=tuple(told.get("local_paths", ())),
            groups={name: tuple(globs) for name, globs in told.get("groups", {}).items()},
        )
        return FleetRules(storage=storage, verdict=VerdictRules(racks=racks))

    def storage_of(self, system: str) -> str:
        """The scenario's name of a system that the fleet calls by its first address, share or target."""
        for name, storage in self.storage.items():
            for host in self.agents:
                source = source_of(storage, host, "any")
                words = [] if source is None else [*source.hosts, source.path or "", source.pool or ""]
                bare = system.partition(":")[2] if ":" in system else system
                if any(system in word or (bare and bare in word) for word in words):
                    return name
        return system

    # ---- the play

    def _incidents(self) -> list[OneIncident]:
        out = []
        for number, fault in enumerate(self.spec.get("fault", [])):
            hosts = names_of(fault["hosts"])
            storages = [fault["storage"]] if isinstance(fault["storage"], str) else fault["storage"]
            guests = fault.get("guests", 2)
            total = len(hosts) * guests
            for index, host in enumerate(hosts):
                for one in range(guests):
                    spread = fault.get("spread", 5.0) * (one * len(hosts) + index) / max(1, total - 1)
                    lag = fault.get("step", 0.0) * index
                    at = fault["at"] + spread + lag
                    storage = storages[one % len(storages)]
                    guest = fault.get("guest") or f"{host}/guest-{fault.get('first', 0) + one}"
                    lasts = fault.get("lasts")
                    out.append(
                        OneIncident(
                            id=uuid_of(f"{number}/{host}/{one}/{storage}"),
                            host=host,
                            guest=uuid_of(guest),
                            alias=f"virtio-disk{fault.get('disk', 0)}",
                            source=source_of(self.storage[storage], host, f"{guest}/{fault.get('disk', 0)}"),
                            action=Action(fault.get("action", "pause")),
                            reason=fault.get("reason", "message"),
                            opens=at,
                            ends=None if lasts is None else at + lasts,
                            every=fault.get("every"),
                            unconfirmed=fault.get("unconfirmed", False),
                            flapping=fault.get("flapping", False),
                            origin=Origin(fault.get("origin", "event")),
                        )
                    )
        return out

    def events(self) -> Iterator[Told]:
        """(when it arrives, event, attributes) in the order of arrival."""
        plan: list[tuple[float, int, str, Any]] = []
        for incident in self._incidents():
            plan.append((incident.opens, 1, "open", incident))
            end = min(incident.ends if incident.ends is not None else self.seconds, self.seconds)
            if incident.every:
                at = incident.opens + incident.every
                while at < end:
                    plan.append((at, 2, "again", incident))
                    at += incident.every
            if incident.ends is not None:
                plan.append((incident.ends, 3, "resolve", incident))
        for entry in self.spec.get("reboot", []):
            for index, name in enumerate(names_of(entry["hosts"])):
                at = entry["at"] + entry.get("step", 0.0) * index
                plan.append((at, 0, "down", (self.agents[name], at + entry.get("down", 120))))
                plan.append((at + entry.get("down", 120), 0, "boot", self.agents[name]))
        for what in ("silence", "blind"):
            for entry in self.spec.get(what, []):
                for name in names_of(entry["hosts"]):
                    plan.append(
                        (entry["at"], 0, what, (self.agents[name], entry["at"] + entry.get("lasts", 1e9)))
                    )
        for agent in self.agents.values():
            at = agent.offset
            while at < self.seconds:
                plan.append((at, 4, "heartbeat", agent))
                at += INTERVAL
        plan.sort(key=lambda item: (item[0], item[1]))
        for at, _, what, subject in plan:
            if at <= self.seconds:
                yield from self._play(at, what, subject)

    def _play(self, at: float, what: str, subject: Any) -> Iterator[Told]:
        if what in ("silence", "down"):
            agent, until = subject
            agent.silent_until = until
            if what == "down":
                agent.incidents.clear()
            return
        if what == "blind":
            agent, agent.blind_until = subject
            return
        if what == "boot":
            agent = subject
            agent.runs, agent.boots, agent.sequence = agent.runs + 1, agent.boots + 1, 0
            moment = self._moment(at, agent)
            yield self._tell(at, agent, Gap(agent.host, agent.agent_id, "agent_down", None, None, moment))
            return
        agent = subject if what == "heartbeat" else self.agents[subject.host]
        if at < agent.silent_until:
            if what == "open":  # it is found when the agent is back, or with the next heartbeat
                subject.is_open = True
                subject.total = 1
                agent.incidents[subject.id] = subject
            elif what == "resolve":
                agent.incidents.pop(subject.id, None)
            return
        moment = self._moment(at, agent)
        if what == "heartbeat":
            yield self._heartbeat(at, agent, moment)
        elif what == "resolve":
            agent.incidents.pop(subject.id, None)
            yield self._tell(at, agent, self._resolved(subject, agent, moment))
        else:
            subject.total += 1
            agent.incidents[subject.id] = subject
            phase = Phase.OPENED if what == "open" else Phase.UPDATED
            yield self._tell(at, agent, self._error(subject, agent, moment, phase))

    def _moment(self, at: float, agent: Agent) -> datetime:
        return START + timedelta(seconds=at + agent.skew)

    def _tell(self, at: float, agent: Agent, event: Event) -> Told:
        agent.sequence += 1
        attributes = {
            "source": f"/virtbus/agents/{agent.agent_id}",
            "epoch": epoch_of(agent.runs),
            "sequence": f"{agent.sequence:012d}",
        }
        return at, event, attributes

    def _incident(self, one: OneIncident, agent: Agent, phase: Phase) -> Incident:
        return Incident(one.id, phase, self._moment(one.opens, agent), 1, one.flapping)

    def _error(self, one: OneIncident, agent: Agent, moment: datetime, phase: Phase) -> IoError:
        state = "paused" if one.action is Action.PAUSE else "running"
        evidence = (Evidence("file_system", "inconclusive" if one.unconfirmed else "confirms"),)
        error = ErrorFacts(one.action, None, one.reason, "", None, None, moment, evidence)
        return IoError(
            host=agent.host,
            domain=Domain(one.guest, f"guest-{one.guest[:8]}", 1, state),
            device=one.device(),
            error=error,
            occurrences=Occurrences(1, one.total, moment, moment),
            incident=self._incident(one, agent, phase),
            origin=one.origin,
            enriched=True,
        )

    def _resolved(self, one: OneIncident, agent: Agent, moment: datetime) -> IoErrorResolved:
        opened = self._moment(one.opens, agent)
        return IoErrorResolved(
            host=agent.host,
            domain=Domain(one.guest, f"guest-{one.guest[:8]}", 1, "running"),
            device=one.device(),
            occurrences=ResolvedOccurrences(one.total, opened, moment),
            incident=self._incident(one, agent, Phase.RESOLVED),
            resolution=Resolution("resumed", moment, (moment - opened).total_seconds()),
        )

    def _heartbeat(self, at: float, agent: Agent, moment: datetime) -> Told:
        items = tuple(
            OpenIncident(one.id, one.guest, one.guest[:8], one.device(), one.action, one.reason,
                         self._moment(one.opens, agent), moment, max(1, one.total), 1,
                         one.action is Action.PAUSE, one.flapping, drill=one.origin is Origin.REPLAY)
            for one in agent.incidents.values()
        )  # fmt: skip
        beat = Heartbeat(
            agent.host, agent.agent_id, "0.1.0", epoch_of(agent.runs), START, moment, INTERVAL,
            SourceHealth("disconnected" if at < agent.blind_until else "connected", START),
            Backlog(0, 0, None), agent.sequence, agent.sequence, OpenIncidents(len(items), items[:100]),
        )  # fmt: skip
        attributes = {"source": f"/virtbus/agents/{agent.agent_id}", "epoch": epoch_of(agent.runs)}
        return at, beat, attributes


def at(seconds: float) -> Now:
    """The scenario's clocks."""
    return Now(to_ns(START) + int(seconds * 1e9), 1000.0 + seconds)


def play(world: World, *, every: float = 10.0, from_: float = 0.0) -> Iterator[tuple[float, FleetView]]:
    """The fleet's view each `every` seconds, for a fleet that listens from `from_` on; last at the end."""
    fleet = Fleet(world.rules())
    due = from_ + every
    for moment, event, attributes in world.events():
        while moment > due:
            yield due, fleet.view(at(due))
            due += every
        if moment >= from_:
            fleet.saw(event, attributes, at(moment))
    yield world.seconds, fleet.view(at(world.seconds))
