"""Which numbered events of each agent's run have come, and which are missing without an explanation.

Pure: the clock is passed in. A baseline that was saved (`changes`, `restore`) makes a hole visible that
opened while no consumer ran. Which run of an agent is the later one is decided by its own chain and its
heartbeats, never by a clock: epochs hold times of the host.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from virtbus.model import Event, Gap, Heartbeat
from virtbus.telemetry import TelemetryEvent

Run = tuple[str, str]
"""(source, epoch): one run of one agent, within which events are numbered from 1."""

_SEQUENCE = re.compile("[0-9]{1,18}")
_TICK_SECONDS = 1.0
_MAX_HOLES = 10_000  # remembered per run: beyond it the oldest are reported at once
_MAX_RUNS = 50_000  # the least recently begun are forgotten
_MAX_RANGES = 1_000  # of numbers that gap events named ahead of time, a run


class Cause(StrEnum):
    """Why events are missing; open, later releases may know others."""

    UNEXPLAINED = "unexplained"  # a hole in an agent's sequence that no gap event names
    RETENTION = "retention"  # the broker deleted them before the group had read them
    REPLACED = "replaced"  # the topic or the whole cluster is another one than the group read before


class MissingEvents(TelemetryEvent, level="error"):
    """events are missing

    Events `first` to `last` did not come and will not.

    With the cause "unexplained" they are sequence numbers of an agent (`source`) in one `epoch`. Otherwise
    they are Kafka offsets: `source` is "topic[partition]" and `epoch` the id of the topic they were in, ""
    when the broker does not say; `last` is None where nobody knows how far they went, as in a topic that
    is gone.
    """

    source: str
    epoch: str
    first: int
    last: int | None
    cause: Cause = Cause.UNEXPLAINED


@dataclass(slots=True)
class _State:
    """What came of one run: everything below `next` but for the holes, and what is still being handled."""

    next: int | None = None  # None: nothing came yet, others spoke of this run
    first: int | None = None  # what came first, while nothing shows that we heard the run begin
    since: float = float("-inf")  # when that came
    above: set[int] = field(default_factory=set)  # what came below the first one that came, in the meantime
    beats: bool = False  # its heartbeats were heard
    holes: dict[int, float | None] = field(default_factory=dict)  # → missed since; None: not yet counted
    explained: list[tuple[int, int]] = field(default_factory=list)  # from `next` on, as gap events named them
    open: set[int] = field(default_factory=set)  # handed out, without a verdict

    def explains(self, number: int) -> bool:
        return any(first <= number <= last for first, last in self.explained)

    def saved(self) -> str:
        """What a restart needs: a number without a verdict counts as not come, for it comes again."""
        holes = sorted({*self.holes, *self.open})
        return json.dumps({
            "next": self.next, "holes": _ranges(holes), "explained": self.explained, "first": self.first,
            "beats": self.beats, "above": _ranges(sorted(self.above - self.open)),
        })  # fmt: skip

    @classmethod
    def restored(cls, text: str) -> _State:
        """What `saved` wrote; its holes age only once their agent is heard."""
        found = json.loads(text)
        state = cls(found["next"], found.get("first"), beats=found.get("beats", False))
        state.holes = {n: None for first, last in found["holes"] for n in range(first, last + 1)}
        state.above = {n for first, last in found.get("above", ()) for n in range(first, last + 1)}
        state.explained = [(first, last) for first, last in found["explained"]]
        return state


def _numbered(attributes: Mapping[str, str]) -> tuple[str, str, int | None]:
    """An event's source, its epoch, and its number in that; None for one without."""
    epoch, sequence = attributes.get("epoch") or "", attributes.get("sequence") or ""
    number = int(sequence) if epoch and _SEQUENCE.fullmatch(sequence) else None
    return attributes["source"], epoch, number


def _ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
    """Sorted numbers as (first, last)."""
    found: list[tuple[int, int]] = []
    for number in numbers:
        if found and found[-1][1] + 1 == number:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return found


