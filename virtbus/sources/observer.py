"""Observes one hypervisor through a `Link`: connects for ever, looks, cross-checks, tells.

Threads: libvirt's own calls the `Handler` (microseconds, no libvirt call, no log line); the source thread
runs `Observer.run`; look-ups run on threads and a connection of their own. What goes to the sink goes
under one lock, so that an error never changes sides with a resume.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event as StopEvent
from typing import TypeAlias

from virtbus.errors import ConfigError, SchemaError, SourceDenied, SourceUnavailable
from virtbus.model import (
    Burst,
    Clock,
    Description,
    Device,
    DeviceRemoved,
    DomainGone,
    DomainResumed,
    DomainState,
    Host,
    Now,
    RawIoError,
    SourceLost,
    SourceReady,
)
from virtbus.retry import Backoff
from virtbus.sources import Sink, SourceOptions, domain_xml
from virtbus.sources.cache import Cache
from virtbus.sources.crosscheck import CrossCheck, Verdict
from virtbus.sources.link import (
    DISK_ERROR_NO_SPACE,
    PAUSED,
    PAUSED_IOERROR,
    PAUSED_UNKNOWN,
    RESUMED,
    STARTED,
    STATES,
    STOPPED,
    STOPPED_MIGRATED,
    SUSPENDED,
    SUSPENDED_IOERROR,
    SUSPENDED_PAUSED,
    Connector,
    DomainAt,
    HostFacts,
    Link,
    NoSuchDomain,
    Space,
    Unsupported,
)
from virtbus.sources.looks import FreeSpace, Look, disk_errors_by_alias, read_messages
from virtbus.sources.lookups import Lookups, Want
from virtbus.telemetry import DomainUnreadable, LookupFinished, SourceCutOff, SourceRegistered, Trouble, emit

RECONNECT_CEILING_SECONDS = 2.0  # callbacks are back within 5 s after the daemon is
OPEN_SECONDS = 30.0  # then an attempt to connect is given up (its thread ends when its call does)
OPENING_LIMIT = 4  # attempts that hang at the same time
SNAPSHOT_SECONDS = 3.0  # what the first look could not see by then comes later
ALIVE_SECONDS = 5.0  # between two looks at a connection that nobody closed
POLL_SECONDS = 1.0  # how soon `stop` is seen
# virDomainEventType → virDomainState's word
_STATE_AFTER = {
    STARTED: "running",
    SUSPENDED: "paused",
    RESUMED: "running",
    STOPPED: "shut off",
    6: "shutting down",
    7: "pmsuspended",
}
_PAUSES = (SUSPENDED_IOERROR, SUSPENDED_PAUSED)
_IO_PAUSE_REASONS = (PAUSED_IOERROR, PAUSED_UNKNOWN)
_HOST = ""  # the look-up key of what is no domain's


# ------------------------------------------------------------------------- what the source thread gets


@dataclass(frozen=True, slots=True)
class _Lifecycle:
    uuid: str
    name: str
    number: int | None
    event: int
    detail: int


@dataclass(frozen=True, slots=True)
class _Changed:
    uuid: str


@dataclass(frozen=True, slots=True)
class _LookAt:
    uuid: str


@dataclass(frozen=True, slots=True)
class _Looked:
    uuid: str
    look: Look


@dataclass(frozen=True, slots=True)
class _Baseline:
    uuid: str
    disk_errors: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class _Undecodable:
    pass


@dataclass(frozen=True, slots=True)
class _Closed:
    why: str
    silent_seconds: float = 0.0


_Note: TypeAlias = _Lifecycle | _Changed | _LookAt | _Looked | _Baseline | _Undecodable | _Closed


@dataclass(slots=True)
class _Opened:
    """A connection whose callbacks are registered, and what was there then."""

    link: Link
    facts: HostFacts
    domains: Sequence[DomainAt]


@dataclass(slots=True)
class _Snapshot:
    """What the first look of a session found."""

    looks: dict[str, Look] = field(default_factory=dict)
    findings: list[Burst] = field(default_factory=list)


class _Session:
    """The callbacks of one connection. Deaf once it is over: each registration tells at most once."""

    def __init__(self, observer: Observer, sink: Sink) -> None:
        self.notes: queue.SimpleQueue[_Note] = queue.SimpleQueue()
        self.heard_ns = 0
        # What lifecycle callbacks said since the listing: (name, state), None when it left. Then None.
        self.since_listing: dict[str, tuple[str, str] | None] | None = {}
        self.live = True
        self._observer = observer
        self._sink = sink

    def io_error(self, raw: RawIoError) -> None:
        """Tell it at once; see Handler."""
        now = self._now()
        observer = self._observer
        uuid, alias = raw.domain_uuid, raw.alias
        with observer.lock:
            if not self.live:
                return
            verdict = observer.check.event(raw, now.monotonic)
            self._sink(raw if verdict is not Verdict.KNOWN else observer.check.known(raw))
        if verdict is Verdict.TELL_AND_LOOK:
            self.notes.put(_LookAt(uuid))
        if not observer.cache.knows(uuid, alias):
            if observer.cache.get(uuid) is None:
                observer.cache.saw(uuid, raw.domain_name, raw.domain_id, "running")
            if observer.cache.may_ask(uuid, now.monotonic):
                self.notes.put(_Changed(uuid))

    def lifecycle(self, uuid: str, name: str, number: int | None, event: int, detail: int) -> None:
        """Tell what resolves, remember what pauses; see Handler."""
        now = self._now()
        check = self._observer.check
        with self._observer.lock:
            if not self.live:
                return
            if event == RESUMED:
                check.resumed(uuid)
                self._sink(DomainResumed(uuid, now.wall_ns))
            elif event == SUSPENDED and detail in _PAUSES:
                check.suspended(
                    uuid,
                    name,
                    number,
                    by_io_error=detail == SUSPENDED_IOERROR,
                    mono=now.monotonic,
                    ns=now.wall_ns,
                )
            elif event in (STOPPED, STARTED):
                for burst in check.gone(uuid):
                    self._sink(burst)
                if event == STOPPED:
                    cause = "migrated" if detail == STOPPED_MIGRATED else "domain_stopped"
                    self._sink(DomainGone(uuid, now.wall_ns, cause))
            if self.since_listing is not None and event in _STATE_AFTER:
                self.since_listing[uuid] = (name, _STATE_AFTER[event]) if event != STOPPED else None
        self.notes.put(_Lifecycle(uuid, name, number, event, detail))

    def device_removed(self, uuid: str, alias: str) -> None:
        """See Handler."""
        now = self._now()
        with self._observer.lock:
            if self.live:
                self._sink(DeviceRemoved(uuid, alias, now.wall_ns))
        self.notes.put(_Changed(uuid))

    def changed(self, uuid: str) -> None:
        """See Handler."""
        self._now()
        self.notes.put(_Changed(uuid))

    def undecodable(self) -> None:
        """See Handler."""
        self.notes.put(_Undecodable())

    def closed(self, why: str, silent_seconds: float) -> None:
        """See Handler."""
        self.notes.put(_Closed(why, silent_seconds))

    def tell(self, bursts: Sequence[Burst]) -> None:
        """Tell findings; the observer's lock is held."""
        for burst in bursts:
            self._sink(burst)

    def end(self) -> None:
        """Hear nothing any more."""
        with self._observer.lock:
            self.live = False

    def _now(self) -> Now:
        now = self._observer.clock()
        self.heard_ns = now.wall_ns
        return now


