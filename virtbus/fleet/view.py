"""What the fleet looks like now: its incidents judged, a host and a storage system at a time. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from enum import Enum

from virtbus.fleet.agent import Agent, Incident, Pace, Rate
from virtbus.fleet.storage import StorageRules
from virtbus.fleet.verdict import Blame, Trouble, VerdictRules, Verdicts, assess
from virtbus.model import Now

_Named = Sequence[tuple[str, Agent]]


@dataclass(frozen=True, slots=True)
class FleetRules:
    """How events are read; times in seconds."""

    storage: StorageRules = field(default_factory=StorageRules)
    verdict: VerdictRules = field(default_factory=VerdictRules)
    silent_intervals: float = 3.0  # heartbeats that may be missed
    round_seconds: float = 60.0  # a round of heartbeats, for an agent that did not report its interval
    remember_seconds: float = 900.0  # how long an incident that ended is evidence
    after_boot_seconds: float = 1800.0  # how long a reboot is a likely cause
    rate_seconds: float = 300.0  # the time constant of rates
    forget_seconds: float = 86_400.0  # a host that was silent so long is not part of the fleet
    drills: bool = False  # count replayed errors as if they were live


class Answer(Enum):
    """What there is to say of a host: three answers, not just bad and well."""

    BAD = "bad"
    WELL = "well"
    CANT_TELL = "can't tell"


@dataclass(frozen=True, slots=True)
class HostHealth:
    """One host as the fleet sees it now."""

    name: str
    agent_id: str
    state: str  # "observing", "blind" (cut off from its hypervisor) or "silent" (no heartbeats of its agent)
    heard_seconds: float  # since its last sign of life
    blame: Blame
    why: str
    full: bool  # all its trouble is lack of space
    since: float | None  # Unix seconds: when its oldest open incident began
    incidents: int  # open ones
    guests: int  # with open incidents
    paused: int  # of them, stopped by the hypervisor
    flapping: int  # incidents in a pause/resume loop
    errors_per_minute: float
    backends: tuple[str, ...]  # the storage systems it has trouble with
    fresh: bool  # a heartbeat listed everything that is open: what is not here is not
    early: bool = False  # too early to tell: nothing is put down to anybody yet
    witnessed: bool = True  # what it is blamed for: see `Trouble`

    @property
    def answer(self) -> Answer:
        """Bad, well, or can't tell: only the first is a reason to act, only the second to undo. Well is a
        host's own fresh word that nothing of it is in trouble. Trouble older than our listening is neither:
        others may have recovered from it, and the last guests to resume would look like their host's fault.
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
    suspect_ourselves: bool  # most hosts are silent at once: rather our own connection
    own: frozenset[str] = frozenset()  # open incidents that were seen to be their hosts' own

    def host(self, name: str) -> HostHealth | None:
        """One host, by the name libvirt gives it."""
        return next((one for one in self.hosts if one.name == name), None)


def judge(
    agents: Sequence[Agent],
    states: Mapping[str, str],
    *,
    users: Mapping[str, AbstractSet[str]],
    rates: Mapping[str, Rate],
    rules: FleetRules,
    since: float,
    too_early: str | None,
    witnessed: AbstractSet[str],
    now: Now,
) -> FleetView:
    """Judge everything.

    `states` is each agent's, `users` which hosts use a storage system's name, `rates` its errors, `since`
    when (Unix seconds) we began to listen, `too_early` why nobody can be blamed yet, `witnessed` the
    incidents that were seen to be their hosts' own before a restart.
    """
    named = [(agent.name, agent) for agent in agents if agent.name is not None]
    verdicts = assess(
        list(_evidence(named, rules, since, now)),
        observed={name for name, one in named if states[one.id] == "observing" and one.pace is Pace.LIVE},
        users=users,
        now=now.wall_ns / 1e9,
        rules=rules.verdict,
        blame_nobody=too_early,
    )
    hosts = [_health(name, agent, states[agent.id], verdicts, rules, now) for name, agent in named]
    hosts.sort(key=lambda one: one.name)
    # By names: a host is one however many agents claim to speak for it, and an agent that has not seen its
    # hypervisor yet speaks for none.
    names = {name for name, _ in named}
    silent = len(names - {name for name, agent in named if states[agent.id] != "silent"})
    return FleetView(
        hosts=tuple(hosts),
        backends=tuple(_backends(named, verdicts, rates, rules, now)),
        silent=silent,
        incidents=sum(len(agent.incidents) for _, agent in named),
        errors_per_minute=sum(one.errors_per_minute for one in hosts),
        suspect_ourselves=silent * 2 > len(names) and len(names) > 1,
        # Too early: not every agent was heard yet.
        own=frozenset((*_own(named, verdicts, witnessed), *(witnessed if too_early is not None else ()))),
    )


