"""Observes one hypervisor through a `Link`: connects for ever, looks, cross-checks, tells.

Threads: libvirt's own calls the session's callbacks (session.py); the source thread runs `Observer.run`;
look-ups run on threads and a connection of their own (lookups.py, asking.py). Which error is told, and by
whom, is decided in crosscheck.py.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event as StopEvent

from virtbus.errors import ConfigError, SourceDenied, SourceUnavailable
from virtbus.model import (
    Burst,
    Clock,
    Description,
    Device,
    DomainResumed,
    DomainState,
    Host,
    HostKnown,
    Now,
    SourceLost,
    SourceReady,
)
from virtbus.retry import Backoff
from virtbus.seen import MARGIN_SECONDS, Moment
from virtbus.sources import Sink, SourceOptions
from virtbus.sources.asking import HOST, Asker
from virtbus.sources.connecting import Opened, Opener
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
from virtbus.sources.lookups import Lookups
from virtbus.sources.questions import Want
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
from virtbus.sources.witness import Witness
from virtbus.telemetry import BlockJobFailed, SourceCutOff, SourceRegistered, Trouble, emit
from virtbus.words import GuestState

RECONNECT_CEILING_SECONDS = 2.0  # callbacks are back within 5 s after the daemon is
SNAPSHOT_SECONDS = 3.0  # what the first look could not see by then comes later
ALIVE_SECONDS = 5.0  # between two looks at a connection that nobody closed
POLL_SECONDS = 1.0  # how soon `stop` is seen
# How long a look for evidence lets its error go first: both want Python's lock and libvirtd.
LOOK_AFTER_SECONDS = 0.02
_IO_PAUSE_REASONS = (PAUSED_IOERROR, PAUSED_UNKNOWN)


@dataclass(slots=True)
class _Snapshot:
    """What the first look of a session found."""

    looks: dict[str, Look] = field(default_factory=dict)
    findings: list[Burst] = field(default_factory=list)


class Observer:
    """One hypervisor; all of `virtbus.sources.Source` but `probe`."""

    def __init__(
        self,
        connector: Connector,
        *,
        options: SourceOptions,
        clock: Callable[[], Now] | None = None,
    ) -> None:
        shared = self._shared = Shared(clock or Clock(), options.grace_seconds)
        self.clock, self.lock, self.check, self.cache = shared.clock, shared.lock, shared.check, shared.cache
        self._connector = connector
        self._options = options
        self._opener = Opener(connector)
        self._asker = Asker(shared, options.owner_rules)
        self._lookups = self._make_lookups()
        # Domains whose next look is to say what was missed since when (wall ns; None: not by old messages).
        self._reconciling: dict[str, int | None] = {}
        self._troubled: dict[str, float] = {}  # uuid → when to look at it (monotonic)
        since_ns = options.since_ns
        # The last moment that was seen for certain; what the hypervisor remembers is asked for from there on.
        self._since = None if since_ns is None else Moment.stamped(since_ns, shared.clock())
        self._facts: HostFacts | None = None
        self._ready_at: Moment | None = None
        self._ever_ready = False

    # ---- the Source contract

    def run(self, sink: Sink, stop: StopEvent) -> None:
        """Observe until `stop`; see Source."""
        backoff = Backoff("libvirt", ceiling=RECONNECT_CEILING_SECONDS)
        try:
            while not stop.is_set():
                session = Session(self._shared, sink, self._connector.uri)
                try:
                    opened = self._opener.open(session, stop)
                    if opened is None:
                        return
                    lost = self._observe(session, opened, sink, stop)
                except (SourceDenied, ConfigError) as error:
                    if not self._ever_ready:
                        raise
                    backoff.wait(stop, error)
                except SourceUnavailable as error:
                    backoff.wait(stop, error)
                else:
                    if lost is not None:
                        sink(lost)
                        backoff.reset()
                        backoff.wait(stop, lost.why)
                finally:
                    session.end()
        finally:
            self._lookups.close()

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
        session = Session(self._shared, lambda _observation: None)
        opened = self._opener.connect(None)
        try:
            snapshot = self._look_around(session, opened, StopEvent())
            return self._ready(session, opened, snapshot)
        finally:
            self._asker.session = None
            session.end()
            opened.link.close()
            self._lookups.close()
            self._lookups = self._make_lookups()

    # ---- one session

    def _observe(self, session: Session, opened: Opened, sink: Sink, stop: StopEvent) -> SourceLost | None:
        """From the first look to the loss of the connection; None when `stop` ended it.

        Raises SourceUnavailable when the connection is lost before the first look is done.
        """
        try:
            snapshot = self._look_around(session, opened, stop)
            if stop.is_set():
                return None
            with self.lock:
                ready = self._ready(session, opened, snapshot)
                session.since_listing = None
                session.tick = self.clock()  # a standstill from here on is noticed
                sink(ready)
            self._ever_ready = True
            hypervisor = ready.host.hypervisor
            emit(
                SourceRegistered(
                    self._connector.uri, hypervisor.libvirt_version, hypervisor.version, len(ready.domains)
                )
            )
            for domain in ready.domains:
                if domain.state == "running":
                    self._lookups.request(domain.uuid, Want.BASELINE)
            with Witness(session, self._shared, opened.link) as witness:
                closed = self._listen(session, opened.link, sink, stop, witness)
        finally:
            self._asker.session = None
            session.end()
            self._lookups.pause()
            opened.link.close()
        if closed is None:
            return None
        now = self.clock()
        silent = max(closed.silent_seconds, 0.0 if session.seen is None else now.boot - session.seen.boot)
        self._since = Moment.of(now, silent + MARGIN_SECONDS)
        emit(SourceCutOff(self._connector.uri, closed.why))
        lost_ns = now.wall_ns - int(closed.silent_seconds * 1e9)
        return SourceLost(lost_ns, closed.why, session.connection, closed.reason)

    def _listen(
        self, session: Session, link: Link, sink: Sink, stop: StopEvent, witness: Witness
    ) -> Closed | None:
        """Handle notes and timers until the connection is lost; None when `stop` ended it."""
        alive_at = self.clock().monotonic
        while not stop.is_set():
            note = self._next_note(session)
            if isinstance(note, Closed):
                return note
            stalled = witness.stalled(POLL_SECONDS)
            if stalled is not None:
                return stalled
            try:
                if note is not None:
                    self._handle(session, note, None)
                self._decide(session, sink)
                self._look_at_trouble()
            except Exception as error:  # noqa: BLE001 - one strange domain must not end the watch
                emit(Trouble("source", error))
            if self.clock().monotonic - alive_at >= ALIVE_SECONDS:
                alive_at = self.clock().monotonic
                if not link.alive():
                    return Closed("the connection is closed", ALIVE_SECONDS)
        return None

    def _next_note(self, session: Session) -> Note | None:
        wait = POLL_SECONDS
        with self.lock:
            moments = (self.check.next_due(), self.check.next_doubt())
        for moment in (*moments, min(self._troubled.values(), default=None), self._lookups.check()):
            if moment is not None:
                wait = min(wait, max(0.0, moment - self.clock().monotonic))
        try:
            return session.notes.get(timeout=wait) if wait > 0 else session.notes.get_nowait()
        except queue.Empty:
            return None

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
                if look.complete:
                    del self._reconciling[uuid]
                if snapshot is not None:
                    snapshot.looks[uuid] = look
                    snapshot.findings += found
                else:
                    session.tell(found)
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

    def _decide(self, session: Session, sink: Sink) -> None:
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
                    sink(DomainResumed(decision.bursts[0].raw.domain_uuid, now.wall_ns))

    # ---- the first look of a session

    def _look_around(self, session: Session, opened: Opened, stop: StopEvent) -> _Snapshot:
        """Registered already; now see what is there. Ends within SNAPSHOT_SECONDS, complete or not.

        Raises SourceUnavailable when the connection is lost meanwhile.
        """
        facts = opened.facts
        self._asker.begin(session, facts)
        here = frozenset(domain.uuid for domain in opened.domains)
        for entry in self.cache.active():
            if entry.uuid not in here:
                self.cache.gone(entry.uuid)
        with self.lock:
            self.check.slack_ns = 0 if facts.local else STAMP_SLACK_NS
            session.tell(self.check.keep_only(here))
            for domain in opened.domains:
                if domain.state == RUNNING and domain.uuid not in (session.since_listing or {}):
                    self.check.listed_running(domain.uuid)
        snapshot = _Snapshot()
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
        if self._asker.host_uuid is None:
            self._lookups.request(HOST, Want.HOST)
        self._lookups.resume()
        end = self.clock().monotonic + SNAPSHOT_SECONDS
        while not stop.is_set() and self.clock().monotonic < end:
            self._lookups.check()
            busy = self._lookups.busy()
            try:
                note = session.notes.get(timeout=0.02) if busy else session.notes.get_nowait()
            except queue.Empty:
                if busy:
                    continue
                break
            if isinstance(note, Closed):
                raise SourceUnavailable(f"{self._connector.uri}: {note.why}")
            self._handle(session, note, snapshot)
        return snapshot

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
        )

    def _host(self, facts: HostFacts) -> Host:
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
        )


def _state(number: int) -> str:
    return STATES.get(number, str(number))