class Observer:
    """One hypervisor; all of `virtbus.sources.Source` but `probe`."""

    def __init__(
        self,
        connector: Connector,
        *,
        options: SourceOptions,
        clock: Callable[[], Now] | None = None,
    ) -> None:
        self.clock = clock or Clock()
        self.lock = threading.Lock()  # around `check` and the sink
        self.check = CrossCheck(options.grace_seconds)
        self.cache = Cache()
        self._connector = connector
        self._options = options
        self._lookups = self._make_lookups()
        self._session: _Session | None = None
        self._facts: HostFacts | None = None
        self._host_uuid: str | None = None
        self._messages_offered = True
        self._reconciling: set[str] = set()
        self._since_ns = options.since_ns
        self._ever_ready = False
        self._hanging_opens: list[threading.Thread] = []

    # ---- the Source contract

    def run(self, sink: Sink, stop: StopEvent) -> None:
        """Observe until `stop`; see Source."""
        backoff = Backoff("libvirt", ceiling=RECONNECT_CEILING_SECONDS)
        try:
            while not stop.is_set():
                session = _Session(self, sink)
                try:
                    opened = self._open(session, stop)
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
        session = self._session
        if session is not None and self.cache.may_ask(domain_uuid, self.clock().monotonic):
            session.notes.put(_Changed(domain_uuid))
        return None

    def snapshot(self) -> SourceReady:
        """One look; see Source."""
        session = _Session(self, lambda _observation: None)
        opened = self._connect(None)
        self._session = session
        try:
            snapshot = self._look_around(session, opened, StopEvent())
            return self._ready(session, opened, snapshot)
        finally:
            self._session = None
            session.end()
            opened.link.close()
            self._lookups.close()
            self._lookups = self._make_lookups()

    # ---- connecting

    def _connect(self, session: _Session | None) -> _Opened:
        """Open, register, list. May block for ever."""
        link = self._connector.open(session)
        try:
            return _Opened(link, link.facts(), link.domains())
        except BaseException:
            link.close()
            raise

    def _open(self, session: _Session, stop: StopEvent) -> _Opened | None:
        """`_connect` on a thread that is left behind when it hangs; None when `stop` came first.

        A daemon that is frozen lets a client connect and then says nothing, before keepalive begins.
        """
        self._hanging_opens = [thread for thread in self._hanging_opens if thread.is_alive()]
        if len(self._hanging_opens) >= OPENING_LIMIT:
            raise SourceUnavailable(
                f"{self._connector.uri}: {OPENING_LIMIT} attempts to connect hang; is libvirtd frozen?"
            )
        results: queue.SimpleQueue[_Opened | Exception] = queue.SimpleQueue()
        given_up = threading.Event()

        def attempt() -> None:
            try:
                opened = self._connect(session)
            except Exception as error:  # noqa: BLE001 - it is raised on the other side
                results.put(error)
                return
            results.put(opened)
            if given_up.is_set():
                opened.link.close()

        thread = threading.Thread(target=attempt, name="virtbus-connect", daemon=True)
        thread.start()
        end = time.monotonic() + OPEN_SECONDS
        result: _Opened | Exception | None = None
        while result is None and not stop.is_set() and time.monotonic() < end:
            try:
                result = results.get(timeout=POLL_SECONDS / 2)
            except queue.Empty:
                continue
        if result is None:
            given_up.set()
            session.end()
            self._hanging_opens.append(thread)
            if stop.is_set():
                return None
            raise SourceUnavailable(
                f"{self._connector.uri} did not answer within {OPEN_SECONDS:.0f} s; is libvirtd frozen?"
            )
        if isinstance(result, Exception):
            raise result
        return result

    # ---- one session

    def _observe(self, session: _Session, opened: _Opened, sink: Sink, stop: StopEvent) -> SourceLost | None:
        """From the first look to the loss of the connection; None when `stop` ended it.

        Raises SourceUnavailable when the connection is lost before the first look is done.
        """
        self._session = session
        try:
            snapshot = self._look_around(session, opened, stop)
            if stop.is_set():
                return None
            with self.lock:
                ready = self._ready(session, opened, snapshot)
                session.since_listing = None
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
            closed = self._listen(session, opened.link, sink, stop)
        finally:
            self._session = None
            session.end()
            self._lookups.pause()
            opened.link.close()
        if closed is None:
            return None
        silent_since = self.clock().wall_ns - int(closed.silent_seconds * 1e9)
        self._since_ns = max(session.heard_ns, silent_since)
        emit(SourceCutOff(self._connector.uri, closed.why))
        return SourceLost(self._since_ns, closed.why)

    def _listen(self, session: _Session, link: Link, sink: Sink, stop: StopEvent) -> _Closed | None:
        """Handle notes and timers until the connection is lost; None when `stop` ended it."""
        alive_at = time.monotonic()
        while not stop.is_set():
            note = self._next_note(session)
            if isinstance(note, _Closed):
                return note
            try:
                if note is not None:
                    self._handle(session, note, None)
                self._decide(session, sink)
            except Exception as error:  # noqa: BLE001 - one strange domain must not end the watch
                emit(Trouble("source", error))
            if time.monotonic() - alive_at >= ALIVE_SECONDS:
                alive_at = time.monotonic()
                if not link.alive():
                    return _Closed("the connection is closed", ALIVE_SECONDS)
        return None

    def _next_note(self, session: _Session) -> _Note | None:
        wait = POLL_SECONDS
        with self.lock:
            due = self.check.next_due()
        for moment in (due, self._lookups.check()):
            if moment is not None:
                wait = min(wait, max(0.0, moment - self.clock().monotonic))
        try:
            return session.notes.get(timeout=wait) if wait > 0 else session.notes.get_nowait()
        except queue.Empty:
            return None

    def _handle(self, session: _Session, note: _Note, snapshot: _Snapshot | None) -> None:
        if isinstance(note, _Lifecycle):
            self._on_lifecycle(note)
        elif isinstance(note, _Changed):
            self._lookups.request(note.uuid, Want.DESCRIPTION)
        elif isinstance(note, _LookAt):
            self._lookups.request(note.uuid, Want.TROUBLE)
        elif isinstance(note, _Looked):
            self._on_look(session, note, snapshot)
        elif isinstance(note, _Baseline):
            entry = self.cache.get(note.uuid)
            if entry is not None:
                wrong = disk_errors_by_alias(note.disk_errors, entry.devices)
                with self.lock:
                    self.check.baseline(entry.uuid, entry.name, entry.number, wrong)
        elif isinstance(note, _Undecodable):
            for entry in self.cache.active():
                self._reconciling.add(entry.uuid)
                self._lookups.request(entry.uuid, Want.TROUBLE)

    def _on_lifecycle(self, note: _Lifecycle) -> None:
        uuid, event = note.uuid, note.event
        if event == STOPPED:
            self.cache.gone(uuid)
            self._lookups.forget(uuid)
            self._reconciling.discard(uuid)
        elif event in _STATE_AFTER:
            fresh = self.cache.saw(uuid, note.name, note.number, _STATE_AFTER[event])
            want = Want.DESCRIPTION if fresh or event == STARTED else Want.NOTHING
            if event == SUSPENDED and note.detail in _PAUSES:
                want |= Want.TROUBLE
            if want:
                self._lookups.request(uuid, want)

    def _on_look(self, session: _Session, note: _Looked, snapshot: _Snapshot | None) -> None:
        uuid, look = note.uuid, note.look
        entry = self.cache.get(uuid)
        if entry is None:
            return
        now = self.clock()
        with self.lock:
            if uuid in self._reconciling:
                self._reconciling.discard(uuid)
                found = self.check.reconcile(
                    uuid,
                    entry.name,
                    entry.number,
                    look,
                    entry.devices,
                    since_ns=self._since_ns,
                    mono=now.monotonic,
                    ns=now.wall_ns,
                )
                if snapshot is not None:
                    snapshot.looks[uuid] = look
                    snapshot.findings += found
                else:
                    session.tell(found)
            session.tell(self.check.looked(uuid, look, entry.devices))

    def _decide(self, session: _Session, sink: Sink) -> None:
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

    def _look_around(self, session: _Session, opened: _Opened, stop: StopEvent) -> _Snapshot:
        """Registered already; now see what is there. Ends within SNAPSHOT_SECONDS, complete or not.

        Raises SourceUnavailable when the connection is lost meanwhile.
        """
        facts = self._facts = opened.facts
        self._messages_offered = facts.keeps_messages
        here = frozenset(domain.uuid for domain in opened.domains)
        for entry in self.cache.active():
            if entry.uuid not in here:
                self.cache.gone(entry.uuid)
        with self.lock:
            session.tell(self.check.keep_only(here))
        snapshot = _Snapshot()
        self._reconciling = set()
        # Guests in trouble first: they are what this is about.
        for paused in (True, False):
            for domain in opened.domains:
                if paused is not (domain.state == PAUSED and domain.reason in _IO_PAUSE_REASONS):
                    continue
                self.cache.saw(domain.uuid, domain.name, domain.id, _state(domain.state))
                want = Want.DESCRIPTION
                if paused or (self._since_ns is not None and facts.keeps_messages):
                    want |= Want.TROUBLE
                    self._reconciling.add(domain.uuid)
                self._lookups.request(domain.uuid, want)
        if self._host_uuid is None:
            self._lookups.request(_HOST, Want.HOST)
        self._lookups.resume()
        end = time.monotonic() + SNAPSHOT_SECONDS
        while not stop.is_set() and time.monotonic() < end:
            self._lookups.check()
            busy = self._lookups.busy()
            try:
                note = session.notes.get(timeout=0.02) if busy else session.notes.get_nowait()
            except queue.Empty:
                if busy:
                    continue
                break
            if isinstance(note, _Closed):
                raise SourceUnavailable(f"{self._connector.uri}: {note.why}")
            self._handle(session, note, snapshot)
        return snapshot

    def _ready(self, session: _Session, opened: _Opened, snapshot: _Snapshot) -> SourceReady:
        """The first look as it stands now; the lock is held, so that no callback falls between."""
        since = session.since_listing or {}
        states = {}
        for domain in opened.domains:
            look = snapshot.looks.get(domain.uuid)
            by_error = domain.state == PAUSED and domain.reason == PAUSED_IOERROR
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
            still = state == "paused" and look is not None and look.paused_by_io_error
            aliases = self.cache.aliases(uuid) if old is None else old.aliases
            states[uuid] = DomainState(uuid, name, state, still, aliases)
        return SourceReady(
            host=self._host(opened.facts),
            at_ns=self.clock().wall_ns,
            domains=tuple(states.values()),
            findings=tuple(snapshot.findings),
            throttles=opened.facts.throttles,
        )

    def _host(self, facts: HostFacts) -> Host:
        boot_id = None
        if facts.local:
            try:
                boot_id = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
            except OSError:
                boot_id = None
        return Host(name=facts.name, uuid=self._host_uuid, boot_id=boot_id, hypervisor=facts.hypervisor)

    # ---- look-ups; on their own threads

    def _make_lookups(self) -> Lookups:
        return Lookups(
            self._connector,
            self._ask,
            in_flight=self._options.lookups_in_flight,
            deadline=self._options.lookup_deadline_seconds,
            clock=lambda: self.clock().monotonic,
        )

    def _ask(self, link: Link, uuid: str, want: Want) -> None:
        """One look-up: what is wanted of a domain goes to the cache and to the session's notes."""
        try:
            if want & Want.HOST:
                self._host_uuid = domain_xml.host_uuid(link.capabilities())
            if want & Want.DESCRIPTION:
                self._read(link, uuid)
            session = self._session
            if want & Want.TROUBLE and session is not None:
                session.notes.put(_Looked(uuid, self._look(link, uuid)))
            if want & Want.BASELINE and session is not None:
                session.notes.put(_Baseline(uuid, link.disk_errors(uuid)))
        except NoSuchDomain:
            return  # its end is on its way to us
        except SchemaError as error:
            emit(DomainUnreadable(uuid or "the host", error))

    def _read(self, link: Link, uuid: str) -> None:
        try:
            xml = domain_xml.parse(link.xml(uuid), owner_rules=self._options.owner_rules)
        except SchemaError as error:
            self.cache.read(uuid, None)
            emit(DomainUnreadable(uuid, error))
        else:
            self.cache.read(uuid, xml)

    def _look(self, link: Link, uuid: str) -> Look:
        asked_at = self.clock().monotonic
        state, reason = link.state(uuid)
        look = Look(state, reason, asked_at=asked_at)
        if self._messages_offered:
            try:
                look = replace(look, messages=read_messages(link.messages(uuid)))
            except Unsupported:
                self._messages_offered = False
            except NoSuchDomain:
                raise
            except SourceUnavailable as error:
                emit(LookupFinished("failed", uuid, error))
        if state == PAUSED:
            # Only of a paused guest: of one that runs it tells of what is over.
            try:
                look = replace(look, disk_errors=link.disk_errors(uuid))
            except NoSuchDomain:
                raise
            except SourceUnavailable as error:
                emit(LookupFinished("failed", uuid, error))
        return self._with_space(link, uuid, look)

    def _with_space(self, link: Link, uuid: str, look: Look) -> Look:
        """For devices that report no space: what their images and file systems have."""
        entry = self.cache.get(uuid)
        devices = {} if entry is None else entry.devices
        with self.lock:
            aliases = self.check.out_of_space(uuid)
        targets = {device.target for alias, device in devices.items() if alias in aliases}
        targets |= {t for t, code in (look.disk_errors or {}).items() if code == DISK_ERROR_NO_SPACE}
        spaces: dict[str, Space] = {}
        free: dict[str, FreeSpace] = {}
        for target in targets - {None}:
            assert target is not None
            try:
                spaces[target] = link.space(uuid, target)
            except SourceUnavailable:
                continue
            source = next((d.source for d in devices.values() if d.target == target), None)
            if source is not None and source.type == "file" and self._facts is not None and self._facts.local:
                left = _free_space(source.path or "", spaces[target])
                if left is not None:
                    free[target] = left
        return replace(look, spaces=spaces, free=free)


def _free_space(path: str, space: Space) -> FreeSpace | None:
    """What the file system of an image has left, if the path means the same file here as for the guest.

    In a container the same path may be another file, or none.
    """
    if not path.startswith("/"):
        return None
    try:
        image = Path(path).stat()
        if space.physical not in (image.st_size, image.st_blocks * 512):
            return None
        found = os.statvfs(path)
    except OSError:
        return None
    return FreeSpace(found.f_bavail * found.f_frsize, path)


def _state(number: int) -> str:
    return STATES.get(number, str(number))
