"""What is held, as the local store remembers it and as the control plane shows it: pure.

The control plane is the truth. The store is a cache that may be lost: it adds what a mark can't hold (how
often in a row, what an operator took away) and is corrected by each look.

What stands there when a host that we hold is looked at, and what it means:

| our mark | what it marks | means | follows |
|---|---|---|---|
| there | there | held | nothing |
| there | gone | another controller overwrote it | held again |
| gone | the object is another one, or shows nothing of ours | it was registered again | held again, (1) |
| gone | the same object | an operator took it away | left alone until the host was well once |
| gone | no object | the host left the control plane | forgotten |

(1) Forgotten where another instance may have been the active one since the look before: it may have given the
host back before the object was replaced, and the policy decides again.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

from virtbus import redaction
from virtbus.errors import VirtbusError
from virtbus.fleet import FleetView
from virtbus.integrations.base import Found, Hold, short

_MOST_TIMES = 1000
GONE_SECONDS = 86_400.0  # a held host that nobody has spoken for since then is not part of the fleet


class HoldState(StrEnum):
    """Where a host stands with us."""

    HOLDING = "holding"  # decided, not done yet
    HELD = "held"
    RELEASING = "releasing"  # decided, not done yet: held until it is
    UNSURE = "unsure"  # we were killed on the way: the next look shows
    LEFT = "left"  # somebody else decides, until the host was well once
    FREE = "free"


OURS = frozenset({HoldState.HOLDING, HoldState.HELD, HoldState.RELEASING, HoldState.UNSURE})


class Finding(StrEnum):
    """What a look changed."""

    ADOPTED = "adopted"
    WIPED = "wiped"
    REGISTERED_ANEW = "registered again"
    REMOVED_BY_HAND = "removed by hand"
    TARGET_GONE = "target gone"


@dataclass(frozen=True, slots=True)
class Row:
    """One host in the store."""

    host: str  # libvirt's name
    state: HoldState
    since: float  # Unix seconds: when it was (last) held
    times: int = 1  # how often in a row, each within an hour of the last
    why: str = ""
    target: str | None = None  # the control plane's name, where it is known
    uid: str = ""  # its identity there
    agent: str = ""  # the agent that spoke for it
    heard_at: float = 0.0  # Unix seconds: when that was last
    released_at: float | None = None

    @property
    def ours(self) -> bool:
        """Whether it counts as held: until the release has succeeded."""
        return self.state in OURS


@dataclass(frozen=True, slots=True)
class Change:
    """One row after a look; `again` asks for the hold to be set once more."""

    row: Row
    finding: Finding | None = None
    again: bool = False


def reconcile(
    rows: Mapping[str, Row],
    found: Found,
    *,
    asked: Collection[str] | None,
    reported: Collection[str],
    acting: bool,
    known: bool,
    wall: float,
) -> list[Change]:
    """Correct `rows` by what was found; only changed rows are returned.

    `asked` names the hosts that were looked at, None means all; `reported` those whose condition was shown
    before the look. Without `acting` (we have heard no agent: another instance may be the active one)
    nothing is undone or set again. `known`: what is held was read before, and we were active ever since.
    """
    by_uid = {row.uid: name for name, row in rows.items() if row.uid and row.ours}
    marks: dict[str, Hold] = {}
    for hold in [_bounded(one, wall) for one in found.holds]:
        name = by_uid.get(hold.uid, hold.host)
        marks[hold.target if name in marks else name] = hold  # two marks for one host are two holds
    out = [_adopted(name, hold, wall) for name, hold in marks.items() if _is_new(rows, name)]
    for name, row in rows.items():
        mark = marks.get(name)
        if row.state is HoldState.UNSURE and (mark is not None or acting):
            change = _unsure(row, mark)
        elif row.state is not HoldState.HELD or (asked is not None and name not in asked):
            continue
        elif mark is not None:
            marked = replace(row, target=mark.target, uid=mark.uid)
            wiped = acting and not mark.intact
            change = Change(_again(marked), Finding.WIPED, True) if wiped else Change(marked)
        elif not acting:
            continue
        elif name not in found.uids:
            change = Change(replace(row, state=HoldState.FREE, uid=""), Finding.TARGET_GONE)
        elif (row.uid and found.uids[name] != row.uid) or (name in found.bare and name in reported):
            change = _registered_anew(row, found.uids[name], known)
        else:
            change = Change(replace(row, state=HoldState.LEFT), Finding.REMOVED_BY_HAND)
        if change.row != row or change.again:
            out.append(change)
    return out


def _bounded(hold: Hold, wall: float) -> Hold:
    """A mark stands where others can write: whatever it says can be stored, and lies in the past."""
    since = hold.since if hold.since is not None and 0.0 <= hold.since <= wall else None
    times = hold.times if 1 <= hold.times <= _MOST_TIMES else 1
    return replace(hold, since=since, times=times, why=storable(hold.why))


def storable(text: str) -> str:
    """Text as SQLite takes it: a lone surrogate is not UTF-8."""
    return text.encode("utf-8", "replace").decode()


def in_words(error: Exception) -> str:
    """What an exception of anybody's code says, as SQLite and a broker take it."""
    said = storable(redaction.text(error))
    return (said if isinstance(error, VirtbusError) else f"{type(error).__name__}: {said}")[:500]


