"""The intake's hand on the disk: each batch in one transaction, and the sign of life behind it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

from virtbus.agent.incidents import Incidents
from virtbus.agent.speaker import Speaker
from virtbus.agent.tap import Taps
from virtbus.errors import SpoolFull
from virtbus.model import Event, Gap, IoError, IoErrorResolved, Now, Stamp, to_datetime
from virtbus.retry import Backoff
from virtbus.seen import Moment
from virtbus.spool import Spool
from virtbus.telemetry import METRICS, SpoolUnwritable, SpoolWritable, emit
from virtbus.words import GapReason, Phase

HANGING_SECONDS = 10.0  # a write that takes longer is not merely slow


class Writer:
    """Writes for one intake thread; any thread may ask for its `troubles`."""

    def __init__(
        self,
        spool: Spool,
        incidents: Incidents,
        speaker: Speaker,
        taps: Taps,
        clock: Callable[[], Now],
        stop: threading.Event,
        abort: threading.Event,
    ) -> None:
        """`stop` and `abort` bound how long a broken disk is waited for."""
        self._spool, self._incidents, self._speaker, self._taps = spool, incidents, speaker, taps
        self._clock, self._stop, self._abort = clock, stop, abort
        self.error: str | None = None  # why the last write failed
        self.busy_since: float | None = None  # monotonic; since when a write has been under way
        self._sign_refused: Now | None = None
        self._pending: list[Event] = []
        self._pending_states: dict[str, bytes | None] = {}

    @property
    def holds(self) -> bool:
        """Whether there is something that could not be committed."""
        return bool(self._pending or self._pending_states)

    def commit(self, events: list[Event]) -> None:
        """One transaction with the events and the incident states; tries for ever, folding meanwhile.

        The batch that failed is kept as it is; what comes after it stays in the queue, which folds: so
        memory is bounded and no count is lost. When the disk is back a gap event says how long it was.
        """
        self._pending += events
        self._pending_states.update(self._incidents.changes())
        if not self._pending and not self._pending_states and not self._spool.stats().unnamed:
            return  # what is lost and unnamed is named by the spool itself, with any commit
        backoff = Backoff("commit", ceiling=2.0)
        failed: Now | None = None
        begun = self.busy_since = self._clock().monotonic
        while True:
            batch = self._pending if failed is None else [*self._pending, self._unwritable_gap(failed)]
            try:
                stamps = self._spool.commit(batch, self._pending_states)
            except SpoolFull as error:
                failed = failed or self._clock()
                self.error = str(error)
                emit(SpoolUnwritable(str(self._spool.path), error))
                if self._abort.is_set() or (self._stop.is_set() and self._clock().monotonic > begun + 2.0):
                    return  # ending with a broken disk: this batch lies inside the next start's gap
                backoff.wait(self._abort, error)
                continue
            if failed is not None:
                seconds = self._clock().monotonic - failed.monotonic
                emit(SpoolWritable(str(self._spool.path), round(seconds, 1)))
            self._pending, self._pending_states = [], {}
            self.error = self.busy_since = None
            self._committed(batch, stamps)
            return

    def _unwritable_gap(self, failed: Now) -> Gap:
        now = self._clock()
        return self._speaker.gap(
            GapReason.SPOOL_UNWRITABLE,
            f"the spool could not be written for {now.monotonic - failed.monotonic:.0f} s; "
            "errors were counted in memory",
            started_at=to_datetime(Moment.of(failed).wall(now)),
            ended_at=to_datetime(now.wall_ns),
        )

    def _committed(self, events: Sequence[Event], stamps: Sequence[Stamp]) -> None:
        for event in events:
            if isinstance(event, IoError):
                METRICS.events.labels("io_error", event.origin.value, event.incident.phase.value).inc()
                METRICS.occurrences.labels(event.origin.value).inc(event.occurrences.count)
            elif isinstance(event, IoErrorResolved):
                METRICS.events.labels("resolved", "", Phase.RESOLVED.value).inc()
            elif isinstance(event, Gap):
                METRICS.events.labels("gap", "", "").inc()
                METRICS.gaps.labels(event.reason).inc()
        if self._taps.active:
            for event, stamp in zip(events, stamps, strict=False):
                self._taps.offer("incident", event, stamp)

    def sign_of_life(self, now: Now, through: Moment) -> None:
        """Tell the spool up to when all is seen; thus a bad disk shows on an idle host too."""
        self.busy_since = self._clock().monotonic
        taken = self._spool.alive(through.wall(now))
        self.busy_since = None
        since = self._sign_refused
        if not taken:
            self._sign_refused = since or now
            self.error = str(self._spool.refusal)
            emit(SpoolUnwritable(str(self._spool.path), self.error))
        elif since is not None:
            self._sign_refused = self.error = None
            emit(SpoolWritable(str(self._spool.path), round(now.monotonic - since.monotonic, 1)))

    def troubles(self) -> list[str]:
        """Why nothing can be kept now, a line each."""
        reasons = []
        if self.error is not None:
            reasons.append(f"spool: {self.error}")
        busy = self.busy_since
        seconds = 0.0 if busy is None else self._clock().monotonic - busy
        if seconds > HANGING_SECONDS:
            reasons.append(f"spool: a write has been hanging for {seconds:.0f} s")
        return reasons
