"""A model of libvirtd and its guests, with what was measured of them; behind `virtbus.sources.link`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Protocol

from tests.sim.runtime import Process, Scheduler, Virtual
from virtbus.errors import SourceUnavailable
from virtbus.model import Hypervisor as Versions
from virtbus.observations import RawIoError
from virtbus.sources.link import (
    ACTION_PAUSE,
    ACTION_REPORT,
    DEFINED,
    DISK_ERROR_UNSPECIFIED,
    PAUSED,
    PAUSED_IOERROR,
    PAUSED_UNKNOWN,
    RESUMED,
    RUNNING,
    STARTED,
    STOPPED,
    STOPPED_MIGRATED,
    SUSPENDED,
    SUSPENDED_IOERROR,
    SUSPENDED_PAUSED,
    UNDEFINED,
    DomainAt,
    Handler,
    HostFacts,
    NoSuchDomain,
    Space,
    Unsupported,
)

SHUTDOWN, SHUTDOWN_HOST, STOPPED_DESTROYED = 6, 2, 1  # virDomainEventType and details of a destroyed guest
DEFINED_RENAMED, UNDEFINED_RENAMED = 2, 1
MIGRATED = 1  # the detail of STARTED, SUSPENDED and RESUMED
PAUSED_USER = 1  # virDomainPausedReason: by an operator; an error's too, once the guest is migrated
KEEPALIVE_SECONDS = 20.0  # then a client gives up a daemon that says nothing
DISKS = {"virtio-disk0": ("vda", "a"), "virtio-disk1": ("vdb", "b")}  # alias → target, end of its path
ALIASES = tuple(DISKS)
SECRET = "c4n4ry-s3cr3t"  # it stands where secrets stand in a domain's description, and may leave nowhere
SYSTEMS = tuple(f"10.{60 + number}.0.7" for number in range(3))  # monitors of storage clusters


@dataclass
class Quirks:
    """How a release of libvirt and QEMU behaves."""

    name: str
    libvirt: str
    qemu: str
    loses_unnamed: bool  # the event of a network disk without a name never comes (libvirt up to 9.0)
    late: float  # up to so many seconds an event may come behind its pause (QEMU 9.2 and later)
    keeps_messages: bool  # the last reported error of each image (libvirt 11.1 and later)

    def latest(self) -> float:
        """One in ten comes behind a busy daemon, too."""
        return 4 * self.late


BOOKWORM = Quirks("bookworm", "9.0.0", "7.2.0", loses_unnamed=True, late=0.0, keeps_messages=False)
TRIXIE = Quirks("trixie", "11.3.0", "10.0.0", loses_unnamed=False, late=0.8, keeps_messages=True)
FORKY = Quirks("forky", "12.8.0", "11.1.0", loses_unnamed=False, late=0.3, keeps_messages=True)
RELEASES = {quirks.name: quirks for quirks in (BOOKWORM, TRIXIE, FORKY)}


@dataclass(frozen=True)
class Error:
    """One error that the simulation made: the truth."""

    host: str
    uuid: str
    alias: str
    at: float
    pauses: bool
    named: bool  # the event said which device it was
    kept: bool  # libvirt keeps a message of it that says when it was
    hidden: bool = False  # its event never comes, and another one explains the pause


@dataclass(frozen=True)
class Stood:
    """A guest was paused by an I/O error."""

    host: str
    uuid: str
    begin: float
    end: float
    listed: bool  # a listing says why


@dataclass
class Guest:
    """One domain; its second disk may be a network disk without a name, or both may be on shared storage."""

    uuid: str
    name: str
    number: int
    unnamed: bool = False
    systems: Mapping[str, int] = field(default_factory=dict)  # alias → which of SYSTEMS
    state: int = RUNNING
    reason: int = 1
    disk_errors: dict[str, int] = field(default_factory=dict)
    messages: dict[tuple[str, int], str] = field(default_factory=dict)  # (target, image) → what libvirt keeps
    copying: set[str] = field(default_factory=set)  # aliases with a block job: their events name no device
    hangs_until: float = 0.0
    stands_since: float = 0.0
    here: bool = True
    unplugged: set[str] = field(default_factory=set)  # aliases
    snapshots: dict[str, int] = field(default_factory=dict)  # alias → how many were made of it

    def path(self, alias: str) -> str:
        end = DISKS[alias][1] + ".snap" * self.snapshots.get(alias, 0)
        if alias in self.systems:
            return f"vms/{self.name}-{end}"
        return "" if self.is_unnamed(alias) else f"/img/{self.name}-{end}"

    def is_unnamed(self, alias: str) -> bool:
        return self.unnamed and alias == "virtio-disk1"

    @property
    def xml(self) -> str:
        disks = ""
        for alias, (target, _) in DISKS.items():
            if alias in self.unplugged:
                continue
            kind, source = "file", f"<source file='{self.path(alias)}'/>"
            if alias in self.systems:
                address = SYSTEMS[self.systems[alias]]
                kind = "network"
                source = (
                    f"<source protocol='rbd' name='{self.path(alias)}'>"
                    f"<host name='{address}' port='6789'/></source>"
                    f"<auth username='x'><secret type='ceph' usage='{SECRET}'/></auth>"
                )
            elif self.is_unnamed(alias):
                kind = "network"
                source = f"<source protocol='https' query='token={SECRET}'><host name='s' port='1'/></source>"
            disks += (
                f"<disk type='{kind}' device='disk'>{source}<target dev='{target}' bus='virtio'/>"
                f"<alias name='{alias}'/></disk>"
            )
        return (
            f"<domain id='{self.number}'><name>{self.name}</name><uuid>{self.uuid}</uuid>"
            f"<devices>{disks}<graphics type='vnc' passwd='{SECRET}'/></devices></domain>"
        )


class Hypervisor(Protocol):
    """What guests run on, with one daemon or with many."""

    guests: dict[str, Guest]
    away: dict[str, list[tuple[float, float]]]  # uuid → when it was shut off
    failing_until: float  # looks fail

    @property
    def quirks(self) -> Quirks: ...
    @property
    def works(self) -> bool: ...
    @property
    def links(self) -> Sequence[ModelLink]: ...
    @property
    def errors(self) -> Sequence[Error]: ...
    @property
    def stood(self) -> Sequence[Stood]: ...
    def restart(self, seconds: float) -> None: ...
    def die(self, stalls: float, seconds: float) -> None: ...
    def hang(self, seconds: float) -> None: ...
    def error(self, guest: Guest, alias: str, *, pause: bool, events: int = 1) -> None: ...
    def hide(self, guest: Guest, alias: str) -> None: ...
    def suspend(self, guest: Guest) -> None: ...
    def resume(self, guest: Guest) -> None: ...
    def leave(self, guest: Guest) -> None: ...
    def enter(self, guest: Guest) -> None: ...
    def rename(self, guest: Guest, name: str) -> None: ...
    def unplug(self, guest: Guest, alias: str) -> None: ...
    def plug(self, guest: Guest, alias: str) -> None: ...
    def lifecycle(self, guest: Guest, event: int, detail: int) -> None: ...
    def take(self, guest: Guest) -> None: ...
    def give(self, guest: Guest, to: Hypervisor) -> Guest: ...


class Daemon:
    """libvirtd of one host, and the guests, which outlive it."""

    def __init__(self, sched: Scheduler, virtual: Virtual, host: str, quirks: Quirks) -> None:
        self.sched, self.virtual, self.host, self.quirks = sched, virtual, host, quirks
        self.uri = f"qemu+{host}:///system"
        self.appeared_ns: int | None = None
        self.guests: dict[str, Guest] = {}
        self.links: list[ModelLink] = []
        self.up = True
        self.hung_since: float | None = None
        self.failing_until = 0.0  # looks fail
        self.errors: list[Error] = []
        self.away: dict[str, list[tuple[float, float]]] = {}  # uuid → when it was shut off
        self.stood: list[Stood] = []

    @property
    def works(self) -> bool:
        """Whether it does what it is told to."""
        return self.up and self.hung_since is None

    # ---- what happens to it

    def restart(self, seconds: float) -> None:
        """Every connection ends; nobody listens for so long."""
        self.up, self.hung_since = False, None
        for link in list(self.links):
            link.cut("End of file while reading data", 0.0)
        self.sched.sleep(seconds)
        self.up = True

    def die(self, stalls: float, seconds: float) -> None:
        """It stands still and then ends: what it had not sent is lost, and nobody is told since when."""
        self.hung_since = self.sched.now
        self.sched.sleep(stalls)
        self.restart(seconds)

    def hang(self, seconds: float) -> None:
        """It says nothing for so long; a client gives up after a while, and tries again."""
        self.hung_since = since = self.sched.now
        end = since + seconds
        if seconds > KEEPALIVE_SECONDS:
            self.sched.sleep(KEEPALIVE_SECONDS)
            for link in list(self.links):
                link.cut("the daemon did not answer keepalive", KEEPALIVE_SECONDS)
        self.sched.sleep(end - self.sched.now)
        self.hung_since = None
        for link in list(self.links):
            link.flush()

    # ---- what guests do

    def error(self, guest: Guest, alias: str, *, pause: bool, events: int = 1) -> None:
        """A request of the guest fails; QEMU reports it and, by its policy, stops the guest."""
        lost = self.quirks.loses_unnamed and guest.is_unnamed(alias)
        if lost:  # libvirt reports nothing; what is promised is that a pause is told
            events = 1 if pause else 0
        hidden = lost and guest.state != RUNNING  # a look in time shows it
        kept = self.quirks.keeps_messages and not pause and self.works  # by a daemon that hears of it
        if kept:
            self._keep(guest, alias)
        first = len(self.errors)
        for _ in range(events):
            named = alias not in guest.copying and not lost
            self.errors.append(
                Error(self.host, guest.uuid, alias, self.sched.now, pause, named, kept, hidden)
            )
        late = self.quirks.latest() * self.sched.random.random() if self.sched.random.random() < 0.5 else 0.0
        if self.sched.random.random() < 0.9:
            late = min(late, self.quirks.late)
        if not pause:
            late = 0.0
        told = RawIoError(
            guest.uuid,
            guest.name,
            guest.number,
            "" if alias in guest.copying else guest.path(alias),
            "" if alias in guest.copying else alias,
            ACTION_PAUSE if pause else ACTION_REPORT,
            "",
            0,
        )
        if pause:
            guest.disk_errors[DISKS[alias][0]] = DISK_ERROR_UNSPECIFIED

        def tell() -> None:
            if not self.links:  # the guest has ended, and its daemon with it: what is known is its pause
                self._hide(range(first + 1, first + events))
            for _ in range(0 if lost else events):
                self._tell(lambda handler: handler.io_error(told._replace(observed_at=self._wall())))

        if not late:
            tell()
        if pause and guest.state == RUNNING:
            guest.state, guest.reason = PAUSED, PAUSED_UNKNOWN if late else PAUSED_IOERROR
            guest.stands_since = self.sched.now
            detail = SUSPENDED_PAUSED if late else SUSPENDED_IOERROR
            self.lifecycle(guest, SUSPENDED, detail)
        if late:
            self.sched.spawn(lambda: (self.sched.sleep(late), tell())[0], self.sched.world)

    def hide(self, guest: Guest, alias: str) -> None:
        """Another disk's error came in the same pause: an event that is lost leaves nothing to infer it from.

        But for a look at a guest that stands for long enough.
        """
        if self.quirks.loses_unnamed and guest.is_unnamed(alias):
            its = [n for n, each in enumerate(self.errors) if (each.uuid, each.alias) == (guest.uuid, alias)]
            self._hide(its[-1:])

    def _hide(self, which: Iterable[int]) -> None:
        for number in which:
            self.errors[number] = replace(self.errors[number], hidden=True)

    def _keep(self, guest: Guest, alias: str) -> None:
        """libvirt keeps one message an image: the top one's first, its backing's behind it."""
        target = DISKS[alias][0]
        at = datetime.fromtimestamp(self._wall() / 1e9, UTC)
        image = self.sched.random.choice((1, 2))
        guest.messages[target, image] = (
            f"I/O error: disk='{target}', index='{image}', path='x', "
            f"timestamp='{at:%Y-%m-%d %H:%M:%S.%f}+0000', message='Input/output error'"
        )

    def suspend(self, guest: Guest) -> None:
        """An operator pauses it; what stands already stays as it is."""
        if guest.here and guest.state == RUNNING:
            guest.state, guest.reason = PAUSED, PAUSED_USER
            self.lifecycle(guest, SUSPENDED, SUSPENDED_PAUSED)

    def resume(self, guest: Guest) -> None:
        if guest.state == PAUSED:
            self._stood(guest)
            guest.state, guest.reason = RUNNING, 5
            self.lifecycle(guest, RESUMED, 0)

    def _stood(self, guest: Guest) -> None:
        if guest.state == PAUSED and guest.reason in (PAUSED_IOERROR, PAUSED_UNKNOWN):
            listed = guest.reason == PAUSED_IOERROR
            self.stood.append(Stood(self.host, guest.uuid, guest.stands_since, self.sched.now, listed))

    def leave(self, guest: Guest) -> None:
        self._stood(guest)
        guest.here, guest.state, guest.disk_errors, guest.messages = False, RUNNING, {}, {}
        self.away.setdefault(guest.uuid, []).append((self.sched.now, self.sched.now))
        self.lifecycle(guest, SHUTDOWN, SHUTDOWN_HOST)
        self.lifecycle(guest, STOPPED, STOPPED_DESTROYED)

    def enter(self, guest: Guest) -> None:
        guest.here, guest.number = True, guest.number + 100
        self.lifecycle(guest, STARTED, 0)

    def rename(self, guest: Guest, name: str) -> None:
        """Of a guest that is shut off."""
        self.lifecycle(guest, UNDEFINED, UNDEFINED_RENAMED)
        guest.name = name
        self.lifecycle(guest, DEFINED, DEFINED_RENAMED)

    def unplug(self, guest: Guest, alias: str) -> None:
        """The disk is taken out of a guest that runs, and with it whatever was known of its errors."""
        guest.unplugged.add(alias)
        target = DISKS[alias][0]
        guest.disk_errors.pop(target, None)
        guest.messages = {key: text for key, text in guest.messages.items() if key[0] != target}
        self.away.setdefault(guest.uuid, []).append((self.sched.now, self.sched.now))
        self._tell(lambda handler: handler.device_removed(guest.uuid, alias))

    def plug(self, guest: Guest, alias: str) -> None:
        guest.unplugged.discard(alias)
        self._tell(lambda handler: handler.changed(guest.uuid))

    def take(self, guest: Guest) -> None:
        """A guest is there from now on."""
        self.guests[guest.uuid] = guest

    def give(self, guest: Guest, to: Hypervisor) -> Guest:
        """Migrate: whom an error had paused is paused there too, by a user; its new QEMU knows no error."""
        stands = guest.state == PAUSED
        self._stood(guest)
        there = replace(
            guest,
            number=len(to.guests) + 200,
            disk_errors={},
            messages={},
            unplugged=set(guest.unplugged),
            snapshots=dict(guest.snapshots),
            copying=set(),
            hangs_until=0.0,
        )
        to.take(there)
        to.lifecycle(there, STARTED, MIGRATED)
        if not stands:
            self.lifecycle(guest, SUSPENDED, MIGRATED)
        guest.here, guest.state, guest.disk_errors, guest.messages = False, RUNNING, {}, {}
        self.away.setdefault(guest.uuid, []).append((self.sched.now, self.sched.now))
        self.lifecycle(guest, STOPPED, STOPPED_MIGRATED)
        if stands:
            there.reason = PAUSED_USER
            to.lifecycle(there, SUSPENDED, SUSPENDED_PAUSED)
        else:
            to.lifecycle(there, RESUMED, MIGRATED)
        return there

    def lifecycle(self, guest: Guest, event: int, detail: int) -> None:
        uuid, name, number = guest.uuid, guest.name, guest.number
        self._tell(lambda handler: handler.lifecycle(uuid, name, number, event, detail))

    def _tell(self, what: Callable[[Handler], None]) -> None:
        if self.up:
            for link in self.links:
                link.send(what)

    def _wall(self) -> int:
        task = self.sched.current
        assert task is not None
        return task.process.clock.wall_ns(self.sched.now)

    # ---- who connects

    def open(self, handler: Handler | None) -> ModelLink:
        """See Connector."""
        task = self.sched.current
        assert task is not None
        self.sched.sleep(0.001 + self.sched.random.random() * 0.05)
        self.wait_awake()
        if not self.up:
            raise SourceUnavailable(f"{self.uri}: Failed to connect socket: Connection refused")
        link = ModelLink(self, handler, task.process)
        self.links.append(link)
        return link

    def wait_awake(self) -> None:
        while self.hung_since is not None:
            self.sched.sleep(0.25)


class ModelLink:
    """One connection: an ordered stream towards the client, and calls that wait for answers."""

    def __init__(self, daemon: Daemon, handler: Handler | None, process: Process) -> None:
        self.daemon, self.handler, self.process, self.open = daemon, handler, process, True
        self.sched = daemon.sched
        self._unsent: list[Callable[[Handler], None]] = []  # while the daemon hangs
        self._stream = daemon.virtual.SimpleQueue()
        process.at_death.append(self.close)
        if handler is not None:
            self.sched.spawn(self._event_loop, process)

    def send(self, what: Callable[[Handler], None]) -> None:
        """Behind everything that was sent before."""
        if self.open and self.handler is not None:
            if self.daemon.hung_since is not None:
                self._unsent.append(what)
            else:
                self._stream.put(what)

    def flush(self) -> None:
        """The daemon goes on."""
        unsent, self._unsent = self._unsent, []
        for what in unsent:
            self.send(what)

    def cut(self, why: str, silent: float) -> None:
        """The daemon's side, or keepalive, ends it."""
        if self.open:
            self.close()
            if self.handler is not None:
                self._stream.put(lambda handler: handler.closed(why, silent))

    def close(self) -> None:
        self.open = False
        if self in self.daemon.links:
            self.daemon.links.remove(self)

    def _event_loop(self) -> None:
        while self.handler is not None:
            what = self._stream.get()
            self.sched.sleep(0.0005 * self.sched.random.random())
            what(self.handler)

    # ---- calls

    def _call(self, uuid: str | None = None) -> Guest | None:
        """A call takes a while, hangs with its daemon or its guest, and fails when something is wrong."""
        self.sched.sleep(0.001 + self.sched.random.random() * 0.03)
        self.daemon.wait_awake()
        guest = None if uuid is None else self.daemon.guests.get(uuid)
        while guest is not None and guest.hangs_until > self.sched.now and self.open:
            self.sched.sleep(0.5)
        if not self.open:
            raise SourceUnavailable("the connection is closed")
        if uuid is None:
            return None
        if guest is None or not guest.here:
            raise NoSuchDomain(f"domain {uuid} is not there")
        if self.sched.now < self.daemon.failing_until and self.sched.random.random() < 0.8:
            raise SourceUnavailable("Timed out during operation: cannot acquire state change lock")
        return guest

    def _guest(self, uuid: str) -> Guest:
        guest = self._call(uuid)
        assert guest is not None
        return guest

    def heard(self, then: Callable[[], None]) -> None:
        self._call()
        self._stream.put(lambda _handler: then())

    def facts(self) -> HostFacts:
        self._call()
        quirks = self.daemon.quirks
        return HostFacts(
            name=self.daemon.host,
            hypervisor=Versions("QEMU", None, quirks.libvirt),
            keeps_messages=quirks.keeps_messages,
            local=True,
        )

    def version(self) -> str:
        self._call()
        return self.daemon.quirks.qemu

    def capabilities(self) -> str:
        self._call()
        number = int(self.daemon.host.rpartition("-")[2])
        uuid = f"8205ba32-5064-4f22-a9f1-{number:012d}"
        return f"<capabilities><host><uuid>{uuid}</uuid></host></capabilities>"

    def domains(self) -> Sequence[DomainAt]:
        self._call()
        return [
            DomainAt(guest.uuid, guest.name, guest.number, guest.state, guest.reason)
            for guest in self.daemon.guests.values()
            if guest.here
        ]

    def state(self, uuid: str) -> tuple[int, int]:
        guest = self._guest(uuid)
        return guest.state, guest.reason

    def xml(self, uuid: str) -> str:
        return self._guest(uuid).xml

    def has_job(self, uuid: str, target: str) -> bool:
        return target in {DISKS[alias][0] for alias in self._guest(uuid).copying}

    def disk_errors(self, uuid: str) -> Mapping[str, int]:
        return dict(self._guest(uuid).disk_errors)

    def messages(self, uuid: str) -> Sequence[str]:
        if not self.daemon.quirks.keeps_messages:
            raise Unsupported("no messages here")
        messages = self._guest(uuid).messages
        return [messages[key] for key in sorted(messages)]

    def space(self, uuid: str, target: str) -> Space:
        self._guest(uuid)
        return Space(1, 1, 1)

    def alive(self) -> bool:
        return self.open