def _is_new(rows: Mapping[str, Row], name: str) -> bool:
    return name not in rows or not rows[name].ours


def _adopted(name: str, hold: Hold, wall: float) -> Change:
    # A mark says since when it is held, not how long ago its agent spoke: for all that is known, just now.
    since = wall if hold.since is None else hold.since
    adopted = Row(name, HoldState.HELD, since, hold.times, hold.why, hold.target, hold.uid, heard_at=wall)
    if hold.intact:
        return Change(adopted, Finding.ADOPTED)
    return Change(_again(adopted), Finding.ADOPTED, True)


def _unsure(row: Row, mark: Hold | None) -> Change:
    if mark is None:
        return Change(replace(row, state=HoldState.FREE))
    held = replace(row, state=HoldState.HELD, target=mark.target, uid=mark.uid)
    return Change(held) if mark.intact else Change(_again(held), Finding.WIPED, True)


def _registered_anew(row: Row, uid: str, known: bool) -> Change:
    if not known:
        return Change(replace(row, state=HoldState.FREE, uid=""), Finding.TARGET_GONE)
    return Change(replace(_again(row), uid=uid), Finding.REGISTERED_ANEW, True)


def _again(row: Row) -> Row:
    return replace(row, state=HoldState.HOLDING)


def not_ahead(row: Row, wall: float) -> Row:
    """A row without times to come: our clock was ahead when they were written, and would wait for them."""
    if max(row.since, row.heard_at, row.released_at or 0.0) <= wall:
        return row
    released = None if row.released_at is None else min(row.released_at, wall)
    return replace(row, since=min(row.since, wall), heard_at=min(row.heard_at, wall), released_at=released)


# ---- names


def renamed(rows: Iterable[Row], view: FleetView) -> Iterator[tuple[Row, str]]:
    """Rows that the fleet knows by another name of the same host: `compute-1` as `compute-1.example.org`.

    Never one domain's for another's: `compute-1.a.org` and `compute-1.b.org` are two hosts.
    """
    names = {host.name: host.agent_id for host in view.hosts}
    for row in rows:
        if row.state is HoldState.FREE or row.host in names:
            continue
        same = [
            name
            for name, agent in names.items()
            if (name == short(row.host) or short(name) == row.host) and row.agent in ("", agent)
        ]
        if len(same) == 1:
            yield row, same[0]


def orphaned(
    rows: Iterable[Row], view: FleetView, wall: float, *, listened: bool
) -> Iterator[tuple[Row, str]]:
    """Rows of hosts that left the fleet, with the reason: its agent bears another name, or nobody for a day.

    `listened`: for so long that whoever speaks has been heard.
    """
    names = {host.name: host for host in view.hosts}
    agents = {host.agent_id: host for host in view.hosts if host.state != "silent"}
    for row in rows:
        if not row.ours or row.host in names:
            continue
        now_called = agents.get(row.agent) if row.agent else None
        if now_called is not None:
            yield row, f"the host is called {now_called.name} now"
        elif listened and wall - max(row.heard_at, row.since) >= GONE_SECONDS:
            yield row, "no agent has spoken for it for a day"
