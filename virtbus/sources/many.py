"""Observes many hypervisors of one host, each behind a socket that comes and goes.

A look finds the sockets that a pattern names. Each gets an Observer of its own (connect, look, loss,
return); one source thread drives them all, so that one that hangs blinds nobody. inotify says when to look
again, and a slow look finds what inotify missed.
"""

from __future__ import annotations

import os
import queue
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from virtbus.config import Discover
from virtbus.errors import SourceUnavailable, VirtbusError
from virtbus.model import Check, Clock, Host, Hypervisor, Now
from virtbus.observations import Description, SourceReady, StoodStill, Surveyed
from virtbus.retry import Backoff
from virtbus.seen import Moment, WallClocks, boot_id, stalled_words
from virtbus.sources import Sink, SourceOptions
from virtbus.sources.crew import Crew, Pulse
from virtbus.sources.libvirt import LibvirtConnector
from virtbus.sources.link import Connector, Handler, Link, NobodyListens
from virtbus.sources.observer import POLL_SECONDS, Observer
from virtbus.sources.sockets import Identity, Watch, look, one_each, serves, unreadable
from virtbus.telemetry import TelemetryEvent, Trouble, emit
from virtbus.words import GuestState

LOOK_SECONDS = 30.0  # between two looks for sockets of which inotify said nothing
LEAST_SECONDS = 0.2  # between two looks, however often inotify says something
SURVEY_SECONDS = 30.0  # a survey of the guests waits no longer for sockets that were there at the start
ASK_SECONDS = 1.0  # at most so long one daemon is waited for before the next is asked for its hypervisor
SOON = 4  # refusals in a row: a daemon binds its socket a moment before it listens, and this one does not …
STALE_SECONDS = 300.0  # … nor after RESTART_SECONDS: it is gone; another makes a new socket
FIRST_SECONDS = 0.05
RESTART_SECONDS = 30.0  # a daemon without a socket, or on whose nobody listens, may be about to start again
CEILING_SECONDS = 15.0
# Questions and keepalives wake libvirt's loop for each of a hundred connections. A daemon that hangs is
# given up after KEEPALIVE_SECONDS * (KEEPALIVE_COUNT + 1); the gap begins where it last answered.
QUIET_SECONDS, IDLE_SECONDS = 30.0, 2.0
KEEPALIVE_SECONDS, KEEPALIVE_COUNT = 30, 2

KUBEVIRT = "/var/lib/kubelet/pods/*/volumes/kubernetes.io~empty-dir/libvirt-runtime/virtqemud-sock"
PRESETS = {"kubevirt": (KUBEVIRT,)}


def patterns(settings: Discover) -> tuple[str, ...]:
    """The patterns of sockets that the settings name."""
    preset = PRESETS[settings.preset] if settings.preset is not None else ()
    return (*preset, *settings.sockets)


