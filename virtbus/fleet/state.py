"""Folds events into what is known of each host: pure, bounded, the clock passed in."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet

from virtbus.fleet.agent import Agent, Ended, Incident, Rate, Runs, Version
from virtbus.fleet.storage import Backend, identify
from virtbus.fleet.view import FleetRules, FleetView, judge
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


# What looks at the space itself; the others repeat the errno that the hypervisor was given.
_SPACE_CHECKS = frozenset({EvidenceCheck.BLOCK_INFO, EvidenceCheck.FILE_SYSTEM})


def _space_was_short(evidence: Iterable[Evidence]) -> bool:
    return any(one.check in _SPACE_CHECKS and one.verdict == EvidenceVerdict.CONFIRMS for one in evidence)


_MAX_USERS = 50_000
_MAX_REPLACED = 10_000


class Fleet:
    """What all events so far say. `saw` each event in the order it comes, then ask `view`.

    - Order between an agent's events does not matter: each incident keeps the (epoch, sequence) of what
      was last heard of it, and a heartbeat says up to which sequence it speaks. Which run is the later one
      is decided by the agent's own chain, never by a clock.
    - After a restart one round of heartbeats rebuilds it, because each carries what is open.
    - A sign of life is its arrival, by our monotonic clock. Which troubles began together is decided by
      hosts' clocks as their heartbeats show them against ours.
    - Of several agents that claim one name the silent ones are the past (a machine that was replaced), and so
      is one whose host another agent began to speak for (it was reinstalled).
    - Errors that a drill or a recording replayed are not counted, unless the rules say so.
    """

    def __init__(self, rules: FleetRules | None = None) -> None:
        """An empty fleet."""
        self.rules = rules or FleetRules()
        self.witnessed: AbstractSet[str] = frozenset()  # incidents that were their hosts' own before a start
        self._agents: dict[str, Agent] = {}
        self._users: dict[str, set[str]] = defaultdict(set)
        self._backend_rates: dict[str, Rate] = {}
        self._backend_of: dict[Backend, Backend] = {}
        self._since: float | None = None  # monotonic: when we began to listen
        self._since_wall = 0.0  # the same in Unix seconds
        self._replaced: dict[str, Runs] = {}  # agents of the past, for whose hosts others speak now

    def __len__(self) -> int:
        return len(self._agents)

    def saw(self, event: Event, attributes: Mapping[str, str], now: Now) -> str | None:
        """Fold one event in; the name of the host it speaks of, or None when it names none.

        `attributes` are its CloudEvents attributes: `source`, `id`, `epoch` and `sequence` are read.
        """
        id_ = attributes["source"].rpartition("/")[2]
        event_id = attributes.get("id", "")
        past = self._replaced.get(id_)
        if past is not None and (not isinstance(event, Heartbeat) or past.has_counted(event.epoch, event_id)):
            return None  # what an agent of the past still had in its spool, or had said
        agent = self._agents.get(id_)
        if agent is None:
            agent = self._agents[id_] = Agent(id_, runs=past or Runs())
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
            self._heartbeat(agent, event, event_id, now)
            if past is not None:
                del self._replaced[id_]  # it lives after all: two claims, until one of them falls silent
            else:
                self._replace_older(agent)
        return agent.name

    # ---- folding

    def _met(self, agent: Agent, host: Host, now: Now) -> None:
        before = agent.host.boot_id if agent.host is not None else None
        if before is not None and host.boot_id not in (None, before):
            agent.booted = now.wall_ns / 1e9
        if agent.name != host.name:  # under another name it starts to beat again
            agent.name, agent.beat_at = host.name, None
        agent.host = host

    def _replace_older(self, agent: Agent) -> None:
        """A host that was reinstalled has a new agent: the one before it is the past."""
        host = agent.host
        if host is None or agent.beat_at != agent.began_to_beat:
            return  # only the first heartbeat makes others the past
        for other in [one for one in self._agents.values() if one.name == agent.name and one is not agent]:
            same = other.host is None or None in (other.host.uuid, host.uuid) or other.host.uuid == host.uuid
            if same:
                self._drop(other)

    def _drop(self, agent: Agent) -> None:
        del self._agents[agent.id]
        self._replaced[agent.id] = agent.runs
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

    def _heartbeat(self, agent: Agent, event: Heartbeat, event_id: str, now: Now) -> None:
        assert agent.name is not None
        version = (event.epoch, event.committed_sequence)
        newest = agent.runs.beats(event.epoch, event_id)
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
            # A heartbeat carries no evidence: whether space is really short there, it does not say.
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
        found = identify(host, device.source, self.rules.storage)
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
        horizon = now.monotonic - self.rules.forget_seconds
        for agent in [one for one in self._agents.values() if one.heard < horizon]:
            del self._agents[agent.id]
        states = self._states(now)
        return judge(
            list(self._agents.values()),
            states,
            users=self._users,
            rates=self._backend_rates,
            rules=self.rules,
            since=self._since_wall,
            too_early=self._too_early(now),
            witnessed=self.witnessed,
            now=now,
        )

    def _states(self, now: Now) -> dict[str, str]:
        """Each agent's state, once the silent ones are gone whose name another agent speaks for."""
        rules = self.rules
        states = {
            agent.id: agent.state(now.monotonic, rules.silent_intervals, rules.round_seconds)
            for agent in self._agents.values()
        }
        live = {agent.name for agent in self._agents.values() if states[agent.id] != "silent"}
        for agent in list(self._agents.values()):
            if agent.name in live and states[agent.id] == "silent":
                self._drop(agent)
                del states[agent.id]
        return states

    def _too_early(self, now: Now) -> str | None:
        """Until one round of heartbeats has been heard, who has no trouble is not known."""
        intervals = sorted(one.interval or self.rules.round_seconds for one in self._agents.values())
        # The usual agent's: one that beats once an hour makes nobody wait but for itself.
        round_ = (intervals[len(intervals) // 2] if intervals else self.rules.round_seconds) * 1.1
        if self._since is None or now.monotonic - self._since < round_:
            return f"listening for less than a round of heartbeats ({round_:.0f} s)"
        return None
