"""Observes one hypervisor through a `Link`: connects for ever, notices losses, hands notes to guests.py.

Threads: libvirt's own calls the session's callbacks (session.py); the source thread calls `Observer.step`;
look-ups run on threads and a connection of their own (lookups.py), and whatever else may never
return on the crew's (crew.py).
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from contextlib import suppress
from threading import Event as StopEvent

from virtbus.errors import ConfigError, SourceDenied, SourceUnavailable
from virtbus.model import Clock, Now
from virtbus.observations import Description, Observation, SourceGone, SourceLost, SourceReady
from virtbus.retry import Backoff
from virtbus.seen import MARGIN_SECONDS, Moment, WallClocks
from virtbus.sources import Sink, SourceOptions
from virtbus.sources.crew import Crew, Opened, Opener, Opening, Pulse, Witness, after
from virtbus.sources.guests import Guests
from virtbus.sources.link import Connector, Link
from virtbus.sources.session import Closed, Session, Shared
from virtbus.telemetry import SourceCutOff, SourceRegistered, Trouble, emit

RECONNECT_CEILING_SECONDS = 2.0  # callbacks are back within 5 s after the daemon is
ALIVE_SECONDS = 5.0  # between two looks whether libvirt closed it without telling; silence is keepalive's
POLL_SECONDS = 1.0  # how soon `stop` is seen
LOOK_POLL_SECONDS = 0.02  # how soon the end of a first look is seen where its last answer failed or is late
NOTES_A_STEP = 64


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
        absent: Moment | None = None,
        clocks: WallClocks | None = None,
    ) -> None:
        """`retry`: why the hypervisor is away → seconds until it is tried again (a short backoff).

        `absent`: a moment at which its socket was not there yet, if any is known.
        """
        self._many = options.host is not None  # one among others on its host
        connection = connector.uri if self._many else ""
        shared = self._shared = Shared(clock or Clock(), options.grace_seconds, clocks, connection)
        self.clock, self.check, self.cache = shared.clock, shared.check, shared.cache
        self._connector = connector
        self._options = options
        self._crew = crew or Crew(clock=lambda: self.clock().monotonic)
        self._opener = Opener(connector, self._crew, 1 if self._many else None)
        self.guests = Guests(shared, connector, self._crew, options)
        self._backoff = Backoff("libvirt", ceiling=RECONNECT_CEILING_SECONDS)
        self._retry = retry
        self._absent = absent
        since_ns = options.since_ns
        # The last moment that was seen for certain; what the hypervisor remembers is asked for from there on.
        self._since = None if since_ns is None else Moment.stamped(since_ns, shared.clock())
        self.ever_ready = False
        # Where it stands: no session (waiting to retry), opening, opened and looking around, listening.
        self._session: Session | None = None
        self._opening: Opening | None = None
        self._opened: Opened | None = None
        self._witness: Witness | None = None
        self._alive_at = self._retry_at = float("-inf")
        self._sink: Sink = _nobody
        self._pulse = Pulse(self.clock())
        self._wake: Callable[[], None] = _nothing
        self._awake = False

    # ---- the Source contract

    def run(self, sink: Sink, stop: StopEvent) -> None:
        """Observe until `stop`; see Source."""
        bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        pulse = Pulse(self.clock())
        self.begin(sink, lambda: bell.put(None), pulse)
        try:
            while not stop.is_set():
                due = self.step()
                wait = min(POLL_SECONDS, due - self.clock().monotonic)
                with suppress(queue.Empty):
                    if wait > 0:
                        bell.get(timeout=wait)
                stood = pulse.beat(self.clock(), POLL_SECONDS)
                if stood is not None:
                    self.stood_still(stood)
        finally:
            self.end()

    def describe(self, domain_uuid: str) -> Description | None:
        """From the cache; see Source."""
        entry = self.cache.get(domain_uuid)
        if entry is not None and entry.description is not None:
            return entry.description
        self.guests.missed(domain_uuid)
        return None

    def snapshot(self) -> SourceReady:
        """One look; see Source."""
        session = self._session = Session(self._shared, _nobody, self._connector.uri)
        try:
            self._opened = self._opener.connect(None)
            self.guests.look_around(session, self._opened, self._since)
            while not self.guests.looked(session):
                StopEvent().wait(LOOK_POLL_SECONDS)
            return self.guests.ready(session, self._opened, self._appeared_ns())
        finally:
            self.end()

    # ---- the steps

    @property
    def connected(self) -> bool:
        """Whether it listens."""
        return self._witness is not None

    def begin(self, sink: Sink, wake: Callable[[], None], pulse: Pulse) -> None:
        """To be called first; `wake` is called from any thread when there is something to do.

        `pulse`: of the thread that calls `step`, which beats at least once in POLL_SECONDS.
        """
        self._sink, self._wake, self._pulse = sink, wake, pulse

    def step(self) -> float:
        """Do what is due, without waiting → when to come again at the latest (monotonic).

        Raises SourceDenied or ConfigError, and nothing else, before the first look.
        """
        self._awake = False
        self._shared.clocks.follow(self.clock())
        try:
            return self._step()
        except (SourceDenied, ConfigError) as error:
            if not self.ever_ready:
                self.end()
                raise
            return self._away(error)
        except SourceUnavailable as error:
            return self._away(error)

    def end(self) -> None:
        """Let go of the session, wherever it stands."""
        session, opened, opening = self._session, self._opened, self._opening
        self._session = self._opened = self._opening = self._witness = None
        if session is not None:
            session.end()
        if opening is not None:
            opening.give_up()
        self.guests.leave()
        if opened is not None:
            opened.link.close()

    def retry_now(self) -> None:
        """Another daemon listens: try it at once, whatever the one before did."""
        self._opener.forget()
        self._backoff.reset()
        self._retry_at = float("-inf")
        if self._opened is None and self._session is not None:
            self.end()

    def stood_still(self, seconds: float) -> None:
        """The process stood still, says the pulse: what was reported meanwhile may be lost."""
        if self._session is not None and self.connected:
            self._cut_off(self._pulse.closed(self._session, seconds))

    def gone(self) -> None:
        """The hypervisor is gone for good, and so are its guests."""
        left = frozenset(entry.uuid for entry in self.cache.active())
        self._sink(SourceGone(self.clock().wall_ns, self._connector.uri, left))
        self.guests.gone(self._sink)

    # ---- inside

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
            self.guests.look_around(session, self._opened, self._since)
        if self._witness is None:
            if not self.guests.looked(session):
                return now + LOOK_POLL_SECONDS
            self._witness = self._begin_to_listen(session, self._opened)
        return self._listen(session, self._opened.link, self._witness)

    def _begin_to_listen(self, session: Session, opened: Opened) -> Witness:
        ready = self.guests.tell_ready(session, opened, self._appeared_ns())
        self.ever_ready = True
        libvirt_version = self.guests.on.hypervisor.libvirt_version
        emit(SourceRegistered(self._connector.uri, libvirt_version, len(ready.domains)))
        now = self.clock()
        self._alive_at = after(now.monotonic, self._alive_seconds)
        return Witness(session, opened.link, self._crew, now, self._options.quiet_seconds)

    def _appeared_ns(self) -> int | None:
        """Since when the daemon may have been there, by the wall clock as it is now; None: always.

        A socket's stamp says so only of one that was seen to come, by a clock that was not set meanwhile.
        """
        stamp, now = self._connector.appeared_ns, self.clock()
        if stamp is None or self._absent is None:
            return None
        return stamp if self._absent.at(now) is self._absent else self._absent.wall(now)

    @property
    def connection(self) -> str:
        """What `SourceReady` and all else that is reported calls this hypervisor's connection."""
        return self._connector.uri

    @property
    def _alive_seconds(self) -> float:
        return self._options.quiet_seconds or ALIVE_SECONDS

    def _listen(self, session: Session, link: Link, witness: Witness) -> float:
        """Handle notes and timers; notes beyond NOTES_A_STEP wait until others had their turn."""
        for _ in range(NOTES_A_STEP):
            note = session.notes.next()
            if isinstance(note, Closed):
                return self._closed(session, note)
            try:
                if note is not None:
                    self.guests.handle(session, note)
                self.guests.work(session)
            except Exception as error:  # noqa: BLE001 - one strange domain must not end the watch
                emit(Trouble("source", error))
            if note is None:
                break
        else:
            return self.clock().monotonic
        now = self.clock()
        if now.monotonic >= self._alive_at:
            self._alive_at = after(now.monotonic, self._alive_seconds)
            if not link.alive():
                return self._closed(session, Closed("the connection is closed", self._alive_seconds))
        due = min(self._alive_at, witness.step(now), self.guests.next_due())
        crew = self._crew.check()
        return due if crew is None else min(due, crew)

    def _away(self, why: Exception | str) -> float:
        self.end()
        self._retry_at = self.clock().monotonic + (self._retry or self._backoff.plan)(why)
        return self._retry_at

    def _closed(self, session: Session, closed: Closed) -> float:
        return self._cut_off(self._pulse.why(session, closed, self.clock(), POLL_SECONDS))

    def _cut_off(self, closed: Closed) -> float:
        """The connection is lost: report it, and try again soon."""
        assert self._session is not None
        session = self._session
        self.end()
        now = self.clock()
        seen = session.seen
        unheard = now.boot - seen.boot
        # As the clock was then: it may have been set since, and the hypervisor's stamps are of either.
        self._since = Moment.of(seen, max(0.0, closed.silent_seconds - unheard) + MARGIN_SECONDS)
        emit(SourceCutOff(self._connector.uri, closed.why))
        lost = Moment.of(now, closed.silent_seconds)
        domains, why = None, closed.why
        if self._many:  # the gap is of these guests alone, and says whose socket it was
            domains, why = (
                frozenset(entry.uuid for entry in self.cache.active()),
                f"{self._connector.uri}: {why}",
            )
        self._sink(SourceLost(lost.wall_ns, why, session.connection, closed.reason, domains, lost.booted_ns))
        self._backoff.reset()
        return self._away(closed.why)


def _nobody(_observation: Observation) -> None:
    """A sink that nobody listens to."""


def _nothing() -> None:
    """Wake nobody."""
