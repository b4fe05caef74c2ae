"""What is asked about one hypervisor's guests, and reported of them; all of it on the source thread.

Callbacks leave notes (session.py), and so do answers (lookups.py); which error is reported, and by whom, is
decided in crosscheck.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from virtbus.errors import SourceUnavailable
from virtbus.model import Device, Host, Hypervisor
from virtbus.observations import Burst, DomainResumed, DomainState, HostKnown, SourceReady
from virtbus.seen import Moment, boot_id, earliest
from virtbus.sources import Sink, SourceOptions
from virtbus.sources.crew import Crew, Opened
from virtbus.sources.evidence import STAMP_SLACK_NS, Look, disk_errors_by_alias
from virtbus.sources.link import (
    PAUSED,
    PAUSED_IOERROR,
    PAUSED_UNKNOWN,
    PAUSES,
    RESUMED,
    RUNNING,
    STARTED,
    STATE_AFTER,
    STATES,
    STOPPED,
    SUSPENDED,
    SUSPENDED_IOERROR,
    Connector,
    DomainAt,
    HostFacts,
)
from virtbus.sources.lookups import HOST, Asker, Lookups, Want
from virtbus.sources.session import (
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
from virtbus.telemetry import BlockJobFailed, TelemetryEvent, emit
from virtbus.words import GuestState

SNAPSHOT_SECONDS = 3.0  # what the first look could not see by then comes later
# How long a look for evidence lets its error go first: both want Python's lock and libvirtd.
LOOK_AFTER_SECONDS = 0.02
_IO_PAUSE_REASONS = (PAUSED_IOERROR, PAUSED_UNKNOWN)


class HypervisorKnown(TelemetryEvent):
    """the hypervisor's version is known"""

    uri: str
    hypervisor_version: str


@dataclass(slots=True)
class FirstLook:
    """What the first look of a connection found so far."""

    until: float  # monotonic
    looks: dict[str, Look] = field(default_factory=dict)
    findings: list[Burst] = field(default_factory=list)


class HostFound:
    """The host and its hypervisor, as far as the present connection has said."""

    def __init__(self, shared: Host | None) -> None:
        """`shared`: the host of several hypervisors, each of which is its own guests' alone."""
        self._shared = shared
        self._facts: HostFacts | None = None
        self.uuid: str | None = None
        self.hypervisor = Hypervisor()
        self.version_due = False  # nobody has asked this connection for its hypervisor's version yet

    def begin(self, facts: HostFacts) -> None:
        """A new connection: perhaps another hypervisor."""
        self._facts, self.hypervisor, self.version_due = facts, facts.hypervisor, True

    def answered(self, note: HostAnswered) -> None:
        """What had to be asked for by itself."""
        self.uuid = note.uuid or self.uuid
        self.hypervisor = replace(self.hypervisor, version=note.version or self.hypervisor.version)

    def host(self) -> Host:
        """As it is reported; of a shared one the guests' descriptions name the hypervisor."""
        if self._shared is not None:
            return self._shared
        facts = self._facts
        assert facts is not None
        boot = boot_id() if facts.local else None
        return Host(name=facts.name, uuid=self.uuid, boot_id=boot, hypervisor=self.hypervisor)


def _stands(domain: DomainAt) -> bool:
    """Whether it is paused, and may be by an I/O error."""
    return domain.state == PAUSED and domain.reason in _IO_PAUSE_REASONS