class SequenceCheck:
    """Finds the holes in each run that no gap event explains within the reordering window.

    Guarantees: a number that a gap event names is not an alarm, whether the event comes before or after its
    neighbours; a number that was reported once is not reported again; what `restore` brought back ages only
    once its agent is heard again, so that a long absence of the consumer is not a hole.
    """

    def __init__(
        self, reorder_seconds: float, on_missing: Callable[[MissingEvents], None], *, enabled: bool = True
    ) -> None:
        """`enabled` False: it looks at nothing and remembers nothing."""
        self._enabled = enabled
        self._reorder_seconds = reorder_seconds
        self._tell = on_missing
        self._runs: dict[Run, _State] = {}
        self._holed: dict[Run, _State] = {}  # those that have, or had, holes
        self._heard: dict[str, set[str]] = {}  # source → its runs that lived while we listened, or before
        self._waiting: dict[str, list[_State]] = {}  # restored, their agent not heard yet
        self._handed: dict[tuple[str, str], tuple[Run, int]] = {}  # (source, id) without a verdict
        self._changed: set[Run] = set()
        self._ticked = float("-inf")

    # ---- a restart

    def restore(self, saved: Iterable[tuple[str, str, str]]) -> None:
        """Go on from (source, epoch, state) as `changes` gave them, the oldest run first."""
        for source, epoch, text in saved if self._enabled else ():
            state = self._runs[(source, epoch)] = _State.restored(text)
            if state.beats or (state.next is not None and state.first is None):
                self._heard.setdefault(source, set()).add(epoch)
            if state.holes:
                self._holed[(source, epoch)] = state
                self._waiting.setdefault(source, []).append(state)

    def changes(self) -> list[tuple[str, str, str | None]]:
        """(source, epoch, state) of each run that changed since `saved`; None: forget it."""
        runs = self._runs
        return [(*run, runs[run].saved() if run in runs else None) for run in sorted(self._changed)]

    def saved(self) -> None:
        """What `changes` gave is on disk."""
        self._changed.clear()

    # ---- what comes

    def saw(self, attributes: Mapping[str, str], event: Event | None, now: float) -> None:
        """An event arrived (a duplicate too)."""
        if not self._enabled:
            return
        source, epoch, number = _numbered(attributes)
        for state in self._waiting.pop(source, ()):
            state.holes.update(dict.fromkeys((n for n, since in state.holes.items() if since is None), now))
        if isinstance(event, Heartbeat):
            self._beats((source, event.epoch), now)
        elif isinstance(event, Gap):  # first, for it speaks of the runs before its own
            self._gap(source, epoch, event, now)
        if number is not None:
            self._number((source, epoch), number, now)

    def handed_out(self, attributes: Mapping[str, str]) -> None:
        """The event is with the caller now: until `settled` a restart has to see it again."""
        source, epoch, number = _numbered(attributes)
        state = self._runs.get((source, epoch))
        if state is not None and number is not None:
            state.open.add(number)
            self._handed[(source, attributes["id"])] = (source, epoch), number

    def settled(self, source: str, event_id: str) -> None:
        """The event had its verdict."""
        handed = self._handed.pop((source, event_id), None)
        if handed is not None:
            run, number = handed
            if run in self._runs:
                self._runs[run].open.discard(number)
                self._changed.add(run)

    def tick(self, now: float) -> None:
        """Report the holes that stayed open for the whole window; looks once a second (or window)."""
        if now - self._ticked < min(_TICK_SECONDS, self._reorder_seconds):
            return
        self._ticked = now
        for run, state in list(self._holed.items()):
            late = sorted(
                n for n, at in state.holes.items() if at is not None and now - at >= self._reorder_seconds
            )
            for number in late:
                del state.holes[number]
            for first, last in _ranges(late):
                self._changed.add(run)
                self._tell(MissingEvents(*run, first, last))
            if not state.holes:
                del self._holed[run]

    # ---- within

    def _number(self, run: Run, number: int, now: float) -> None:
        state = self._state(run)
        self._changed.add(run)
        if state.next is None:  # the first number seen is the baseline
            state.next = state.first = number
            state.since = now
        state.holes.pop(number, None)
        if state.first is not None and number < state.first and len(state.above) < _MAX_HOLES:
            state.above.add(number)
        if number == 1 and now - state.since <= self._reorder_seconds:  # later it was sent again, by hand say
            self._began(run, state, now)
        if number >= state.next:
            self._expect(run, state, number, now)
            self._advance(state, number + 1)

    def _beats(self, run: Run, now: float) -> None:
        """A heartbeat of this run came. It is never stored: the agent's other runs that lived are over."""
        source, epoch = run
        heard = self._heard.setdefault(source, set())
        if epoch in heard:
            return
        state = self._state(run)
        state.beats = True
        if heard:
            self._began(run, state, now)
        heard.add(epoch)
        self._changed.add(run)

    def _began(self, run: Run, state: _State, now: float) -> None:
        """We heard the run begin: its numbers count from 1."""
        if state.next is None:
            state.next = 1
        elif state.first is not None:
            following, state.next, first, above = state.next, 1, state.first, state.above
            self._expect(run, state, first, now)
            for number in above:
                state.holes.pop(number, None)
            self._advance(state, following)
        state.first, state.above = None, set()

    def _gap(self, source: str, epoch: str, event: Gap, now: float) -> None:
        for item in event.missing:
            run = (source, item.epoch)
            state = self._state(run)
            self._changed.add(run)
            for number in [n for n in state.holes if item.first <= n <= item.last]:
                del state.holes[number]
            state.explained = [*state.explained, (item.first, item.last)][-_MAX_RANGES:]
            if state.next is not None:
                self._advance(state, state.next)
        if event.previous is not None:
            # The last run's tail: what its spool knew of must have come, or come yet.
            run = (source, event.previous.epoch)
            last = self._runs.get(run)
            # A run that nobody heard, right before this one, came after those that were.
            if (last is None or last.next is None) and self._heard.get(source, set()) - {epoch, run[1]}:
                last = self._state(run)
                self._began(run, last, now)
            if last is not None and last.next is not None:
                self._changed.add(run)
                self._expect(run, last, event.previous.last_sequence + 1, now)

    def _state(self, run: Run) -> _State:
        state = self._runs.get(run)
        if state is None:
            state = self._runs[run] = _State()
            while len(self._runs) > _MAX_RUNS:
                oldest = next(iter(self._runs))
                del self._runs[oldest]
                self._holed.pop(oldest, None)
                self._heard.get(oldest[0], set()).discard(oldest[1])
                self._changed.add(oldest)
        return state

    def _advance(self, state: _State, following: int) -> None:
        """Everything below `following` is accounted for, and what gap events named right behind it."""
        state.next = following
        for first, last in sorted(state.explained):
            if first <= state.next <= last:
                state.next = last + 1
        if state.first is None:
            state.explained = [(first, last) for first, last in state.explained if last >= state.next]

    def _expect(self, run: Run, state: _State, upto: int, now: float) -> None:
        assert state.next is not None
        first = max(state.next, upto - _MAX_HOLES)
        if first > state.next:
            self._tell(MissingEvents(*run, state.next, first - 1))
        state.holes.update({number: now for number in range(first, upto) if not state.explains(number)})
        if state.holes:
            self._holed[run] = state
        self._advance(state, max(state.next, upto))
