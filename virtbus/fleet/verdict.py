"""Whose fault it is: the host's, a backend's, or undetermined. Pure; it would rather doubt than be wrong.

A **backend** is blamed when different guests on different hosts fell into trouble with it at about the
same time. The word then means the system *or the way to it that those hosts share*.

A **host** is blamed when nothing else explains its trouble: different guests of it, on systems that have
nothing in common (or on its own local storage), at about the same time, for a while, and no other host
has any trouble with those systems while enough others are being observed.

Everything else is `undetermined`: one guest alone, one system seen from one host, several systems seen
from several hosts (what lies between?), hosts of one rack only, trouble right after a reboot, "no space"
on a thin volume or for guests of one host that nothing confirms. A scheduler must not move guests off a host
on a guess.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from enum import Enum

from virtbus.fleet.storage import Backend, Sharing


class Blame(Enum):
    """What the trouble is put down to."""

    NONE = "none"  # no trouble
    HOST = "host"
    BACKEND = "backend"
    UNDETERMINED = "undetermined"


@dataclass(frozen=True, slots=True)
class VerdictRules:
    """When to believe what; times in seconds."""

    onset_seconds: float = 180.0  # troubles that began within this of each other may have one cause
    settle_seconds: float = 60.0  # nobody is blamed before the trouble has lasted so long
    min_witnesses: int = 2  # guests in trouble before anything is blamed
    min_observers: int = 2  # other hosts that are being observed, before one is blamed
    racks: Mapping[str, str] = field(default_factory=dict)  # host → what shares its power or switch


@dataclass(frozen=True, slots=True)
class Trouble:
    """One incident as evidence."""

    host: str
    guest: str  # domain uuid
    backend: Backend
    onset: float  # Unix seconds
    is_open: bool
    full: bool = False  # no space left
    unconfirmed: bool = False  # "no space", and nothing that was looked at confirms it
    after_boot: bool = False  # the host had just been rebooted
    witnessed: bool = True  # it is known who else had trouble when it began, or it goes on


@dataclass(frozen=True, slots=True)
class Verdict:
    """Who is blamed, and why in words."""

    blame: Blame
    why: str
    full: bool = False
    early: bool = False  # it may be clear later
    witnessed: bool = True  # what a host is blamed for: see `Trouble`
    own: bool = False  # nothing explains a host's trouble but the host; it may be too early to blame it


@dataclass(frozen=True, slots=True)
class Verdicts:
    """Of the hosts and of the storage systems in trouble; `system_of` has each trouble's."""

    hosts: Mapping[str, Verdict]
    systems: Mapping[str, Verdict]
    system_of: Mapping[Backend, str]


def assess(
    troubles: Sequence[Trouble],
    *,
    observed: AbstractSet[str],
    users: Mapping[str, AbstractSet[str]],
    now: float,
    rules: VerdictRules,
    blame_nobody: str | None = None,
) -> Verdicts:
    """Judge all troubles together.

    `troubles` are the open ones and those of the last minutes; `observed` the hosts whose agent reports
    and sees its hypervisor; `users` which hosts are known to use what (a backend's name → host names).
    `blame_nobody` says why it is too early for any blame, if it is.
    """
    system_of = _systems(trouble.backend for trouble in troubles)
    by_system: dict[str, list[Trouble]] = defaultdict(list)
    by_host: dict[str, list[Trouble]] = defaultdict(list)
    for trouble in troubles:
        by_system[system_of[trouble.backend]].append(trouble)
        by_host[trouble.host].append(trouble)
    seen_together = {
        system: _largest_onset(
            [one for one in found if _is_fault(one) and not one.after_boot], rules.onset_seconds
        )
        for system, found in by_system.items()
    }
    entangled = _entangled(seen_together, by_host, system_of)
    systems = {
        system: _judge_system(
            found,
            seen_together[system],
            system in entangled,
            observed=observed,
            users=users,
            now=now,
            rules=rules,
        )
        for system, found in by_system.items()
        if any(one.is_open for one in found)
    }
    kin_hosts: dict[str, set[str]] = defaultdict(set)
    for trouble in troubles:
        for word in _relations(trouble.backend, system_of):
            kin_hosts[word].add(trouble.host)
    hosts = {
        host: _judge_host(host, found, systems, system_of, kin_hosts, observed=observed, now=now, rules=rules)
        for host, found in by_host.items()
        if any(one.is_open for one in found)
    }
    hosts = _one_at_a_time(hosts, by_host, rules)
    if blame_nobody is not None:
        doubt = Verdict(Blame.UNDETERMINED, blame_nobody, early=True)
        return Verdicts(dict.fromkeys(hosts, doubt), dict.fromkeys(systems, doubt), system_of)
    return Verdicts(hosts, systems, system_of)