class Guests:
    """The guests of one hypervisor, over all its connections."""

    def __init__(self, shared: Shared, connector: Connector, crew: Crew, options: SourceOptions) -> None:
        self._clock, self._lock, self._check = shared.clock, shared.lock, shared.check
        self._cache, self._clocks = shared.cache, shared.clocks
        self._many = options.host is not None  # one hypervisor among others on its host
        self.on = HostFound(options.host)
        self._asker = Asker(shared, options.owner_rules)
        self._lookups = Lookups(
            connector,
            self._asker.ask,
            crew,
            in_flight=options.lookups_in_flight,
            deadline=options.lookup_deadline_seconds,
            clock=lambda: self._clock().monotonic,
            idle=math.inf if options.idle_seconds is None else options.idle_seconds,
        )
        # Domains whose next look is to say what was missed since when (None: not by old messages).
        self.reconciling: dict[str, Moment | None] = {}
        self._troubled: dict[str, float] = {}  # uuid → when to look at it (monotonic)
        self._vanished: list[str] = []  # were there before the connection was lost, and are not
        self._first: FirstLook | None = None
        self._ready_at: Moment | None = None

    # ---- the connection comes and goes

    def look_around(self, session: Session, opened: Opened, since: Moment | None) -> None:
        """Registered already; now ask what is there. `looked` within SNAPSHOT_SECONDS, complete or not.

        What the hypervisor remembers is asked for from `since` on.
        """
        facts = opened.facts
        self.on.begin(facts)
        self._asker.begin(session, facts)
        here = frozenset(domain.uuid for domain in opened.domains)
        self._vanished = [uuid for uuid in self._vanished if uuid not in here]  # of a look that was cut off
        for entry in self._cache.active():
            if entry.uuid not in here:
                self._cache.gone(entry.uuid)
                if self._many:
                    self._vanished.append(entry.uuid)
        with self._lock:
            self._check.slack_ns = 0 if facts.local else STAMP_SLACK_NS
            session.tell(self._check.keep_only(here))
            for domain in opened.domains:
                if domain.state == RUNNING and domain.uuid not in (session.since_listing or {}):
                    self._check.listed_running(domain.uuid)
        self._first = FirstLook(self._clock().monotonic + SNAPSHOT_SECONDS)
        unanswered, self.reconciling, self._troubled = self.reconciling, {}, {}
        for domain in sorted(opened.domains, key=_stands, reverse=True):  # they are what this is about
            self._cache.saw(domain.uuid, domain.name, domain.id, _state(domain.state))
            want = Want.DESCRIPTION
            # What an earlier connection asked and never got an answer to is still to be answered.
            moments = [each for each in (since, unanswered.get(domain.uuid)) if each is not None]
            if _stands(domain) or (moments and facts.keeps_messages):
                want |= Want.TROUBLE
                self.reconciling[domain.uuid] = earliest(*moments) if moments else None
            self._lookups.request(domain.uuid, want)
        if not self._many:
            self.ask_version()
            if self.on.uuid is None:
                self._lookups.request(HOST, Want.HOST)
        self._lookups.resume()

    def looked(self, session: Session) -> bool:
        """Whether the first look is over. Raises SourceUnavailable when the connection is lost meanwhile."""
        assert self._first is not None
        while True:
            self._lookups.check()
            busy = self._lookups.busy()
            handled = False
            while (note := session.notes.next()) is not None:
                if isinstance(note, Closed):
                    raise SourceUnavailable(f"{session.connection}: {note.why}")
                self.handle(session, note)
                handled = True
            if self._clock().monotonic >= self._first.until:
                return True
            if not handled:
                return not busy

    def tell_ready(self, session: Session, opened: Opened, appeared_ns: int | None) -> SourceReady:
        """Report the first look; from now on each answer is reported as it comes."""
        with self._lock:  # no callback falls between
            ready = self.ready(session, opened, appeared_ns)
            session.first_look_is_over(ready)
        for uuid in self._vanished:
            session.tell([self._check.left(uuid, ready.at_ns)])
        self._first, self._vanished = None, []
        for domain in ready.domains:
            if domain.state == GuestState.RUNNING:
                self._lookups.request(domain.uuid, Want.BASELINE)
        return ready

    def ready(self, session: Session, opened: Opened, appeared_ns: int | None) -> SourceReady:
        """The first look as it stands now; the lock is held."""
        assert self._first is not None
        since, looks, findings = session.since_listing or {}, self._first.looks, list(self._first.findings)
        now = self._clock()
        self._ready_at = Moment.of(now)
        states = {}
        for domain in opened.domains:
            uuid, look = domain.uuid, looks.get(domain.uuid)
            by_error = domain.state == PAUSED and domain.reason == PAUSED_IOERROR
            if by_error and look is None and uuid not in since:
                # The listing itself is reported, whatever becomes of the look; that refines it.
                alias = self._cache.only_disk(uuid)
                findings += self._check.listed(
                    uuid, domain.name, domain.id, alias=alias, mono=now.monotonic, ns=now.wall_ns
                )
            by_error = by_error if look is None else look.paused_by_io_error
            state, aliases = _state(domain.state), self._cache.aliases(uuid)
            states[uuid] = DomainState(uuid, domain.name, state, by_error, aliases, domain.id)
        for uuid, said in since.items():
            old = states.pop(uuid, None)
            if said is None:
                continue
            name, number, state = said
            look = looks.get(uuid)
            still = state == GuestState.PAUSED and look is not None and look.paused_by_io_error
            aliases = self._cache.aliases(uuid) if old is None else old.aliases
            states[uuid] = DomainState(uuid, name, state, still, aliases, number)
        return SourceReady(
            host=self.on.host(),
            at_ns=now.wall_ns,
            domains=tuple(states.values()),
            findings=tuple(findings),
            connection=session.connection,
            proves=True,
            whole=not self._many,
            appeared_ns=appeared_ns,
            booted_ns=self._ready_at.booted_ns,
        )

    def leave(self) -> None:
        """The connection is let go of."""
        self._cache.doubt(self._clock().monotonic)
        self._first, self._asker.session = None, None
        self._lookups.pause()

    def gone(self, sink: Sink) -> None:
        """The hypervisor is gone for good: so are its guests."""
        for entry in self._cache.active():
            with self._lock:
                for burst in self._check.gone(entry.uuid):
                    sink(burst)
                sink(self._check.left(entry.uuid, self._clock().wall_ns))
            self._cache.gone(entry.uuid)

    def ask_version(self) -> None:
        """Ask for the hypervisor's version: a daemon that was never asked probes its QEMU for it."""
        self.on.version_due = False
        self._lookups.request(HOST, Want.VERSION)

    def missed(self, uuid: str) -> None:
        """Somebody asked for a description that the cache does not have."""
        session = self._asker.session
        if session is not None and self._cache.may_ask(uuid, self._clock().monotonic):
            session.notes.put(Changed(uuid))

    # ---- notes

    def handle(self, session: Session, note: Note) -> None:
        """Do what a note asks for."""
        if isinstance(note, Lifecycle):
            self._on_lifecycle(note)
        elif isinstance(note, Changed):
            self._lookups.request(note.uuid, Want.DESCRIPTION)
        elif isinstance(note, LookAt):
            self._look_at(note.uuid, at_once=self._first is not None)
        elif isinstance(note, Looked):
            self._on_look(session, note)
        elif isinstance(note, Baseline):
            entry = self._cache.get(note.uuid)
            if entry is not None:
                wrong = disk_errors_by_alias(note.disk_errors, entry.devices)
                with self._lock:
                    self._check.baseline(entry.uuid, entry.name, entry.number, wrong)
        elif isinstance(note, Described):
            with self._lock:
                session.described(note.uuid)
        elif isinstance(note, JobFailed):
            entry = self._cache.get(note.uuid)
            emit(BlockJobFailed(note.uuid if entry is None else entry.name, note.disk))
        elif isinstance(note, HostAnswered):
            self.on.answered(note)
            if note.version is not None:
                emit(HypervisorKnown(session.connection, note.version))
            if self._first is None and not self._many:
                session.tell([HostKnown(self.on.host(), self._clock().wall_ns)])
        elif isinstance(note, Undecodable):
            for entry in self._cache.active():
                self.reconciling.setdefault(entry.uuid, self._ready_at)
                self._lookups.request(entry.uuid, Want.TROUBLE)

    def _on_lifecycle(self, note: Lifecycle) -> None:
        uuid, event = note.uuid, note.event
        if event == STOPPED:
            self._cache.gone(uuid)
            self._lookups.forget(uuid)
            self.reconciling.pop(uuid, None)
            self._troubled.pop(uuid, None)
        elif event in STATE_AFTER:
            fresh = self._cache.saw(uuid, note.name, note.number, STATE_AFTER[event])
            if fresh or event == STARTED:
                self._lookups.request(uuid, Want.DESCRIPTION)
            if event == RESUMED:  # what QEMU keeps of an unseen pause, the next one is not blamed for
                self._lookups.request(uuid, Want.BASELINE)
            if event == SUSPENDED and note.detail in PAUSES:
                with self._lock:
                    has_event = note.detail == SUSPENDED_IOERROR and self._check.is_told(uuid)
                # Without an event only a look while the guest is paused shows that it was a disk, and which.
                self._look_at(uuid, at_once=self._first is not None or not has_event)

    def _on_look(self, session: Session, note: Looked) -> None:
        uuid, look = note.uuid, note.look
        entry = self._cache.get(uuid)
        if entry is None:
            return
        now = self._clock()
        resumed = DomainResumed(uuid, now.wall_ns)
        with self._lock:
            if not session.live:
                return
            found, over = list[Burst](), list[DomainResumed]()
            if uuid in self.reconciling:
                since = self.reconciling[uuid]
                stamps = None if since is None else self._clocks.stamps(since, now, ours=self._asker.local)
                found = self._check.reconcile(
                    uuid, entry.name, entry.number, look, entry.devices,
                    stamps=stamps, mono=now.monotonic, ns=now.wall_ns,
                )  # fmt: skip
                # The guest was resumed while it was looked at: what was found stands, and is over.
                if session.resumed_at.get(uuid, -math.inf) >= look.asked_at:
                    self._check.resumed(uuid)
                    over = [resumed] if found else []
                if look.complete:
                    del self.reconciling[uuid]
            found += self._check.looked(uuid, look, entry.devices)  # what it says of others comes behind
            if self._first is None:
                session.tell([*found, *over])
                session.described(uuid)
            else:
                self._first.looks[uuid] = look
                self._first.findings += found
            if self._check.runs(uuid, look):
                session.tell([resumed])

    # ---- looks and decisions that are due

    def work(self, session: Session) -> None:
        """Report what is decided by now, and look at whoever is in trouble."""
        self._decide(session)
        now = self._clock().monotonic
        with self._lock:
            doubtful = self._check.doubtful(now)
        for uuid in (*(uuid for uuid, at in self._troubled.items() if at <= now), *doubtful):
            self._look_at(uuid, at_once=True)

    def next_due(self) -> float:
        """When to call `work` again at the latest (monotonic); math.inf: not until a note comes."""
        with self._lock:
            moments = [self._check.next_due(), self._check.next_doubt()]
        moments += [min(self._troubled.values(), default=None), self._lookups.check()]
        return min((moment for moment in moments if moment is not None), default=math.inf)

    def _look_at(self, uuid: str, *, at_once: bool) -> None:
        """Look at a guest's trouble: `at_once` where the look may find an error that no event reported.

        With the description: no event reports a snapshot, and the blame must not fall on an old image.
        """
        if at_once:
            self._troubled.pop(uuid, None)
            self._lookups.request(uuid, Want.TROUBLE | Want.DESCRIPTION)
        else:
            self._troubled.setdefault(uuid, self._clock().monotonic + LOOK_AFTER_SECONDS)

    def _decide(self, session: Session) -> None:
        now = self._clock()
        with self._lock:
            due = self._check.next_due()
            if due is None or due > now.monotonic:
                return
            devices: dict[str, Mapping[str, Device]] = {}
            for uuid in self._check.undecided():
                entry = self._cache.get(uuid)
                devices[uuid] = {} if entry is None else entry.devices
            for decision in self._check.due(now.monotonic, devices):
                session.tell(decision.bursts)
                if decision.bursts:
                    session.described(decision.bursts[0].raw.domain_uuid)
                if decision.over and any(burst.count for burst in decision.bursts):
                    # The pause is reported after its end: say again that it is over.
                    session.tell([DomainResumed(decision.bursts[0].raw.domain_uuid, now.wall_ns)])


def _state(number: int) -> str:
    return STATES.get(number, str(number))
