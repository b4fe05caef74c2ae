"""Observes one hypervisor through a `Link`: connects for ever, looks, cross-checks, tells.

Threads: libvirt's own calls the session's callbacks (session.py); the source thread calls `Observer.step`;
look-ups run on threads and a connection of their own (lookups.py, asking.py), and whatever else may never
return on the crew's (crew.py). Which error is told, and by
whom, is decided in crosscheck.py.
"""

from __future__ import annotations

import math
import queue
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event as StopEvent

from virtbus.errors import ConfigError, SourceDenied, SourceUnavailable
from virtbus.model import (
    Burst,
    Clock,
    Description,
    Device,
    DomainGone,
    DomainResumed,
    DomainState,
    Host,
    HostKnown,
    Now,
    Observation,
    SourceGone,
    SourceLost,
    SourceReady,
)
from virtbus.retry import Backoff
from virtbus.seen import MARGIN_SECONDS, Moment
from virtbus.sources import Sink, SourceOptions
from virtbus.sources.asking import HOST, Asker
from virtbus.sources.connecting import Opened, Opener, Opening
from virtbus.sources.crew import Crew
from virtbus.sources.crosscheck import STAMP_SLACK_NS
from virtbus.sources.evidence import Look, disk_errors_by_alias
from virtbus.sources.link import (
    PAUSED,
    PAUSED_IOERROR,
    PAUSED_UNKNOWN,
    RUNNING,
    STARTED,
    STATES,
    STOPPED,
    SUSPENDED,
    SUSPENDED_IOERROR,
    Connector,
    HostFacts,
    Link,
)
from virtbus.sources.lookups import Lookups, Want
from virtbus.sources.session import (
    PAUSES,
    STATE_AFTER,
    Baseline,
    Changed,
    Closed,
    Described,
    HostAnswered,
    JobFailed,
    Lifecycle,
    LookAt,
    Looked,
    Note,
    Session,
    Shared,
    Undecodable,
)
from virtbus.sources.witness import Pulse, Witness
from virtbus.telemetry import BlockJobFailed, SourceCutOff, SourceRegistered, Trouble, emit
from virtbus.words import GuestState, ResolutionCause

RECONNECT_CEILING_SECONDS = 2.0  # callbacks are back within 5 s after the daemon is
SNAPSHOT_SECONDS = 3.0  # what the first look could not see by then comes later
ALIVE_SECONDS = 5.0  # between two looks at a connection that nobody closed
POLL_SECONDS = 1.0  # how soon `stop` is seen
LOOK_POLL_SECONDS = 0.02  # how soon the end of a first look is seen where its last answer failed or is late
NOTES_A_STEP = 64
# How long a look for evidence lets its error go first: both want Python's lock and libvirtd.
LOOK_AFTER_SECONDS = 0.02
_IO_PAUSE_REASONS = (PAUSED_IOERROR, PAUSED_UNKNOWN)


@dataclass(slots=True)
class _Snapshot:
    """What the first look of a session found."""

    looks: dict[str, Look] = field(default_factory=dict)
    findings: list[Burst] = field(default_factory=list)