def _own(named: _Named, verdicts: Verdicts, witnessed: AbstractSet[str]) -> Iterator[str]:
    for name, agent in named:
        verdict = verdicts.hosts.get(name)
        seen = verdict is not None and verdict.own and verdict.witnessed
        yield from (id_ for id_ in agent.incidents if seen or id_ in witnessed)


def _health(
    name: str, agent: Agent, state: str, verdicts: Verdicts, rules: FleetRules, now: Now
) -> HostHealth:
    open_, verdict = agent.incidents.values(), verdicts.hosts.get(name) if agent.incidents else None
    return HostHealth(
        name=name,
        agent_id=agent.id,
        state=state,
        heard_seconds=now.monotonic - agent.heard,
        blame=Blame.NONE if verdict is None else verdict.blame,
        why="" if verdict is None else verdict.why,
        full=bool(open_) and all(one.full for one in open_),
        since=min((one.onset for one in open_), default=None),
        incidents=len(open_),
        guests=len({one.domain for one in open_}),
        paused=len({one.domain for one in open_ if one.paused}),
        flapping=sum(one.flapping for one in open_),
        errors_per_minute=agent.rate.per_minute(now.monotonic, rules.rate_seconds),
        backends=tuple(sorted({verdicts.system_of[one.backend] for one in open_})),
        fresh=agent.fresh,
        early=agent.pace is not Pace.LIVE or (verdict is not None and verdict.early),
        witnessed=verdict is None or verdict.witnessed,
    )


def _evidence(named: _Named, rules: FleetRules, since: float, now: Now) -> Iterator[Trouble]:
    """What is open, what ended lately, and what began together with what is still open."""
    horizon, within = now.monotonic - rules.remember_seconds, rules.verdict.onset_seconds
    onsets = sorted(one.onset for _, agent in named for one in agent.incidents.values())
    # Since when everything was heard, what waited in the queue for us too: the median of what the agents'
    # first heartbeats show, for no agent's clock may decide it for all.
    heard = sorted(one.listened_since for _, one in named if one.listened_since is not None)
    since = min(since, heard[len(heard) // 2]) if heard else since
    for name, agent in named:
        for incident in agent.incidents.values():
            yield incident.trouble(name, is_open=True, listened_since=since)
        for ended in agent.ended.values():
            was = ended.incident
            if was is not None and (ended.at >= horizon or _has_near(onsets, was.onset, within)):
                yield was.trouble(name, is_open=False, listened_since=since)


def _has_near(moments: Sequence[float], moment: float, within: float) -> bool:
    """Whether one of the sorted `moments` is at most `within` away."""
    at = bisect_left(moments, moment - within)
    return at < len(moments) and moments[at] <= moment + within


def _backends(
    named: _Named, verdicts: Verdicts, rates: Mapping[str, Rate], rules: FleetRules, now: Now
) -> Iterator[BackendHealth]:
    found: dict[str, list[tuple[str, Incident]]] = defaultdict(list)
    for host, agent in named:
        for incident in agent.incidents.values():
            found[verdicts.system_of[incident.backend]].append((host, incident))
    for name in sorted(found):
        verdict, incidents = verdicts.systems[name], [incident for _, incident in found[name]]
        keys = {incident.backend.names[0] for incident in incidents} & rates.keys()
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
            errors_per_minute=sum(rates[key].per_minute(now.monotonic, rules.rate_seconds) for key in keys),
            parts=tuple(sorted({incident.backend.part for incident in incidents})),
        )
