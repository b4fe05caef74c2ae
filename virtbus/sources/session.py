"""The callbacks of one connection: what they report at once, and what they leave for the source thread.

They run on libvirt's thread and end within microseconds: no call into libvirt, no log line, no waiting.
"""

from __future__ import annotations

import math
import queue
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from virtbus.model import Now
from virtbus.observations import (
    LATE_SECONDS,
    CallbackLost,
    DeviceRemoved,
    DevicesKnown,
    Observation,
    RawIoError,
    SourceReady,
    SourceSeen,
)
from virtbus.seen import WallClocks
from virtbus.sources import Sink
from virtbus.sources.crosscheck import CrossCheck, Verdict
from virtbus.sources.descriptions import Cache, Entry
from virtbus.sources.evidence import Look
from virtbus.sources.findings import late_event
from virtbus.sources.link import ACTION_PAUSE, RESUMED, STATE_AFTER, STOPPED, left_by, runs_again
from virtbus.words import GapReason, ResolutionCause

MOST_ANSWERS = 64  # two minutes of them, and nothing waits for so long

# A guest's last error that was passed on as libvirt gave it: all but the time, the time, and what was known
# of the guest. For a second, while that stands, the same error is passed on as well, and nothing else is
# asked of it: a storm brings thousands.
_Judged: TypeAlias = tuple[tuple[object, ...], int, Entry | None]
_NOTHING_JUDGED: _Judged = (), 0, None
JUDGED_NS = 1_000_000_000

# ------------------------------------------------------------------------ notes for the source thread


@dataclass(frozen=True, slots=True)
class Lifecycle:
    """A lifecycle callback."""

    uuid: str
    name: str
    number: int | None
    event: int
    detail: int


@dataclass(frozen=True, slots=True)
class Changed:
    """The domain's XML is to be read again."""

    uuid: str


@dataclass(frozen=True, slots=True)
class LookAt:
    """An error is worth a look for evidence."""

    uuid: str


@dataclass(frozen=True, slots=True)
class Looked:
    """What a look found."""

    uuid: str
    look: Look


@dataclass(frozen=True, slots=True)
class Baseline:
    """The old disk errors of a running guest, by target."""

    uuid: str
    disk_errors: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Described:
    """The domain's XML was read."""

    uuid: str


@dataclass(frozen=True, slots=True)
class JobFailed:
    """A block job failed; `disk` is libvirt's word for it, a target."""

    uuid: str
    disk: str


@dataclass(frozen=True, slots=True)
class HostAnswered:
    """The host's UUID is known now, or its hypervisor's version."""

    uuid: str | None = None
    version: str | None = None


@dataclass(frozen=True, slots=True)
class Undecodable:
    """A callback was lost: every domain is to be looked at."""


@dataclass(frozen=True, slots=True)
class Closed:
    """The connection is gone; it may have been deaf for a while before."""

    why: str
    silent_seconds: float = 0.0
    reason: GapReason = GapReason.SOURCE_LOST


Note: TypeAlias = (
    Lifecycle
    | Changed
    | LookAt
    | Looked
    | Baseline
    | Described
    | JobFailed
    | HostAnswered
    | Undecodable
    | Closed
)


# ------------------------------------------------------------------------------------------ callbacks


class Shared:
    """What callbacks, look-ups and the source thread of one hypervisor share, over all its connections.

    `lock` is held around `check` and the sink, so that an error never changes sides with a resume.
    """

    def __init__(
        self,
        clock: Callable[[], Now],
        grace_seconds: float,
        clocks: WallClocks | None = None,
        connection: str = "",
    ) -> None:
        """`connection`: whose guests these are, where a source has several."""
        self.clock = clock
        self.clocks = clocks or WallClocks()
        self.lock = threading.Lock()
        self.check = CrossCheck(grace_seconds, connection)
        self.cache = Cache()