class Observer:
    """One hypervisor; all of `virtbus.sources.Source` but `probe`.

    A state machine that never waits: `begin`, then `step` as often as it asks for it or `wake` is called,
    then `end`; all from one thread. `run` drives a single one; many.py drives one for each daemon of a host.
    """

    def __init__(
        self,
        connector: Connector,
        *,
        options: SourceOptions,
        clock: Callable[[], Now] | None = None,
        crew: Crew | None = None,
        retry: Callable[[Exception | str], float] | None = None,
    ) -> None:
        """`retry`: why the hypervisor is away → seconds until it is tried again (a short backoff)."""
        shared = self._shared = Shared(clock or Clock(), options.grace_seconds)
        self.clock, self.lock, self.check, self.cache = shared.clock, shared.lock, shared.check, shared.cache
        self._connector = connector
        self._options = options
        self._many = options.host is not None  # one among others on its host
        self._crew = crew or Crew(clock=lambda: self.clock().monotonic)
        self._opener = Opener(connector, self._crew, 1 if self._many else None)
        self._asker = Asker(shared, options.owner_rules)
        self._lookups = self._make_lookups()
        self._backoff = Backoff("libvirt", ceiling=RECONNECT_CEILING_SECONDS)
        self._retry = retry
        # Domains whose next look is to say what was missed since when (wall ns; None: not by old messages).
        self._reconciling: dict[str, int | None] = {}
        self._troubled: dict[str, float] = {}  # uuid → when to look at it (monotonic)
        since_ns = options.since_ns
        # The last moment that was seen for certain; what the hypervisor remembers is asked for from there on.
        self._since = None if since_ns is None else Moment.stamped(since_ns, shared.clock())
        self._facts: HostFacts | None = None
        self._ready_at: Moment | None = None
        self.ever_ready = False
        # Where it stands: no session (waiting to retry), opening, looking around (`_snapshot`), listening.
        self._session: Session | None = None
        self._opening: Opening | None = None
        self._opened: Opened | None = None
        self._snapshot: _Snapshot | None = None
        self._witness: Witness | None = None
        self._vanished: list[str] = []  # guests that were there before the connection was lost, and are not
        self._look_until = self._alive_at = self._retry_at = float("-inf")
        self._sink: Sink = _nobody
        self._wake: Callable[[], None] = _nothing
        self._awake = False

    # ---- the Source contract

    def run(self, sink: Sink, stop: StopEvent) -> None:
        """Observe until `stop`; see Source."""
        bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        pulse = Pulse(self.clock())
        self.begin(sink, lambda: bell.put(None))
        try:
            while not stop.is_set():
                due = self.step()
                wait = min(POLL_SECONDS, due - self.clock().monotonic)
                with suppress(queue.Empty):
                    if wait > 0:
                        bell.get(timeout=wait)
                stood = pulse.beat(self.clock(), POLL_SECONDS)
                if stood is not None:
                    self.stood_still(pulse, stood)
        finally:
            self.end()

    def describe(self, domain_uuid: str) -> Description | None:
        """From the cache; see Source."""
        entry = self.cache.get(domain_uuid)
        if entry is not None and entry.description is not None:
            return entry.description
        session = self._asker.session
        if session is not None and self.cache.may_ask(domain_uuid, self.clock().monotonic):
            session.notes.put(Changed(domain_uuid))
        return None

    def snapshot(self) -> SourceReady:
        """One look; see Source."""
        session = self._session = Session(self._shared, _nobody)
        try:
            self._opened = self._opener.connect(None)
            self._look_around(session, self._opened)
            while not self._looked(session):
                StopEvent().wait(LOOK_POLL_SECONDS)
            assert self._snapshot is not None
            return self._ready(session, self._opened, self._snapshot)
        finally:
            self._leave()
            self._lookups.close()
            self._lookups = self._make_lookups()

    # ---- the steps

    @property
    def connected(self) -> bool:
        """Whether it listens."""
        return self._witness is not None

    def begin(self, sink: Sink, wake: Callable[[], None]) -> None:
        """To be called first; `wake` is called from any thread when there is something to do."""
        self._sink, self._wake = sink, wake

    def step(self) -> float:
        """Do what is due, without waiting → when to come again at the latest (monotonic).

        Raises SourceDenied or ConfigError, and nothing else, before the first look.
        """
        self._awake = False
        try:
            return self._step()
        except (SourceDenied, ConfigError) as error:
            if not self.ever_ready:
                self._leave()
                raise
            return self._away(error)
        except SourceUnavailable as error:
            return self._away(error)

    def end(self) -> None:
        """Let go of everything."""
        self._leave()
        self._lookups.close()

    def retry_now(self) -> None:
        """Another daemon listens: try it at once, whatever the one before did."""
        self._opener.forget()
        self._backoff.reset()
        self._retry_at = float("-inf")
        if self._opened is None and self._session is not None:
            self._leave()

    def stood_still(self, pulse: Pulse, seconds: float) -> None:
        """The process stood still: what was told meanwhile may be lost."""
        if self._session is not None and self.connected:
            self._cut_off(pulse.closed(self._session, seconds))

    def gone(self) -> None:
        """The hypervisor is gone for good, and so are its guests."""
        now = self.clock()
        left = [entry.uuid for entry in self.cache.active()]
        self._sink(SourceGone(now.wall_ns, self._connector.uri, frozenset(left)))
        for uuid in left:
            self._tell_gone(uuid)

    def _tell_gone(self, uuid: str) -> None:
        with self.lock:
            for burst in self.check.gone(uuid):
                self._sink(burst)
            self._sink(DomainGone(uuid, self.clock().wall_ns, ResolutionCause.DOMAIN_STOPPED))
        self.cache.gone(uuid)

    def _rouse(self) -> None:
        """Callable from any thread; once a step, however often."""
        if not self._awake:
            self._awake = True
            self._wake()

    def _step(self) -> float:
        now = self.clock().monotonic
        if self._session is None:
            if now < self._retry_at:
                return self._retry_at
            self._session = Session(self._shared, self._sink, self._connector.uri, self._rouse)
            self._opening = self._opener.begin(self._session, now, self._rouse)
        session = self._session
        if self._opened is None:
            assert self._opening is not None
            self._opened = self._opening.result(now)
            if self._opened is None:
                again = self._crew.check()
                return self._opening.deadline if again is None else min(again, self._opening.deadline)
            self._opening = None
            self._look_around(session, self._opened)
        if self._witness is None:
            if not self._looked(session):
                return now + LOOK_POLL_SECONDS
            self._tell_ready(session, self._opened)
        assert self._witness is not None
        return self._listen(session, self._opened.link, self._witness)

    def _leave(self) -> None:
        """Let go of the session, wherever it stands."""
        session, opened, opening = self._session, self._opened, self._opening
        self._session = self._opened = self._opening = self._snapshot = self._witness = None
        self._asker.session = None
        if session is not None:
            session.end()
        if opening is not None:
            opening.give_up()
        if opened is not None:
            self._lookups.pause()
            opened.link.close()

    def _away(self, why: Exception | str) -> float:
        self._leave()
        self._retry_at = self.clock().monotonic + (self._retry or self._backoff.plan)(why)
        return self._retry_at

    def _cut_off(self, closed: Closed) -> float:
        """The connection is lost: tell, and try again soon."""
        assert self._session is not None
        session = self._session
        self._leave()
        now = self.clock()
        silent = max(closed.silent_seconds, 0.0 if session.seen is None else now.boot - session.seen.boot)
        self._since = Moment.of(now, silent + MARGIN_SECONDS)
        emit(SourceCutOff(self._connector.uri, closed.why))
        lost_ns = now.wall_ns - int(closed.silent_seconds * 1e9)
        domains = frozenset(entry.uuid for entry in self.cache.active()) if self._many else None
        self._sink(SourceLost(lost_ns, closed.why, session.connection, closed.reason, domains))
        self._backoff.reset()
        return self._away(closed.why)

    def _tell_ready(self, session: Session, opened: Opened) -> None:
        assert self._snapshot is not None
        with self.lock:
            ready = self._ready(session, opened, self._snapshot)
            session.since_listing = None
            self._sink(ready)
        for uuid in self._vanished:
            self._sink(DomainGone(uuid, ready.at_ns, ResolutionCause.DOMAIN_STOPPED))
        self._snapshot, self._vanished, self.ever_ready = None, [], True
        hypervisor = ready.host.hypervisor
        emit(
            SourceRegistered(
                self._connector.uri, hypervisor.libvirt_version, hypervisor.version, len(ready.domains)
            )
        )
        for domain in ready.domains:
            if domain.state == "running":
                self._lookups.request(domain.uuid, Want.BASELINE)
        now = self.clock()
        self._witness = Witness(session, opened.link, self._crew, now, self._options.quiet_seconds)
        self._alive_at = now.monotonic + self._alive_seconds

    @property
    def _alive_seconds(self) -> float:
        return self._options.quiet_seconds or ALIVE_SECONDS

    def _listen(self, session: Session, link: Link, witness: Witness) -> float:
        """Handle notes and timers; notes beyond NOTES_A_STEP wait until others had their turn."""
        for _ in range(NOTES_A_STEP):
            note = session.notes.next()
            if isinstance(note, Closed):
                return self._cut_off(note)
            try:
                if note is not None:
                    self._handle(session, note, None)
                self._decide(session)
                self._look_at_trouble()
            except Exception as error:  # noqa: BLE001 - one strange domain must not end the watch
                emit(Trouble("source", error))
            if note is None:
                break
        else:
            return self.clock().monotonic
        now = self.clock()
        if now.monotonic >= self._alive_at:
            self._alive_at = now.monotonic + self._alive_seconds
            if not link.alive():
                return self._cut_off(Closed("the connection is closed", self._alive_seconds))
        with self.lock:
            moments = [self.check.next_due(), self.check.next_doubt()]
        moments += [min(self._troubled.values(), default=None), self._lookups.check(), self._crew.check()]
        due = min(self._alive_at, witness.step(now))
        return min([due, *(moment for moment in moments if moment is not None)])

    def _handle(self, session: Session, note: Note, snapshot: _Snapshot | None) -> None:
        if isinstance(note, Lifecycle):
            self._on_lifecycle(note, at_once=snapshot is not None)
        elif isinstance(note, Changed):
            self._lookups.request(note.uuid, Want.DESCRIPTION)
        elif isinstance(note, LookAt):
            self._look_at(note.uuid, at_once=snapshot is not None)
        elif isinstance(note, Looked):
            self._on_look(session, note, snapshot)
        elif isinstance(note, Baseline):
            entry = self.cache.get(note.uuid)
            if entry is not None:
                wrong = disk_errors_by_alias(note.disk_errors, entry.devices)
                with self.lock:
                    self.check.baseline(entry.uuid, entry.name, entry.number, wrong)
        elif isinstance(note, Described):
            self._on_description(session, note.uuid)
        elif isinstance(note, JobFailed):
            entry = self.cache.get(note.uuid)
            emit(BlockJobFailed(note.uuid if entry is None else entry.name, note.disk))
        elif isinstance(note, HostAnswered):
            if snapshot is None and self._facts is not None:
                session.tell([HostKnown(self._host(self._facts), self.clock().wall_ns)])
        elif isinstance(note, Undecodable):
            for entry in self.cache.active():
                since_ns = None if self._ready_at is None else self._ready_at.wall(self.clock())
                self._reconciling.setdefault(entry.uuid, since_ns)
                self._lookups.request(entry.uuid, Want.TROUBLE)

    def _on_description(self, session: Session, uuid: str) -> None:
        """What was told of the domain without its device's name may be told now."""
        with self.lock:
            if session.live and self.check.has_nameless(uuid) and (alias := self.cache.resolve(uuid, "")):
                session.tell(self.check.identified(uuid, alias))

    def _look_at(self, uuid: str, *, at_once: bool) -> None:
        """Look at a guest's trouble: `at_once` where the look may find an error that no event told of."""
        if at_once:
            self._troubled.pop(uuid, None)
            self._ask_about_trouble(uuid)
        else:
            self._troubled.setdefault(uuid, self.clock().monotonic + LOOK_AFTER_SECONDS)

    def _on_lifecycle(self, note: Lifecycle, *, at_once: bool) -> None:
        uuid, event = note.uuid, note.event
        if event == STOPPED:
            self.cache.gone(uuid)
            self._lookups.forget(uuid)
            self._reconciling.pop(uuid, None)
            self._troubled.pop(uuid, None)
        elif event in STATE_AFTER:
            fresh = self.cache.saw(uuid, note.name, note.number, STATE_AFTER[event])
            if fresh or event == STARTED:
                self._lookups.request(uuid, Want.DESCRIPTION)
            if event == SUSPENDED and note.detail in PAUSES:
                with self.lock:
                    told = note.detail == SUSPENDED_IOERROR and self.check.is_told(uuid)
                # Without an event only a look while the guest is paused tells that it was a disk, and which.
                self._look_at(uuid, at_once=at_once or not told)

    def _on_look(self, session: Session, note: Looked, snapshot: _Snapshot | None) -> None:
        uuid, look = note.uuid, note.look
        entry = self.cache.get(uuid)
        if entry is None:
            return
        now = self.clock()
        with self.lock:
            if not session.live:
                return
            if uuid in self._reconciling:
                found = self.check.reconcile(
                    uuid,
                    entry.name,
                    entry.number,
                    look,
                    entry.devices,
                    since_ns=self._reconciling[uuid],
                    mono=now.monotonic,
                    ns=now.wall_ns,
                )
                # The guest was resumed while it was looked at: what was found stands, and is over.
                overtaken = session.resumed_at.get(uuid, -math.inf) >= look.asked_at
                if overtaken:
                    self.check.resumed(uuid)
                if look.complete:
                    del self._reconciling[uuid]
                if snapshot is not None:
                    snapshot.looks[uuid] = look
                    snapshot.findings += found
                else:
                    session.tell([*found, DomainResumed(uuid, now.wall_ns)] if overtaken and found else found)
            session.tell(self.check.looked(uuid, look, entry.devices))
            if self.check.runs(uuid, look):
                session.tell([DomainResumed(uuid, now.wall_ns)])

    def _look_at_trouble(self) -> None:
        now = self.clock().monotonic
        with self.lock:
            doubtful = self.check.doubtful(now)
        due = [uuid for uuid, at in self._troubled.items() if at <= now]
        for uuid in (*due, *doubtful):
            self._troubled.pop(uuid, None)
            self._ask_about_trouble(uuid)

    def _ask_about_trouble(self, uuid: str) -> None:
        """With the description: no event tells of a snapshot, and the blame must not fall on an old image."""
        self._lookups.request(uuid, Want.TROUBLE | Want.DESCRIPTION)

    def _decide(self, session: Session) -> None:
        now = self.clock()
        with self.lock:
            due = self.check.next_due()
            if due is None or due > now.monotonic:
                return
            devices: dict[str, Mapping[str, Device]] = {}
            for uuid in self.check.undecided():
                entry = self.cache.get(uuid)
                devices[uuid] = {} if entry is None else entry.devices
            for decision in self.check.due(now.monotonic, devices):
                session.tell(decision.bursts)
                if decision.over and any(burst.count for burst in decision.bursts):
                    # The pause is told after its end: say again that it is over.
                    self._sink(DomainResumed(decision.bursts[0].raw.domain_uuid, now.wall_ns))

    # ---- the first look of a session

    def _look_around(self, session: Session, opened: Opened) -> None:
        """Registered already; now ask what is there. `_looked` within SNAPSHOT_SECONDS, complete or not."""
        facts = opened.facts
        self._asker.begin(session, facts)
        here = frozenset(domain.uuid for domain in opened.domains)
        for entry in self.cache.active():
            if entry.uuid not in here:
                self.cache.gone(entry.uuid)
                if self._many:
                    self._vanished.append(entry.uuid)
        with self.lock:
            self.check.slack_ns = 0 if facts.local else STAMP_SLACK_NS
            session.tell(self.check.keep_only(here))
            for domain in opened.domains:
                if domain.state == RUNNING and domain.uuid not in (session.since_listing or {}):
                    self.check.listed_running(domain.uuid)
        self._snapshot = _Snapshot()
        self._reconciling, self._troubled = {}, {}
        since_ns = None if self._since is None else self._since.wall(self.clock())
        # Guests in trouble first: they are what this is about.
        for paused in (True, False):
            for domain in opened.domains:
                if paused is not (domain.state == PAUSED and domain.reason in _IO_PAUSE_REASONS):
                    continue
                self.cache.saw(domain.uuid, domain.name, domain.id, _state(domain.state))
                want = Want.DESCRIPTION
                if paused or (since_ns is not None and facts.keeps_messages):
                    want |= Want.TROUBLE
                    self._reconciling[domain.uuid] = since_ns
                self._lookups.request(domain.uuid, want)
        if self._asker.host_uuid is None and not self._many:
            self._lookups.request(HOST, Want.HOST)
        self._lookups.resume()
        self._look_until = self.clock().monotonic + SNAPSHOT_SECONDS

    def _looked(self, session: Session) -> bool:
        """Whether the first look is over. Raises SourceUnavailable when the connection is lost meanwhile."""
        while True:
            self._lookups.check()
            busy = self._lookups.busy()
            handled = False
            while (note := session.notes.next()) is not None:
                if isinstance(note, Closed):
                    raise SourceUnavailable(f"{self._connector.uri}: {note.why}")
                self._handle(session, note, self._snapshot)
                handled = True
            if self.clock().monotonic >= self._look_until:
                return True
            if not handled:
                return not busy

    def _ready(self, session: Session, opened: Opened, snapshot: _Snapshot) -> SourceReady:
        """The first look as it stands now; the lock is held, so that no callback falls between."""
        since = session.since_listing or {}
        findings = list(snapshot.findings)
        now = self.clock()
        self._facts, self._ready_at = opened.facts, Moment.of(now)
        states = {}
        for domain in opened.domains:
            look = snapshot.looks.get(domain.uuid)
            by_error = domain.state == PAUSED and domain.reason == PAUSED_IOERROR
            if by_error and look is None and domain.uuid not in since:
                # The listing itself tells, whatever becomes of the look; that refines it.
                uuid, name, number = domain.uuid, domain.name, domain.id
                alias = self.cache.resolve(uuid, "")
                findings += self.check.listed(
                    uuid, name, number, alias=alias, mono=now.monotonic, ns=now.wall_ns
                )
            states[domain.uuid] = DomainState(
                uuid=domain.uuid,
                name=domain.name,
                state=_state(domain.state),
                paused_by_io_error=look.paused_by_io_error if look is not None else by_error,
                aliases=self.cache.aliases(domain.uuid),
            )
        for uuid, said in since.items():
            old = states.pop(uuid, None)
            if said is None:
                continue
            name, state = said
            look = snapshot.looks.get(uuid)
            still = state == GuestState.PAUSED and look is not None and look.paused_by_io_error
            aliases = self.cache.aliases(uuid) if old is None else old.aliases
            states[uuid] = DomainState(uuid, name, state, still, aliases)
        return SourceReady(
            host=self._host(opened.facts),
            at_ns=now.wall_ns,
            domains=tuple(states.values()),
            findings=tuple(findings),
            throttles=opened.facts.throttles,
            connection=session.connection,
            proves=True,
            whole=not self._many,
            appeared_ns=self._connector.appeared_ns,
        )

    def _host(self, facts: HostFacts) -> Host:
        if self._options.host is not None:
            return replace(self._options.host, hypervisor=facts.hypervisor)
        boot_id = None
        if facts.local:
            try:
                boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
            except OSError:
                boot_id = None
        return Host(name=facts.name, uuid=self._asker.host_uuid, boot_id=boot_id, hypervisor=facts.hypervisor)

    def _make_lookups(self) -> Lookups:
        return Lookups(
            self._connector,
            self._asker.ask,
            in_flight=self._options.lookups_in_flight,
            deadline=self._options.lookup_deadline_seconds,
            clock=lambda: self.clock().monotonic,
            idle=self._options.idle_seconds,
        )


def _state(number: int) -> str:
    return STATES.get(number, str(number))


def _nobody(_observation: Observation) -> None:
    """A sink that nobody listens to."""


def _nothing() -> None:
    """Wake nobody."""
