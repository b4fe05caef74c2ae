"""Folds events into what is known of each host: pure, bounded, the clock passed in."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from virtbus.fleet.agent import Agent, Ended, Incident, Pace, Rate, Version
from virtbus.fleet.storage import Backend, StorageRules, backend_of
from virtbus.fleet.verdict import Answer, Blame, Trouble, Verdict, VerdictRules, Verdicts, assess
from virtbus.model import (
    Device,
    Event,
    Evidence,
    Gap,
    Heartbeat,
    Host,
    IoError,
    IoErrorResolved,
    Now,
    OpenIncident,
    to_ns,
)
from virtbus.words import ENOSPC, Action, DiskError, EvidenceCheck, EvidenceVerdict, GuestState, Origin

_SEQUENCE = re.compile("[0-9]{1,18}")


@dataclass(frozen=True, slots=True)
class FleetRules:
    """How events are read; times in seconds."""

    storage: StorageRules = field(default_factory=StorageRules)
    verdict: VerdictRules = field(default_factory=VerdictRules)
    silent_intervals: float = 3.0  # heartbeats that may be missed
    round_seconds: float = 60.0  # a round of heartbeats, for an agent that did not tell its interval
    remember_seconds: float = 900.0  # how long an incident that ended is evidence
    after_boot_seconds: float = 1800.0  # how long a reboot is a likely cause
    rate_seconds: float = 300.0  # the time constant of rates
    forget_seconds: float = 86_400.0  # a host that was silent so long is no part of the fleet
    drills: bool = False  # count replayed errors as if they were live


@dataclass(frozen=True, slots=True)
class HostHealth:
    """One host as the fleet sees it now."""

    name: str
    agent_id: str
    state: str  # "observing", "blind" (cut off from its hypervisor) or "silent" (no heartbeats of its agent)
    heard_seconds: float  # since its last sign of life
    blame: Blame
    why: str
    full: bool  # all its trouble is for want of space
    since: float | None  # Unix seconds: when its oldest open incident began
    incidents: int  # open ones
    guests: int  # with open incidents
    paused: int  # of them, stopped by the hypervisor
    flapping: int  # incidents in a pause/resume loop
    errors_per_minute: float
    backends: tuple[str, ...]  # the storage systems it has trouble with
    fresh: bool  # a heartbeat told everything that is open: what is not here is not
    early: bool = False  # too early to tell: nothing is put down to anybody yet
    witnessed: bool = True  # what it is blamed for: see `Trouble`

    @property
    def answer(self) -> Answer:
        """Is it bad, is it well, or can't that be told: only the first is a reason to act, only the second
        to undo. Well is a host's own fresh word that nothing of it is in trouble. Of trouble that began
        before we listened it is not known who else had it then: the last guests to be resumed after an
        outage look like their host's fault.
        """
        if self.state != "observing" or self.early:
            return Answer.CANT_TELL
        if self.blame is Blame.HOST:
            return Answer.BAD if self.witnessed else Answer.CANT_TELL
        return Answer.WELL if self.fresh and not self.incidents else Answer.CANT_TELL


@dataclass(frozen=True, slots=True)
class BackendHealth:
    """One storage system in trouble."""

    name: str
    kind: str
    blame: Blame  # BACKEND or UNDETERMINED
    why: str
    full: bool
    since: float  # Unix seconds
    hosts: tuple[str, ...]
    guests: int
    incidents: int
    errors_per_minute: float
    parts: tuple[str, ...]  # pools, exports, folders in trouble


@dataclass(frozen=True, slots=True)
class FleetView:
    """The whole fleet at one moment; hosts and backends by name."""

    hosts: tuple[HostHealth, ...]
    backends: tuple[BackendHealth, ...]
    silent: int
    incidents: int
    errors_per_minute: float
    suspect_ourselves: bool  # most agents are silent at once: rather our own connection
    own: frozenset[str] = (
        frozenset()
    )  # open incidents of which it is witnessed that they are their hosts' own

    def host(self, name: str) -> HostHealth | None:
        """One host, by the name libvirt gives it."""
        return next((one for one in self.hosts if one.name == name), None)


# What looks at the space itself; the others repeat the errno that the hypervisor was given.
_SPACE_CHECKS = frozenset({EvidenceCheck.BLOCK_INFO, EvidenceCheck.FILE_SYSTEM})


def _has_near(moments: Sequence[float], moment: float, within: float) -> bool:
    """Whether one of the sorted `moments` is at most `within` away."""
    at = bisect_left(moments, moment - within)
    return at < len(moments) and moments[at] <= moment + within


def _space_was_short(evidence: Iterable[Evidence]) -> bool:
    return any(one.check in _SPACE_CHECKS and one.verdict == EvidenceVerdict.CONFIRMS for one in evidence)


_MAX_USERS = 50_000
_MAX_REPLACED = 10_000


class Fleet:
    """What all events so far say. `saw` each event in the order it comes, then ask `view`.

    - Order between an agent's events does not matter: each incident keeps the (epoch, sequence) of what
      was last heard of it, and a heartbeat says up to which sequence it speaks. Which run is the later one
      is told by the agent's own chain, never by a clock.
    - After a restart one round of heartbeats rebuilds it, because each carries what is open.
    - A sign of life is its arrival, by our monotonic clock. Which troubles began together is told by hosts'
      clocks as their heartbeats show them against ours.
    - Of several agents that claim one name the silent ones are the past (a machine that was replaced), and so
      is one whose host another agent began to speak for (it was installed anew).
    - Errors that a drill or a recording replayed are not counted, unless the rules say so.
    """

    def __init__(self, rules: FleetRules | None = None) -> None:
        """An empty fleet."""
        self.rules = rules or FleetRules()
        self.witnessed: AbstractSet[str] = (
            frozenset()
        )  # incidents that were their hosts' own before a restart
        self._agents: dict[str, Agent] = {}
        self._users: dict[str, set[str]] = defaultdict(set)
        self._backend_rates: dict[str, Rate] = {}
        self._backend_of: dict[Backend, Backend] = {}
        self._since: float | None = None  # monotonic: when we began to listen
        self._since_wall = 0.0  # the same in Unix seconds
        self._replaced: dict[str, str] = {}  # agents of the past → who speaks for their host now

    def __len__(self) -> int:
        return len(self._agents)

    def saw(self, event: Event, attributes: Mapping[str, str], now: Now) -> str | None:
        """Fold one event in; the name of the host it speaks of, or None when it names none.

        `attributes` are its CloudEvents attributes: `source`, `epoch` and `sequence` are read.
        """
        id_ = attributes["source"].rpartition("/")[2]
        returned = id_ in self._replaced
        if returned and not isinstance(event, Heartbeat):
            return None  # what an agent of the past still had in its spool
        agent = self._agents.get(id_)
        if agent is None:
            agent = self._agents[id_] = Agent(id_)
        agent.heard = now.monotonic
        if self._since is None:
            self._since, self._since_wall = now.monotonic, now.wall_ns / 1e9
        epoch = attributes.get("epoch", "")
        agent.runs.meets(epoch)
        if isinstance(event, Gap) and event.previous is not None:
            agent.runs.follows(epoch, event.previous.epoch)
        if event.host is not None:
            self._met(agent, event.host, now)
        if agent.name is None:
            return None
        sequence = attributes.get("sequence")
        number = int(sequence) if sequence is not None and _SEQUENCE.fullmatch(sequence) else 0
        version = (epoch, number)
        if isinstance(event, IoError):
            self._error(agent, event, version, now)
        elif isinstance(event, IoErrorResolved):
            self._resolved(agent, event, version, now)
        elif isinstance(event, Heartbeat):
            self._heartbeat(agent, event, now)
            if returned:
                del self._replaced[id_]  # it lives after all: two claims, until one of them falls silent
            else:
                self._replace_older(agent)
        return agent.name

    # ---- folding

    def _met(self, agent: Agent, host: Host, now: Now) -> None:
        before = agent.host.boot_id if agent.host is not None else None
        if before is not None and host.boot_id not in (None, before):
            agent.booted = now.wall_ns / 1e9
        if agent.name != host.name:  # under another name it begins to beat anew
            agent.name, agent.beat_at = host.name, None
        agent.host = host

    def _replace_older(self, agent: Agent) -> None:
        """A host that was installed anew has a new agent: the one before it is the past."""
        host = agent.host
        if host is None or agent.beat_at != agent.began_to_beat:
            return  # only the first heartbeat makes others the past
        for other in [one for one in self._agents.values() if one.name == agent.name and one is not agent]:
            same = other.host is None or None in (other.host.uuid, host.uuid) or other.host.uuid == host.uuid
            if same:
                self._drop(other, agent)

    def _drop(self, agent: Agent, successor: Agent) -> None:
        del self._agents[agent.id]
        self._replaced[agent.id] = successor.id
        while len(self._replaced) > _MAX_REPLACED:
            del self._replaced[next(iter(self._replaced))]

    def _error(self, agent: Agent, event: IoError, version: Version, now: Now) -> None:
        assert agent.name is not None
        id_ = event.incident.id
        if event.origin is Origin.REPLAY and not self.rules.drills:
            agent.end(id_, Ended(None, now.monotonic, None))
            return
        agent.rate.add(event.occurrences.count, now.monotonic, self.rules.rate_seconds)
        backend = self._backend(agent.name, event.device)
        self._rate_of(backend).add(event.occurrences.count, now.monotonic, self.rules.rate_seconds)
        known = agent.incidents.get(id_)
        if (known is not None and agent.not_later(version, known.version)) or agent.ended_after(id_, version):
            return
        if known is None and agent.complete and agent.not_later(version, agent.heartbeat):
            return  # a heartbeat that already speaks for this error does not list it: it is over
        full = event.error.reason == ENOSPC or event.error.disk_error == DiskError.NO_SPACE
        opened = to_ns(event.incident.opened_at) / 1e9
        onset, settled = agent.onset(opened, known, now)
        agent.keep(
            id_,
            Incident(
                domain=event.domain.uuid,
                backend=backend,
                opened=opened,
                onset=onset,
                action=event.error.action,
                paused=event.domain.state == GuestState.PAUSED or event.error.action is Action.PAUSE,
                flapping=event.incident.flapping,
                full=full,
                unconfirmed=full and not _space_was_short(event.error.evidence),
                after_boot=self._after_boot(agent, onset),
                version=version,
                total=event.occurrences.total,
                settled=settled,
                recurs=id_ in self.witnessed or (known is not None and known.grows(event.occurrences.total)),
            ),
        )

    def _resolved(self, agent: Agent, event: IoErrorResolved, version: Version, now: Now) -> None:
        assert agent.name is not None
        id_ = event.incident.id
        known = agent.incidents.pop(id_, None)
        if known is None and id_ in agent.ended:
            known = agent.ended[id_].incident
        agent.end(id_, Ended(known, now.monotonic, version))

    def _heartbeat(self, agent: Agent, event: Heartbeat, now: Now) -> None:
        assert agent.name is not None
        version = (event.epoch, event.committed_sequence)
        newest = agent.runs.beats(event.epoch)
        if not newest or (version[0] == agent.heartbeat[0] and version[1] < agent.heartbeat[1]):
            return
        agent.heartbeat = version
        agent.beats(event.interval_seconds, event.source, to_ns(event.sent_at) / 1e9, now)
        agent.complete = event.incidents.total == len(event.incidents.items)
        listed = set()
        for item in event.incidents.items:
            if item.drill and not self.rules.drills:
                agent.end(item.id, Ended(None, now.monotonic, None))
                continue
            listed.add(item.id)
            if agent.ended_after(item.id, version):
                continue
            known = agent.incidents.get(item.id)
            if known is None or agent.not_later(known.version, version):
                agent.keep(item.id, self._from_heartbeat(agent, item, known, version, now))
        if agent.complete:
            for id_, one in list(agent.incidents.items()):
                if id_ not in listed and agent.not_later(one.version, version):
                    del agent.incidents[id_]
                    agent.end(id_, Ended(one, now.monotonic, version))

    def _from_heartbeat(
        self, agent: Agent, item: OpenIncident, known: Incident | None, version: Version, now: Now
    ) -> Incident:
        assert agent.name is not None
        opened = to_ns(item.opened_at) / 1e9
        onset, settled = agent.onset(opened, known, now)
        return Incident(
            domain=item.domain_uuid,
            backend=self._backend(agent.name, item.device),
            opened=opened,
            onset=onset,
            action=item.action,
            paused=item.paused,
            flapping=item.flapping,
            full=item.reason == ENOSPC or (known is not None and known.full),
            # A heartbeat carries no evidence: whether space is really short there, it does not tell.
            unconfirmed=known.unconfirmed if known is not None else item.reason == ENOSPC,
            after_boot=known.after_boot if known is not None else self._after_boot(agent, onset),
            version=version,
            total=item.total,
            settled=settled,
            recurs=item.id in self.witnessed or (known is not None and known.grows(item.total)),
        )

    def _after_boot(self, agent: Agent, onset: float) -> bool:
        return agent.booted is not None and 0 <= onset - agent.booted <= self.rules.after_boot_seconds

    def _backend(self, host: str, device: Device) -> Backend:
        found = backend_of(host, device, self.rules.storage)
        if len(self._backend_of) >= _MAX_USERS:
            self._backend_of.clear()
        backend = self._backend_of.setdefault(found, found)  # one object for equal ones: quick to compare
        for name in backend.names:
            if len(self._users) < _MAX_USERS or name in self._users:
                self._users[name].add(host)
        return backend

    def _rate_of(self, backend: Backend) -> Rate:
        rate = self._backend_rates.get(backend.names[0])
        if rate is None:
            if len(self._backend_rates) >= _MAX_USERS:
                del self._backend_rates[next(iter(self._backend_rates))]
            rate = self._backend_rates[backend.names[0]] = Rate()
        return rate

    # ---- asking

    def view(self, now: Now) -> FleetView:
        """Everything, judged now."""
        self._forget(now)
        states = self._states(now)
        named = [agent for agent in self._agents.values() if agent.name is not None]
        verdicts = self._judge(named, states, now)
        hosts = [
            self._health(agent, states[agent.id], verdicts, now) for agent in named if agent.name is not None
        ]
        hosts.sort(key=lambda one: one.name)
        silent = sum(state == "silent" for state in states.values())
        return FleetView(
            hosts=tuple(hosts),
            backends=tuple(self._backends(named, verdicts, now)),
            silent=silent,
            incidents=sum(len(agent.incidents) for agent in named),
            errors_per_minute=sum(one.errors_per_minute for one in hosts),
            suspect_ourselves=silent * 2 > len(states) and len(states) > 1,
            own=frozenset(self._own(named, verdicts, now)),
        )

    def _own(self, named: Iterable[Agent], verdicts: Verdicts, now: Now) -> Iterator[str]:
        if self._too_early(now) is not None:
            yield from self.witnessed  # not every agent was heard yet
        for agent in named:
            verdict = verdicts.hosts.get(agent.name or "")
            witnessed = verdict is not None and verdict.own and verdict.witnessed
            yield from (id_ for id_ in agent.incidents if witnessed or id_ in self.witnessed)

    def _health(self, agent: Agent, state: str, verdicts: Verdicts, now: Now) -> HostHealth:
        assert agent.name is not None
        heard = now.monotonic - agent.heard
        rate = agent.rate.per_minute(now.monotonic, self.rules.rate_seconds)
        fresh = agent.fresh
        open_ = agent.incidents.values()
        if not open_:
            return HostHealth(
                agent.name, agent.id, state, heard, Blame.NONE, "", False, None, 0, 0, 0, 0, rate, (), fresh,
                early=agent.pace is not Pace.LIVE,
            )  # fmt: skip
        verdict = verdicts.hosts[agent.name]
        return HostHealth(
            name=agent.name,
            agent_id=agent.id,
            state=state,
            heard_seconds=heard,
            blame=verdict.blame,
            why=verdict.why,
            full=all(one.full for one in open_),
            since=min(one.onset for one in open_),
            incidents=len(open_),
            guests=len({one.domain for one in open_}),
            paused=len({one.domain for one in open_ if one.paused}),
            flapping=sum(one.flapping for one in open_),
            errors_per_minute=rate,
            backends=tuple(sorted({verdicts.system_of[one.backend] for one in open_})),
            fresh=fresh,
            early=verdict.early or agent.pace is not Pace.LIVE,
            witnessed=verdict.witnessed,
        )

    def _forget(self, now: Now) -> None:
        horizon = now.monotonic - self.rules.forget_seconds
        for agent in [one for one in self._agents.values() if one.heard < horizon]:
            del self._agents[agent.id]

    def _states(self, now: Now) -> dict[str, str]:
        """Each agent's state, once the silent ones are gone whose name another agent speaks for."""
        rules = self.rules
        states = {
            agent.id: agent.state(now.monotonic, rules.silent_intervals, rules.round_seconds)
            for agent in self._agents.values()
        }
        live = {agent.name: agent for agent in self._agents.values() if states[agent.id] != "silent"}
        for agent in list(self._agents.values()):
            if agent.name in live and states[agent.id] == "silent":
                self._drop(agent, live[agent.name])
                del states[agent.id]
        return states

    def _judge(self, named: Sequence[Agent], states: Mapping[str, str], now: Now) -> Verdicts:
        live = [one for one in named if one.pace is Pace.LIVE and states[one.id] == "observing"]
        return assess(
            list(self._evidence(named, now)),
            observed={one.name for one in live if one.name},
            users=self._users,
            now=now.wall_ns / 1e9,
            rules=self.rules.verdict,
            blame_nobody=self._too_early(now),
        )

    def _too_early(self, now: Now) -> str | None:
        """Until one round of heartbeats has been heard, who has no trouble is not known."""
        intervals = sorted(one.interval or self.rules.round_seconds for one in self._agents.values())
        # The usual agent's: one that beats once an hour makes nobody wait but for itself.
        round_ = (intervals[len(intervals) // 2] if intervals else self.rules.round_seconds) * 1.1
        if self._since is None or now.monotonic - self._since < round_:
            return f"listening for less than a round of heartbeats ({round_:.0f} s)"
        return None

    def _evidence(self, named: Sequence[Agent], now: Now) -> Iterator[Trouble]:
        """What is open, what ended lately, and what began together with what is still open."""
        horizon = now.monotonic - self.rules.remember_seconds
        onsets = sorted(one.onset for agent in named for one in agent.incidents.values())
        within = self.rules.verdict.onset_seconds
        since = self._listened_since(named)
        for agent in named:
            assert agent.name is not None
            for incident in agent.incidents.values():
                yield incident.trouble(agent.name, is_open=True, listened_since=since)
            for ended in agent.ended.values():
                was = ended.incident
                if was is not None and (ended.at >= horizon or _has_near(onsets, was.onset, within)):
                    yield was.trouble(agent.name, is_open=False, listened_since=since)

    def _listened_since(self, named: Iterable[Agent]) -> float:
        """Since when (Unix seconds) everything was heard, what waited in the queue for us too: the median of
        what the agents' first heartbeats tell, for no agent's clock may tell it for all.
        """
        heard = sorted(one.listened_since for one in named if one.listened_since is not None)
        return min(self._since_wall, heard[len(heard) // 2]) if heard else self._since_wall

    def _backends(self, named: Iterable[Agent], verdicts: Verdicts, now: Now) -> Iterator[BackendHealth]:
        found: dict[str, list[tuple[str, Incident]]] = defaultdict(list)
        for agent in named:
            assert agent.name is not None
            for incident in agent.incidents.values():
                found[verdicts.system_of[incident.backend]].append((agent.name, incident))
        for name in sorted(found):
            verdict: Verdict = verdicts.systems[name]
            incidents = [incident for _, incident in found[name]]
            keys = {incident.backend.names[0] for incident in incidents}
            rates = [self._backend_rates[key] for key in keys if key in self._backend_rates]
            yield BackendHealth(
                name=name,
                kind="/".join(sorted({incident.backend.kind for incident in incidents})),
                blame=verdict.blame,
                why=verdict.why,
                full=verdict.full,
                since=min(incident.onset for incident in incidents),
                hosts=tuple(sorted({host for host, _ in found[name]})),
                guests=len({incident.domain for incident in incidents}),
                incidents=len(incidents),
                errors_per_minute=sum(
                    rate.per_minute(now.monotonic, self.rules.rate_seconds) for rate in rates
                ),
                parts=tuple(sorted({incident.backend.part for incident in incidents})),
            )
