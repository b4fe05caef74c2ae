"""Errors whose events name no device: who may have been it, as far as a domain's disks show. Pure.

libvirt up to 9.0 names none during a block job. Guarantees:

1. a device is named only where no other one can have been it at the time of the error: not one that was
   unplugged since, nor one whose job has ended since, or began without anybody's notice;
2. what one description could not explain, no later one does;
3. each error is reported once, at the end of the grace time at the latest.
"""

from __future__ import annotations

from virtbus.observations import Burst, RawIoError
from virtbus.sources.cases import Case
from virtbus.sources.descriptions import FRESH_SECONDS
from virtbus.sources.findings import burst_of
from virtbus.words import Origin

MOST_WAITING = 4096  # errors of a domain; what comes beyond is reported without a name


def waits(case: Case, raw: RawIoError, mono: float) -> bool:
    """Whether an error without a device and a pause waits until the disks are read, and show whose it is.

    Where no device of the guest has an error yet it is reported at once, and named later.
    """
    wants = case.nameless
    if raw.alias or not any(case.last_ns) or len(wants.waiting) >= MOST_WAITING or is_unclear(case, mono):
        return False
    wants.since = wants.since if wants.waiting else mono
    wants.waiting.append(raw)
    return True


def is_unclear(case: Case, mono: float) -> bool:
    """Whether the disks were read a moment ago, and did not show whose an error without a name is."""
    return mono - case.unclear_at <= FRESH_SECONDS


def release_waiting(case: Case, alias: str = "") -> list[Burst]:
    """The errors that waited, of this device."""
    raws, case.nameless.waiting = case.nameless.waiting, []
    for raw in raws:
        case.reports[alias] = raw._replace(alias=alias)
        case.last_ns[alias] = raw.observed_at
    return [burst_of(raw._replace(alias=alias), 1, Origin.EVENT, None, None, pause=False) for raw in raws]


def described(case: Case, only_disk: str, jobs: frozenset[str] | None, mono: float) -> list[Burst]:
    """The disks were read: name what came without a name, where nobody else can have been it.

    During its block job libvirt names no disk; of a pause the look at it says more, and comes first. `jobs`:
    the disks that have one; None: it is not known.
    """
    seen = case.nameless
    if only_disk and seen.left | seen.busy <= {only_disk}:
        return identified(case, only_disk) + release_waiting(case, only_disk)
    if jobs is None:
        return []
    seen.busy |= jobs
    alias = next(iter(seen.busy)) if len(seen.busy) == 1 and not seen.left else ""
    is_decided = not (case.pauses or case.credit)
    found = identified(case, alias, pauses=is_decided, listed=False) if alias else []
    found += release_waiting(case, alias)
    case.reports.pop("", None)  # what a later description shows says nothing of it, nor of a decided pause
    case.unclear_at = case.unclear_at if alias else mono
    if is_decided:
        seen.busy.add("")
    return found


def identified(case: Case, alias: str, *, pauses: bool = True, listed: bool = True) -> list[Burst]:
    """The device behind the events that came without its name: their facts, without a count.

    `pauses`: of those that paused the guest, too; `listed`: and of a pause without an event.
    """
    tables, names = [case.reports], [case.wanting]
    if pauses:
        tables += [case.events, *(pause.events for pause in case.pauses), case.credit]
        names += [case.unseen]
        for held in (*(pause.held for pause in case.pauses), case.held):
            held[:] = [raw._replace(alias=raw.alias or alias) for raw in held]
    raws = []
    for table in tables:
        if "" in table:
            raws.append(table.pop(""))
            table[alias] = raws[-1]._replace(alias=alias)
    if listed and (finding := case.synthesised.pop("", None)):
        raws.append(finding.raw)
        case.events[alias] = finding.raw._replace(alias=alias)
    for raw in raws:
        case.last_ns[alias] = max(case.last_ns.get(alias, 0), raw.observed_at)
    for each in names:
        if "" in each:
            each.discard("")
            each.add(alias)
    return [burst_of(raw._replace(alias=alias), 0, Origin.EVENT, None, None, pause=False) for raw in raws[:1]]