class Notes:
    """What one connection leaves for the source thread, which `wake` calls; any thread puts."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self._wake = wake
        self._queue: queue.SimpleQueue[Note] = queue.SimpleQueue()

    def put(self, note: Note) -> None:
        """Leave a note."""
        self._queue.put(note)
        self._wake()

    def next(self) -> Note | None:
        """The oldest note, or None."""
        try:
            return self._queue.get_nowait()
        except queue.Empty:
            return None


class Session:
    """The callbacks of one connection.

    It ignores calls once it has ended, so no event is reported by two sessions.
    """

    def __init__(
        self, shared: Shared, sink: Sink, connection: str = "", wake: Callable[[], None] = lambda: None
    ) -> None:
        self.connection = connection
        self.heard = False  # something, since the last question
        self.seen = shared.clock()  # when the last question was asked that the daemon answered; or the begin
        # The last answers: when each came (monotonic), and when it was asked for.
        self._answers = deque([(-math.inf, self.seen)], maxlen=MOST_ANSWERS)
        self.notes = Notes(wake)
        # What lifecycle callbacks said since the listing: (name, number, state), None: it left. Then None.
        self.since_listing: dict[str, tuple[str, int | None, str] | None] | None = {}
        # Resumes during the first look, which may still find the pause that they end: reported after it.
        self._resumes: dict[str, Sequence[Observation]] = {}
        self.resumed_at: dict[str, float] = {}  # guests whose last callback was a resume → when (monotonic)
        self._left: dict[str, tuple[float, ResolutionCause]] = {}  # guests that left lately → when, why
        self._judged: dict[str, _Judged] = {}
        self.live = True
        self._shared = shared
        self._sink = sink
        self._wake = wake

    def io_error(self, raw: RawIoError) -> None:
        """Report it at once; see Handler."""
        if not self.heard:
            self.hear()
        shared, uuid = self._shared, raw.domain_uuid
        with shared.lock:
            words, at, entry = self._judged.get(uuid, _NOTHING_JUDGED)
            is_same = words == raw[:-1] and 0 <= raw.observed_at - at < JUDGED_NS
            if is_same and entry is shared.cache.present(uuid) and shared.check.cases.again(raw):
                self._sink(raw)
                return
        self._judge(raw)

    def _judge(self, raw: RawIoError) -> None:
        """Report an error that is not the one before it again."""
        shared, now, words = self._shared, self._shared.clock(), raw[:-1]
        uuid, given, path = raw.domain_uuid, raw.alias, raw.path  # as libvirt names it
        raw = shared.cache.shown(raw)
        with shared.lock:
            if not self.live:
                return
            self.tell(self._resumes.pop(uuid, ()))
            stale = shared.cache.stale(uuid, given, path)
            alias = given or shared.cache.resolve(raw._replace(path=path), now.monotonic)
            raw = raw if given else raw._replace(alias=alias)
            verdict = shared.check.event(raw, now.monotonic)
            if not alias:
                shared.check.suspect(uuid, shared.cache.jobs(uuid) or frozenset())
            if verdict is not Verdict.HOLD:
                known = verdict in (Verdict.KNOWN, Verdict.FOUND)
                self._sink(late_event(raw, found=verdict is Verdict.FOUND) if known else raw)
            if uuid in self._left:
                # A hypervisor that merges errors may send one late: nothing else would end its incident.
                cause = self._left[uuid][1]
                self.tell([*shared.check.gone(uuid), shared.check.left(uuid, now.wall_ns, cause)])
                return
            if given and raw[:-1] == words and raw.action_code != ACTION_PAUSE:
                self._judged[uuid] = words, raw.observed_at, shared.cache.present(uuid)
        if verdict is Verdict.TELL_AND_LOOK:
            self.notes.put(LookAt(uuid))
        elif verdict is Verdict.HOLD:  # until it is read who may have been it
            self.notes.put(Changed(uuid))
        if stale or not given or not shared.cache.knows(uuid, alias):
            if shared.cache.get(uuid) is None:
                shared.cache.saw(uuid, raw.domain_name, raw.domain_id, "running")
            if shared.cache.may_ask(uuid, now.monotonic) or stale:
                self.notes.put(Changed(uuid))

    def lifecycle(self, uuid: str, name: str, number: int | None, event: int, detail: int) -> None:
        """Report resumes and ends at once, leave pauses to the cross-check; see Handler."""
        self.hear()
        now = self._shared.clock()
        with self._shared.lock:
            if not self.live:
                return
            self.resumed_at.pop(uuid, None)
            self._judged.pop(uuid, None)
            if runs_again(event, detail):
                self.resumed_at[uuid] = now.monotonic
            self.tell(self._resumes.pop(uuid, ()))
            meant = self._shared.check.lifecycle(uuid, name, number, event, detail, now)
            if event == RESUMED and self.since_listing is not None:
                self._resumes[uuid] = meant
            else:
                self.tell(meant)
            self._left.pop(uuid, None)
            if event == STOPPED:
                lately = now.monotonic - LATE_SECONDS
                self._left = {one: left for one, left in self._left.items() if left[0] >= lately}
                self._left[uuid] = now.monotonic, left_by(detail)
            if self.since_listing is not None and event in STATE_AFTER:
                said = (name, number, STATE_AFTER[event]) if event != STOPPED else None
                self.since_listing[uuid] = said
        self.notes.put(Lifecycle(uuid, name, number, event, detail))

    def hear(self) -> None:
        """Something was reported: the daemon is asked sooner what is seen (`SourceSeen`)."""
        if not self.heard:  # a storm's every callback comes by here
            self.heard = True
            self._wake()

    def device_removed(self, uuid: str, alias: str) -> None:
        """See Handler."""
        now = self._shared.clock()
        with self._shared.lock:
            if self.live:
                self._shared.check.removed(uuid, alias)
                self._shared.cache.outdate(uuid, now.monotonic)
                self._sink(DeviceRemoved(uuid, alias, now.wall_ns))
        self.notes.put(Changed(uuid))

    def changed(self, uuid: str) -> None:
        """See Handler."""
        self._shared.cache.outdate(uuid, self._shared.clock().monotonic)
        self.notes.put(Changed(uuid))

    def job_ended(self, uuid: str, disk: str, *, failed: bool) -> None:
        """See Handler."""
        with self._shared.lock:
            self._shared.check.suspect(uuid, frozenset({self._shared.cache.disk(uuid, disk)}))
        if failed:
            self.notes.put(JobFailed(uuid, disk))

    def undecodable(self) -> None:
        """See Handler. Reports a gap at once: it may have been an I/O error that left no other trace."""
        now = self._shared.clock()
        if self.live:
            self._sink(CallbackLost(now.wall_ns, "a callback of libvirt held text that is not UTF-8"))
        self.notes.put(Undecodable())

    def closed(self, why: str, silent_seconds: float) -> None:
        """See Handler."""
        self.notes.put(Closed(why, silent_seconds))

    def first_look_is_over(self, ready: SourceReady) -> None:
        """Report it, and what waited for it; the lock is held."""
        self.tell([ready, *(each for said in self._resumes.values() for each in said)])
        self.since_listing, self._resumes = None, {}

    def tell(self, found: Sequence[Observation]) -> None:
        """Report what a look found; the observer's lock is held."""
        for each in found:
            self._sink(each)

    def described(self, uuid: str) -> None:
        """Say what an XML that was just read shows of what was reported before; the lock is held."""
        cache, check, now = self._shared.cache, self._shared.check, self._shared.clock()
        missing, aliases = cache.late(uuid)
        check.removed(uuid, *missing)
        if not self.live:
            return
        if aliases is not None:
            self.tell([DevicesKnown(uuid, aliases, now.wall_ns)])
        self.tell(check.described(uuid, cache.only_disk(uuid), cache.jobs(uuid), now.monotonic))

    def saw(self, asked: Now) -> None:
        """The daemon answered a question asked at `asked`: everything it sent before has been received."""
        with self._shared.lock:
            if self.live:
                self.seen = asked
                came = self._shared.check.undecided_since(asked.monotonic)
                through = asked if came is None else self._through(came)
                self._answers.append((self._shared.clock().monotonic, asked))
                self._sink(SourceSeen(asked, self.connection, max(0.0, asked.boot - through.boot)))

    def _through(self, came: float) -> Now:
        """Until when what came at `came` can't have happened: a daemon that stood still says it late."""
        return next((asked for at, asked in reversed(self._answers) if at <= came), self._answers[0][1])

    def end(self) -> None:
        """Hear nothing any more."""
        with self._shared.lock:
            self.live, self._judged = False, {}