# ------------------------------------------------------------------------------------------- systems


def _systems(backends: Iterable[Backend]) -> dict[Backend, str]:
    """Backends that share a name, over any number of steps, are one system, called by its first name."""
    parent: dict[str, str] = {}

    def find(name: str) -> str:
        root = name
        while parent.setdefault(root, root) != root:
            root = parent[root]
        while parent[name] != root:
            parent[name], name = root, parent[name]
        return root

    distinct = set(backends)
    for backend in distinct:
        first = find(backend.names[0])
        for name in backend.names[1:]:
            other = find(name)
            first, other = min(first, other), max(first, other)
            parent[other] = first
    return {backend: find(backend.names[0]) for backend in distinct}


def _is_fault(trouble: Trouble) -> bool:
    return not trouble.full


def _largest_onset(troubles: Sequence[Trouble], within: float) -> list[Trouble]:
    """The largest set (by hosts, then guests) that began in one chain of onsets at most `within` apart."""
    best: list[Trouble] = []
    chain: list[Trouble] = []
    for trouble in sorted(troubles, key=lambda one: one.onset):
        if chain and trouble.onset - chain[-1].onset > within:
            chain = []
        chain.append(trouble)
        if not best or _weight(chain) > _weight(best):
            best = chain
    return best


def _weight(troubles: Sequence[Trouble]) -> tuple[int, int]:
    return len({one.host for one in troubles}), len({one.guest for one in troubles})


def _from_several(troubles: Sequence[Trouble], rules: VerdictRules) -> bool:
    """Different guests on different hosts: one guest that moves takes its bad image along."""
    first_host: dict[str, str] = {}
    for trouble in sorted(troubles, key=lambda one: one.onset):
        first_host.setdefault(trouble.guest, trouble.host)
    return len(first_host) >= rules.min_witnesses and len(set(first_host.values())) >= 2


def _entangled(
    together: Mapping[str, Sequence[Trouble]],
    by_host: Mapping[str, Sequence[Trouble]],
    system_of: Mapping[Backend, str],
) -> set[str]:
    """Systems that two or more hosts lost along with another one: what lies between may be broken."""
    pairs: dict[tuple[str, str], set[str]] = defaultdict(set)
    several = {system for system, found in together.items() if len({one.host for one in found}) >= 2}
    for host, found in by_host.items():
        lost = sorted({system_of[one.backend] for one in found if _is_fault(one)} & several)
        for index, first in enumerate(lost):
            for second in lost[index + 1 :]:
                pairs[(first, second)].add(host)
    return {system for pair, hosts in pairs.items() if len(hosts) >= 2 for system in pair}


def _judge_system(
    found: Sequence[Trouble],
    together: Sequence[Trouble],
    entangled: bool,
    *,
    observed: AbstractSet[str],
    users: Mapping[str, AbstractSet[str]],
    now: float,
    rules: VerdictRules,
) -> Verdict:
    doubt = Blame.UNDETERMINED
    if found[0].backend.sharing is not Sharing.SHARED:
        return Verdict(doubt, "nothing shows whether other hosts are on it too")
    full = [one for one in found if one.full]
    if len(full) == len(found):
        if any(one.backend.thin for one in full):
            return Verdict(doubt, "no space on thin volumes: theirs, or the pool's", full=True)
        if len({one.guest for one in full}) < rules.min_witnesses:
            return Verdict(doubt, "no space for one guest: its own limit, or the pool's", full=True)
        if all(one.unconfirmed for one in full) and not _from_several(full, rules):
            return Verdict(doubt, "no space for guests of one host, and no look confirms it", full=True)
        return Verdict(
            Blame.BACKEND, f"no space left for {len({one.guest for one in full})} guests", full=True
        )
    hosts = {one.host for one in together}
    if not _from_several(together, rules):
        return Verdict(doubt, "seen from one host, or by one guest, or not at the same time")
    if entangled:
        return Verdict(doubt, "several hosts lost it along with other storage: what lies between?")
    racks = {rules.racks.get(host) for host in hosts}
    if len(racks) == 1 and None not in racks and set(rules.racks.values()) - racks:
        return Verdict(doubt, f"seen only from rack {racks.pop()}")
    names = {name for one in found for name in one.backend.names}
    quiet = {host for name in names for host in users.get(name, ())} & observed - {one.host for one in found}
    if len(quiet) > len(hosts):
        return Verdict(
            doubt, f"{len(hosts)} hosts have trouble with it, {len(quiet)} others that use it have none"
        )
    if now - min(one.onset for one in together) < rules.settle_seconds:
        return Verdict(doubt, "too early to tell: other storage may follow", early=True)
    guests = len({one.guest for one in together})
    return Verdict(Blame.BACKEND, f"{guests} guests on {len(hosts)} hosts fell into trouble with it together")