class SocketConnector:
    """Connects to one socket by its path, however long that is, and to that very socket."""

    def __init__(self, path: str, template: str, options: SourceOptions) -> None:
        self.uri = path
        self._in_pod = path.endswith(KUBEVIRT.partition("*")[2])
        self.appeared_ns: int | None = None
        self._template = template
        self._options = options

    @contextmanager
    def _short(self) -> Iterator[str]:
        """A name short enough for a Unix address, of what the path names now; never through a link."""
        try:
            descriptor = os.open(self.uri, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise SourceUnavailable(f"{self.uri}: {error.strerror}") from error
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISSOCK(status.st_mode):
                raise SourceUnavailable(f"{self.uri} is not a socket")
            # The first one counts until somebody lets us in: a change of rights stamps it again, and so does
            # a daemon that starts under its running guest.
            self.appeared_ns = min(self.appeared_ns or status.st_ctime_ns, status.st_ctime_ns)
            yield f"/proc/self/fd/{descriptor}"
        finally:
            os.close(descriptor)

    def open(self, handler: Handler | None) -> Link:
        """See Connector."""
        with self._short() as name:
            address = self._template.replace("{socket}", name)
            connector = LibvirtConnector(address, self._options, in_company=self._in_pod)
            connector.uri = self.uri
            return connector.open(handler)


class FoldersClosed(TelemetryEvent, level="error"):
    """folders can't be read: what has its socket below them is not observed"""

    folders: str


@dataclass(slots=True, eq=False)
class Member:
    """One socket's hypervisor."""

    observer: Observer
    identity: Identity | None
    due: float = float("-inf")
    refused: int = 0
    gone_at: float | None = None  # its socket is not there: when its daemon counts as gone (monotonic)
    settled: bool = False  # looked at, or known to be of no use: the survey need not wait for it
    backoff: Backoff | None = None

    def retry(self, why: Exception | str) -> float:
        """Seconds until the next attempt."""
        if isinstance(why, NobodyListens):
            self.refused += 1
            if self.refused > SOON:
                self.settled = True
                return STALE_SECONDS
            return RESTART_SECONDS if self.refused == SOON else FIRST_SECONDS * float(3**self.refused)
        self.refused = 0
        self.backoff = self.backoff or Backoff("libvirt", ceiling=CEILING_SECONDS)
        return self.backoff.plan(why)


class ManySource:
    """Every hypervisor of the host that a pattern finds; see `virtbus.sources.Source`."""

    def __init__(
        self,
        settings: Discover,
        *,
        options: SourceOptions,
        uri: str | None = None,
        clock: Callable[[], Now] | None = None,
        connector: Callable[[str], Connector] | None = None,
    ) -> None:
        """`uri`: a hypervisor that is observed as well."""
        self.clock = clock or Clock()
        self._patterns = patterns(settings)
        host = node(settings)
        keepalive = max(KEEPALIVE_SECONDS, options.keepalive_interval_seconds)
        self._options = replace(
            options, host=host, quiet_seconds=QUIET_SECONDS, idle_seconds=IDLE_SECONDS,
            keepalive_interval_seconds=keepalive, keepalive_count=KEEPALIVE_COUNT,
            lookups_in_flight=min(2, options.lookups_in_flight),
        )  # fmt: skip
        self._host = host
        self._uri = uri
        self._connector = connector or (lambda path: SocketConnector(path, settings.uri, self._options))
        self._crew = Crew(clock=lambda: self.clock().monotonic)
        self._clocks = WallClocks()
        self._members: dict[str, Member] = {}
        self._pulse = Pulse(self.clock())
        self._asked: Observer | None = None  # whose hypervisor's version was asked for last, and when
        self._asked_at = float("-inf")
        self._woken: queue.SimpleQueue[Member | None] = queue.SimpleQueue()  # None: look for sockets
        self._look_at = float("-inf")
        self._looked_at = float("-inf")
        self._before: Moment | None = None  # when we looked before; None: never
        self._survey_at = float("inf")  # when sockets that have not answered are left out of it
        self._unreached: frozenset[str] | None = None  # that the last survey left out; None: there was none
        self._closed: frozenset[str] = frozenset()  # folders that may have sockets, and can't be read
        self._closed_at = float("-inf")  # when they are looked for

    # ---- the Source contract

    def run(self, sink: Sink, stop: threading.Event) -> None:
        """See Source. A socket that refuses us does not end it: another one may not."""
        watch = Watch(lambda: self._woken.put(None))
        self._pulse = Pulse(self.clock())
        self._look_at = self._closed_at = float("-inf")
        self._before = None
        self._survey_at, self._unreached = self.clock().monotonic + SURVEY_SECONDS, None
        try:
            while not stop.is_set():
                self._step(sink, watch)
                self._wait()
                stood = self._pulse.beat(self.clock(), POLL_SECONDS)
                if stood is not None:
                    self._stood_still(sink, stood)
        finally:
            for member in self._members.values():
                member.observer.end()
            self._members = {}
            watch.close()

    def describe(self, domain_uuid: str) -> Description | None:
        """See Source. Of several that know the domain, the one which has it now, and runs it."""
        observers = [each.observer for each in list(self._members.values())]
        known = [each for each in observers if each.cache.get(domain_uuid) is not None]
        if not known:
            return None

        def likeliness(observer: Observer) -> tuple[bool, bool, bool]:
            entry = observer.cache.present(domain_uuid)
            runs = entry is not None and entry.state == GuestState.RUNNING
            return entry is not None, observer.connected, runs

        observer = max(reversed(known), key=likeliness)  # the one that came last, where nothing else decides
        found = observer.describe(domain_uuid)
        return found and replace(
            found, connection=observer.connection, hypervisor=observer.guests.on.hypervisor
        )

    def snapshot(self) -> SourceReady:
        """See Source: what all sockets that answer have."""
        ready = [self._observer(path, None).snapshot() for path in one_each(look(self._patterns))]
        return SourceReady(
            host=self._host,
            at_ns=self.clock().wall_ns,
            domains=tuple(domain for each in ready for domain in each.domains),
            findings=tuple(finding for each in ready for finding in each.findings),
        )

    def probe(self) -> Sequence[Check]:
        """See Source: how many sockets there are, and how many of their daemons answer."""
        where = ", ".join(self._patterns)
        found = sorted(one_each(look(self._patterns)))
        if not found:
            return [
                Check("libvirt", "warning", f"no socket matches {where}",
                      "none is expected on a node without guests; else see that the folders are mounted here "
                      "and may be entered by this user")
            ]  # fmt: skip
        results: queue.SimpleQueue[VirtbusError | None] = queue.SimpleQueue()

        def attempt(path: str) -> None:
            try:
                self._connector(path).open(None).close()
            except VirtbusError as error:
                results.put(error)
            else:
                results.put(None)

        for path in found:
            self._crew.run(lambda path=path: attempt(path))  # type: ignore[misc]
        errors: list[VirtbusError] = []
        answered = 0
        with suppress(queue.Empty):
            for _ in found:
                error = results.get(timeout=5.0)
                errors += [] if error is None else [error]
                answered += error is None
        silent = len(found) - answered - len(errors)
        words = f"{answered} of {len(found)} sockets answer ({where})"
        words += f"; {silent} say nothing" if silent else ""
        refused = [error for error in errors if not isinstance(error, NobodyListens)]
        words += f"; {refused[0]}" if refused else ""
        well = answered or (not silent and not refused)
        status = "ok" if well and not silent and not refused else "warning" if well else "failed"
        return [
            Check("libvirt", status, words, "" if status == "ok" else "see docs/kubevirt.md, Rights",
                  0 if well else SourceUnavailable.exit_code)
        ]  # fmt: skip

    # ---- one step

    def _wait(self) -> None:
        """Until something is due, or somebody wakes us; then all who did are due."""
        now = self.clock().monotonic
        crew = self._crew.check()
        due = min([now + POLL_SECONDS, self._look_at, *(each.due for each in self._members.values())])
        wait = (due if crew is None else min(due, crew)) - now
        with suppress(queue.Empty):
            item = self._woken.get(timeout=wait) if wait > 0 else self._woken.get_nowait()
            while True:
                if item is None:
                    self._look_at = min(self._look_at, self._looked_at + LEAST_SECONDS)
                else:
                    item.due = float("-inf")
                item = self._woken.get_nowait()

    def _step(self, sink: Sink, watch: Watch) -> None:
        reading = self.clock()
        self._clocks.follow(reading)
        now = reading.monotonic
        if now >= self._look_at:
            if now >= self._closed_at:
                self._closed_at = now + LOOK_SECONDS
                self._find_closed()
            self._looked_at, self._look_at = now, now + LOOK_SECONDS
            self._found(look(self._patterns, watch.add), sink)
            self._before = Moment.of(reading)
        for path, member in list(self._members.items()):
            if member.due > now:
                continue
            try:
                member.due = member.observer.step()
            except VirtbusError as error:  # refused, before it ever let us in
                member.due = now + member.retry(error)
            except Exception as error:  # noqa: BLE001 - one strange daemon must not blind us to the others
                emit(Trouble(f"source {path}", error))
                member.due = now + member.retry(error)
            if member.observer.connected:
                member.settled, member.refused, member.backoff = True, 0, None
            elif member.gone_at is not None:
                if now >= member.gone_at:
                    self._remove(path)
                else:
                    member.due = min(member.due, member.gone_at)
        self._ask_version(now)
        self._survey(sink)

    def _stood_still(self, sink: Sink, seconds: float) -> None:
        sink(StoodStill(self._pulse.last.wall_ns, stalled_words(seconds), self._pulse.before))
        for member in self._members.values():
            member.observer.stood_still(seconds)
            member.due = float("-inf")

    def _ask_version(self, now: float) -> None:
        """Of one hypervisor after another: the question may cost its daemon half a second of a core.

        Where a daemon is slow the next one's turn comes after ASK_SECONDS.
        """
        asked = self._asked
        is_waited_for = asked is not None and asked.connected and asked.guests.on.hypervisor.version is None
        if is_waited_for and now < self._asked_at + ASK_SECONDS:
            return
        waiting = (each.observer for each in self._members.values())
        self._asked = next((each for each in waiting if each.connected and each.guests.on.version_due), None)
        if self._asked is not None:
            self._asked.guests.ask_version()
            self._asked_at = now

    def _find_closed(self) -> None:
        closed = unreadable(self._patterns)
        if closed and closed != self._closed:
            emit(FoldersClosed(", ".join(sorted(closed))))
        self._closed = closed

    def _found(self, sockets: dict[str, Identity], sink: Sink) -> None:
        """The sockets that are there now: new ones are tried, replaced ones at once, others' ends noticed."""
        kept = {path for path, each in self._members.items() if each.observer.ever_ready}
        wanted: dict[str, Identity | None] = dict(one_each(sockets, kept))
        if self._uri is not None:  # what it reaches already would count each error twice
            wanted = {path: each for path, each in wanted.items() if not serves(self._uri, Path(path))}
            wanted[self._uri] = None
        for path, identity in wanted.items():
            member = self._members.get(path)
            if member is None:
                self._members = {**self._members, path: self._member(path, identity, sink)}
            elif member.identity != identity:
                member.identity, member.refused, member.backoff = identity, 0, None
                member.settled = False  # that was the one before
                member.observer.retry_now()
                member.due = float("-inf")
            member = self._members[path]
            member.gone_at = None
        for path, member in list(self._members.items()):
            if path in wanted:
                continue
            if path in sockets and not member.observer.ever_ready:
                self._remove(path)  # its daemon is observed by its other socket
            else:
                # Its daemon may still talk to us, and one that starts again takes the old socket away first;
                # with the folder the whole pod is gone.
                wait = RESTART_SECONDS if Path(path).parent.is_dir() else 0.0
                at = self._looked_at + wait
                member.gone_at = at if member.gone_at is None else min(at, member.gone_at)
                member.due = float("-inf")

    def _member(self, path: str, identity: Identity | None, sink: Sink) -> Member:
        made: list[Member] = []
        observer = self._observer(path, lambda why: made[0].retry(why))  # noqa: PLW0108 - it is made below
        made.append(Member(observer, identity))
        observer.begin(sink, lambda: self._woken.put(made[0]), self._pulse)
        return made[0]

    def _observer(self, path: str, retry: Callable[[Exception | str], float] | None) -> Observer:
        if path == self._uri:
            connector: Connector = LibvirtConnector(path, self._options)
        else:
            connector = self._connector(path)
        return Observer(
            connector, options=self._options, clock=self.clock, crew=self._crew, retry=retry,
            absent=self._before, clocks=self._clocks,
        )  # fmt: skip

    def _remove(self, path: str) -> None:
        """Its socket is gone and it reports nothing more: a pod has ended."""
        members = dict(self._members)
        member = members.pop(path)
        self._members = members
        if member.observer.ever_ready:
            member.observer.gone()
        member.observer.end()

    def _survey(self, sink: Sink) -> None:
        """What no connection has is gone: reported once the sockets of the start were looked at.

        One that hangs is left out after SURVEY_SECONDS, or it would keep the incidents of all guests that
        ended while nobody looked open. When it was looked at, or is gone, that is reported again.
        """
        now = self.clock()
        unsettled = [each.observer.connection for each in self._members.values() if not each.settled]
        unreached = self._closed.union(unsettled)
        if self._unreached is None:
            if unsettled and now.monotonic < self._survey_at:
                return
        else:  # of those that were left out, or lie in a folder that was
            known = self._unreached
            unreached = frozenset(
                each
                for each in unreached
                if each in known or any(each.startswith(f"{folder}/") for folder in known)
            )
            if known <= unreached:
                self._unreached = unreached
                return
        self._unreached = unreached
        domains = [entry.uuid for each in self._members.values() for entry in each.observer.cache.active()]
        sink(Surveyed(now.wall_ns, self._host, frozenset(domains), unreached))


def node(settings: Discover) -> Host:
    """The host whose guests these are: named by the settings, by default as the kernel is."""
    return Host(name=settings.host or os.uname().nodename, boot_id=boot_id(), hypervisor=Hypervisor())