# --------------------------------------------------------------------------------------------- hosts


def _relations(backend: Backend, system_of: Mapping[Backend, str]) -> tuple[str, ...]:
    return (system_of[backend], *backend.kin)


def _judge_host(
    host: str,
    found: Sequence[Trouble],
    systems: Mapping[str, Verdict],
    system_of: Mapping[Backend, str],
    kin_hosts: Mapping[str, AbstractSet[str]],
    *,
    observed: AbstractSet[str],
    now: float,
    rules: VerdictRules,
) -> Verdict:
    doubt = Blame.UNDETERMINED
    is_open = [one for one in found if one.is_open]
    blamed = sorted(
        {
            system_of[one.backend]
            for one in is_open
            if (verdict := systems.get(system_of[one.backend])) and verdict.blame is Blame.BACKEND
        }
    )
    rest = [one for one in is_open if system_of[one.backend] not in blamed]
    if not rest:
        return Verdict(
            Blame.BACKEND, f"the trouble is that of {', '.join(blamed)}", all(one.full for one in is_open)
        )
    if blamed:
        return Verdict(doubt, f"part of the trouble is that of {', '.join(blamed)}")
    faults = [one for one in rest if _is_fault(one)]
    if not faults:
        return Verdict(doubt, "no space left, and it is unclear where", all(one.full for one in rest))
    began = _largest_onset(faults, rules.onset_seconds)
    guests = {one.guest for one in began}
    if len(guests) < rules.min_witnesses:
        return Verdict(doubt, "one guest is in trouble: its own disk, or more to come")
    others = observed - {host}
    if len(others) < rules.min_observers:
        return Verdict(doubt, f"only {len(others)} other hosts are observed: nothing to compare with")
    if any(kin_hosts[word] - {host} for one in began for word in _relations(one.backend, system_of)):
        return Verdict(doubt, "other hosts have trouble with the same storage, or with what may be the same")
    why = _own_fault(began, system_of, rules)
    if why is None:
        return Verdict(doubt, "one storage system, and no other host to compare with on it")
    witnessed = _own_fault([one for one in began if one.witnessed], system_of, rules) is not None
    since = min(one.onset for one in began)
    if now - since < rules.settle_seconds:
        doubts = "too early to tell: other hosts may follow"
        return Verdict(doubt, doubts, early=True, witnessed=witnessed, own=True)
    return Verdict(Blame.HOST, why, witnessed=witnessed, own=True)


def _own_fault(
    troubles: Sequence[Trouble], system_of: Mapping[Backend, str], rules: VerdictRules
) -> str | None:
    """Why these troubles can have no cause but their host; None when they can."""
    guests = {one.guest for one in troubles}
    if len(guests) < rules.min_witnesses:
        return None
    groups = _unrelated(
        [one.backend for one in troubles if one.backend.sharing is not Sharing.UNKNOWN], system_of
    )
    if groups >= 2:
        return f"{len(guests)} guests lost {groups} unrelated storage systems, no other host did"
    local = {one.guest for one in troubles if one.backend.sharing is Sharing.LOCAL}
    if len(local) >= rules.min_witnesses:
        return f"{len(local)} guests are in trouble with the host's own storage"
    return None


def _unrelated(backends: Iterable[Backend], system_of: Mapping[Backend, str]) -> int:
    """How many groups of backends have nothing in common."""
    groups: list[set[str]] = []
    for backend in set(backends):
        words = set(_relations(backend, system_of))
        touching = [group for group in groups if group & words]
        for group in touching:
            words |= group
        groups = [group for group in groups if group not in touching]
        groups.append(words)
    return len(groups)


def _one_at_a_time(
    hosts: Mapping[str, Verdict], by_host: Mapping[str, Sequence[Trouble]], rules: VerdictRules
) -> dict[str, Verdict]:
    """Two hosts that break at the same moment have something in common: then neither is blamed."""
    out = dict(hosts)
    blamed = sorted(
        (min(one.onset for one in by_host[host] if one.is_open), host)
        for host, verdict in hosts.items()
        if verdict.blame is Blame.HOST
    )

    def close(one: int, other: int) -> bool:
        return abs(blamed[one][0] - blamed[other][0]) <= rules.onset_seconds

    for index, (_, host) in enumerate(blamed):
        before = index > 0 and close(index, index - 1)
        after = index + 1 < len(blamed) and close(index, index + 1)
        if before or after:
            out[host] = Verdict(
                Blame.UNDETERMINED, "other hosts broke at the same moment: what do they share?"
            )
    return out
