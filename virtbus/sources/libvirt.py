"""libvirt behind the observer: the only module that imports it.

Everything here runs on a read-only connection. libvirt's event loop is one thread a process, started with
the first connection and never stopped.
"""

from __future__ import annotations

import errno
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, ClassVar

import libvirt

from virtbus import redaction
from virtbus.errors import ConfigError, SourceDenied, SourceUnavailable, VirtbusError
from virtbus.model import Check, Hypervisor
from virtbus.observations import RawIoError
from virtbus.sources import SourceOptions
from virtbus.sources.link import DomainAt, Handler, HostFacts, NobodyListens, NoSuchDomain, Space, Unsupported
from virtbus.sources.observer import Observer
from virtbus.sources.probing import checks_of, unreachable
from virtbus.sources.sockets import is_local
from virtbus.telemetry import CallbackUndecodable, EventUnsupported, LibvirtSaid, Trouble, emit

KEEPS_MESSAGES_FROM = (11, 1, 0)  # libvirt remembers the last I/O error of each image

_DENIED = (
    libvirt.VIR_ERR_AUTH_FAILED,
    libvirt.VIR_ERR_AUTH_CANCELLED,
    libvirt.VIR_ERR_AUTH_UNAVAILABLE,
    libvirt.VIR_ERR_ACCESS_DENIED,
    libvirt.VIR_ERR_OPERATION_DENIED,
)
_HEARD_SECONDS = 0.1  # a queue that is not stuck brings something within it, if anything comes at all
_WAKES = 2
_MISUSED = (libvirt.VIR_ERR_NO_CONNECT, libvirt.VIR_ERR_INVALID_ARG, libvirt.VIR_ERR_CONF_SYNTAX)
_CLOSE_REASONS = {
    libvirt.VIR_CONNECT_CLOSE_REASON_ERROR: "an error on the connection",
    libvirt.VIR_CONNECT_CLOSE_REASON_EOF: "the daemon closed the connection",
    libvirt.VIR_CONNECT_CLOSE_REASON_KEEPALIVE: "the daemon did not answer keepalive",
    libvirt.VIR_CONNECT_CLOSE_REASON_CLIENT: "closed here",
}


# -------------------------------------------------------------------------------------- the event loop


class _EventLoop:
    """libvirt's default event loop on a daemon thread; one a process, because libvirt has only one."""

    _lock: ClassVar[threading.Lock] = threading.Lock()
    _thread: ClassVar[threading.Thread | None] = None
    # Who is notified that a callback was lost; weak, because a session ends without saying so.
    handlers: ClassVar[weakref.WeakSet[Any]] = weakref.WeakSet()

    @classmethod
    def ensure(cls) -> None:
        """Start it, once."""
        with cls._lock:
            if cls._thread is not None and cls._thread.is_alive():
                return
            if cls._thread is None:
                # Before this libvirt prints every error to standard error as well.
                libvirt.registerErrorHandler(lambda _, error: emit(LibvirtSaid(str(error[2]))), None)
                libvirt.virEventRegisterDefaultImpl()
                _notice_lost_callbacks()
            cls._thread = threading.Thread(target=cls._run, name="virtbus-libvirt", daemon=True)
            cls._thread.start()

    @classmethod
    def is_loop(cls) -> bool:
        """Whether this is the loop's thread."""
        return threading.current_thread() is cls._thread

    @classmethod
    def call(cls, then: Callable[[], None]) -> None:
        """Call `then` once on the loop's thread, behind the callbacks that wait there already.

        What was read from a connection waits behind a timer that was added when the connection was opened,
        and timers that are due are called in the order in which they were added (vireventpoll.c): a new one
        comes after it.
        """

        def due(timer: int, then: Callable[[], None]) -> None:
            libvirt.virEventRemoveTimeout(timer)
            then()

        libvirt.virEventAddTimeout(0, due, then)

    @staticmethod
    def _run() -> None:
        while True:
            try:
                libvirt.virEventRunDefaultImpl()
            except libvirt.libvirtError as error:
                emit(Trouble("libvirt's event loop", error))
                threading.Event().wait(1.0)


def _notice_lost_callbacks() -> None:
    """Stand before the hook that is there: libvirt-python prints what a callback raises, and goes on.

    Text that is not UTF-8 (a path in an image's header, say) raises before any callback of ours is called:
    the only trace is `sys.excepthook` on the loop's thread. It is the sign to look at every domain.
    """
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not _EventLoop.is_loop():
            before(kind, error, trace)
        elif isinstance(error, UnicodeDecodeError):
            emit(CallbackUndecodable(error))  # and a gap: somebody's error may have been in it
            for handler in list(_EventLoop.handlers):
                handler.undecodable()
        else:
            emit(Trouble("a libvirt callback", f"{kind.__name__}: {error}"))

    sys.excepthook = hook


# ------------------------------------------------------------------------------------------ a link


def _translated(error: libvirt.libvirtError, what: str) -> VirtbusError:
    """An error of libvirt → ours, by what the caller does next."""
    code, text = error.get_error_code(), error.get_error_message() or str(error)
    if code == libvirt.VIR_ERR_NO_DOMAIN:
        return NoSuchDomain(f"{what}: {text}")
    if code == libvirt.VIR_ERR_NO_SUPPORT:
        return Unsupported(f"{what}: {text}")
    if text.startswith(("Failed to find user record", "Failed to find group record")):
        # The daemon drops clients whose uid or gid has no name on its own side (seen from 7.0 to 12.8).
        return SourceDenied(
            f"{what}: {text}; give this uid and gid an account on the host, or run as one that has (65534)"
        )
    number = error.get_int1() if code == libvirt.VIR_ERR_SYSTEM_ERROR else 0
    if number == errno.ECONNREFUSED:
        return NobodyListens(f"{what}: {text}")
    if code in _DENIED or number in (errno.EACCES, errno.EPERM):
        return SourceDenied(
            f"{what}: {text}; the read-only socket and its group, or the daemon's access rules, must admit us"
        )
    return SourceUnavailable(f"{what}: {text}")


class LibvirtLink:
    """One read-only connection. See `virtbus.sources.link.Link`.

    Its calls run one after the other, and so does its end: with two under way when the connection ends,
    libvirt's client before 10.4 crashes (CVE-2024-4418), and `virConnectClose` frees what a call uses.
    """

    def __init__(self, connection: Any, uri: str) -> None:
        self._connection = connection
        self._one_call = threading.Lock()
        self._local = is_local(uri)
        self._uri = redaction.uri(uri)
        self.registered: list[int] = []  # each holds the connection, and is dropped at close

    def facts(self) -> HostFacts:
        """See Link."""
        with self._calling(self._uri):
            kind, name = self._connection.getType(), self._connection.getHostname()
            libvirt_version = _version(self._connection.getLibVersion())
        return HostFacts(
            name=name,
            hypervisor=Hypervisor(kind, None, _dotted(libvirt_version)),
            keeps_messages=kind == "QEMU" and libvirt_version >= KEEPS_MESSAGES_FROM,
            local=self._local,
        )

    def version(self) -> str:
        """See Link."""
        with self._calling(f"{self._uri}: version"):
            return _dotted(_version(self._connection.getVersion()))

    def capabilities(self) -> str:
        """See Link."""
        with self._calling(f"{self._uri}: capabilities"):
            return str(self._connection.getCapabilities())

    def domains(self) -> Sequence[DomainAt]:
        """See Link."""
        with self._calling(f"{self._uri}: list of domains"):
            flags = libvirt.VIR_CONNECT_GET_ALL_DOMAINS_STATS_ACTIVE
            try:
                found = self._connection.getAllDomainStats(libvirt.VIR_DOMAIN_STATS_STATE, flags)
            except libvirt.libvirtError as error:
                if error.get_error_code() not in (libvirt.VIR_ERR_NO_SUPPORT, libvirt.VIR_ERR_INVALID_ARG):
                    raise
            else:
                places = ("state.state", "state.reason")
                return [DomainAt(*_named(dom), *(stats.get(at, 0) for at in places)) for dom, stats in found]
            out = []
            for domain in self._connection.listAllDomains(libvirt.VIR_CONNECT_LIST_DOMAINS_ACTIVE):
                try:
                    out.append(DomainAt(*_named(domain), *domain.state()))
                except libvirt.libvirtError as error:
                    if error.get_error_code() != libvirt.VIR_ERR_NO_DOMAIN:
                        raise
            return out

    def state(self, uuid: str) -> tuple[int, int]:
        """See Link."""
        with self._calling(f"domain {uuid}: state"):
            state, reason = self._domain(uuid).state()
            return int(state), int(reason)

    def xml(self, uuid: str) -> str:
        """See Link."""
        with self._calling(f"domain {uuid}: XML"):
            return str(self._domain(uuid).XMLDesc(0))

    def has_job(self, uuid: str, target: str) -> bool:
        """See Link."""
        with self._calling(f"domain {uuid}: block job of {target}"):
            return bool(self._domain(uuid).blockJobInfo(target))

    def disk_errors(self, uuid: str) -> Mapping[str, int]:
        """See Link."""
        with self._calling(f"domain {uuid}: disk errors"):
            found: Mapping[str, int] | None = self._domain(uuid).diskErrors()
        if found is None:  # libvirt-python gives None, and no exception, when the call failed
            raise SourceUnavailable(f"domain {uuid}: disk errors can't be had")
        return found

    def messages(self, uuid: str) -> Sequence[str]:
        """See Link."""
        with self._calling(f"domain {uuid}: messages"):
            domain = self._domain(uuid)
            if not hasattr(domain, "messages"):
                raise Unsupported("this libvirt-python has no messages()")
            # Flags 0: all kinds. The flag for I/O errors is refused by libvirt before 11.1.
            return list(domain.messages(0))

    def space(self, uuid: str, target: str) -> Space:
        """See Link."""
        with self._calling(f"domain {uuid}: space of {target}"):
            return Space(*self._domain(uuid).blockInfo(target))

    def probe_events(self) -> Mapping[str, str | None]:
        """Register and deregister each event: name → libvirt's refusal, or None."""
        results: dict[str, str | None] = {}
        for (name, *_), _ in _EVENTS:
            number = getattr(libvirt, f"VIR_DOMAIN_EVENT_ID_{name}")
            try:
                with self._one_call:
                    held = self._connection.domainEventRegisterAny(None, number, lambda *_: None, None)
                    self._connection.domainEventDeregisterAny(held)
                results[name] = None
            except libvirt.libvirtError as error:
                results[name] = error.get_error_message() or str(error)
        return results

    def heard(self, then: Callable[[], None]) -> None:
        """See Link."""
        with self._calling(f"{self._uri}: the connection of the events"):
            self._connection.getLibVersion()  # goes to the daemon each time, and to no guest
        _EventLoop.call(then)

    def alive(self) -> bool:
        """See Link."""
        try:
            return bool(self._connection.isAlive())
        except libvirt.libvirtError:
            return False

    def close(self) -> None:
        """See Link. On a thread: closing sends a message, and a frozen daemon never answers it."""
        threading.Thread(target=self._close, name="virtbus-close", daemon=True).start()

    def _close(self) -> None:
        with self._one_call:  # one that hangs is ended by keepalive
            for number in self.registered:
                with suppress(libvirt.libvirtError):
                    self._connection.domainEventDeregisterAny(number)
            with suppress(libvirt.libvirtError):
                self._connection.unregisterCloseCallback()
            with suppress(libvirt.libvirtError):
                self._connection.close()

    @contextmanager
    def _calling(self, what: str) -> Iterator[None]:
        """Translates libvirt's exceptions, and text that is not UTF-8, once, at the edge."""
        with self._one_call:
            try:
                yield
            except libvirt.libvirtError as error:
                raise _translated(error, what) from error
            except (UnicodeDecodeError, SystemError) as error:
                raise SourceUnavailable(f"{what}: the answer is not UTF-8 text") from error

    def _domain(self, uuid: str) -> Any:
        return self._connection.lookupByUUIDString(uuid)


def _named(domain: Any) -> tuple[str, str, int | None]:
    """UUID, name and number of the domain object at hand; the daemon is not asked."""
    number = domain.ID()
    return domain.UUIDString(), domain.name(), number if number >= 0 else None


def _version(number: int) -> tuple[int, int, int]:
    """virConnectGetVersion: 1,000,000 × major + 1,000 × minor + release."""
    return number // 1_000_000, number // 1_000 % 1_000, number % 1_000


def _dotted(version: tuple[int, int, int]) -> str:
    return ".".join(map(str, version))


# -------------------------------------------------------------------------------------- the connector


class LibvirtConnector:
    """Opens links to one URI. See `virtbus.sources.link.Connector`."""

    def __init__(self, uri: str, options: SourceOptions, *, in_company: bool = False) -> None:
        """`in_company`: another client of the daemon listens all the time, as virt-launcher does."""
        self.uri = redaction.uri(uri)  # what messages say
        self.appeared_ns: int | None = None
        self._address = uri
        self._interval = options.keepalive_interval_seconds
        self._count = options.keepalive_count
        self._in_company = in_company

    def open(self, handler: Handler | None) -> LibvirtLink:
        """See Connector."""
        _EventLoop.ensure()
        try:
            connection = libvirt.openReadOnly(self._address)
        except libvirt.libvirtError as error:
            if error.get_error_code() in _MISUSED:
                raise ConfigError(f"libvirt.uri {self.uri}: {error.get_error_message()}") from error
            raise _translated(error, self.uri) from error
        link = LibvirtLink(connection, self._address)
        may_be_stuck = not self._in_company
        try:
            connection.setKeepAlive(self._interval, self._count)
        except libvirt.libvirtError as error:
            # Drivers inside this process (test:///) have none and no daemon, and need none.
            may_be_stuck = False
            emit(LibvirtSaid(f"keepalive: {error.get_error_message()}"))
        if handler is None:
            return link
        _EventLoop.handlers.add(handler)
        try:
            self._watch_closing(connection, handler)
            self._listen(connection, handler, link.registered, may_be_stuck=may_be_stuck)
        except BaseException as error:
            link.close()
            if isinstance(error, libvirt.libvirtError):
                raise _translated(error, f"{self.uri}: event registration") from error
            raise
        return link

    def _watch_closing(self, connection: Any, handler: Handler) -> None:
        def closed(_connection: object, reason: int, _opaque: object) -> None:
            deaf = reason == libvirt.VIR_CONNECT_CLOSE_REASON_KEEPALIVE
            silent = float(self._interval * (self._count + 1)) if deaf else 0.0
            handler.closed(_CLOSE_REASONS.get(reason, f"closed, reason {reason}"), silent)

        try:
            connection.registerCloseCallback(closed, None)
        except libvirt.libvirtError as error:
            if error.get_error_code() != libvirt.VIR_ERR_NO_SUPPORT:
                raise

    def _listen(
        self, connection: Any, handler: Handler, registered: list[int], *, may_be_stuck: bool
    ) -> None:
        """Register the callbacks, so that they are called.

        When the last listener leaves a daemon in a storm, libvirt may leave events in its queue without the
        timer that empties it (virObjectEventStateQueueRemote reads it without the lock): until all listeners
        have left once more nobody gets an event, while calls are answered. So while nothing is heard we leave
        and come again. What happens meanwhile is before the connection, for the look to find. Where somebody
        else always listens it can't happen.
        """
        heard = threading.Event()
        callbacks = _callbacks(handler, heard)
        for refusal in self._register(connection, callbacks, registered):
            emit(refusal)
        for _ in range(_WAKES if may_be_stuck else 0):
            if heard.wait(_HEARD_SECONDS):
                break
            while registered:
                connection.domainEventDeregisterAny(registered.pop())
            self._register(connection, callbacks, registered)

    def _register(
        self, connection: Any, callbacks: Mapping[str, Callable[..., None]], registered: list[int]
    ) -> list[EventUnsupported]:
        """Every event we use → those that the daemon does not know."""
        unknown = []
        for names, key in _EVENTS:
            for name in names:
                number = getattr(libvirt, f"VIR_DOMAIN_EVENT_ID_{name}", None)
                if number is None:
                    continue
                try:
                    registered.append(connection.domainEventRegisterAny(None, number, callbacks[key], name))
                except libvirt.libvirtError as error:
                    if not connection.isAlive():
                        raise
                    unknown.append(EventUnsupported(name, error.get_error_message() or str(error)))
                else:
                    break
            else:
                if names[0] in ("LIFECYCLE", "IO_ERROR_REASON"):
                    raise SourceUnavailable(f"{self.uri} offers none of the events {', '.join(names)}")
        return unknown


# For each callback the events that call it: the first that the daemon knows is registered.
_EVENTS: tuple[tuple[tuple[str, ...], str], ...] = (
    (("LIFECYCLE",), "lifecycle"),
    (("IO_ERROR_REASON", "IO_ERROR"), "io_error"),
    (("DEVICE_REMOVED",), "removed"),
    (("DEVICE_ADDED",), "changed"),
    (("DISK_CHANGE",), "changed"),
    (("BLOCK_JOB_2", "BLOCK_JOB"), "job"),
    (("TRAY_CHANGE",), "changed"),
    (("METADATA_CHANGE",), "changed"),
)


def _callbacks(handler: Handler, heard: threading.Event) -> Mapping[str, Callable[..., None]]:
    """The callbacks by the names that `_EVENTS` uses; each sets `heard`. All run on libvirt's thread."""
    failed: dict[int, tuple[str, str, int | None]] = {}  # by number: a storm asks libvirt for that alone

    def lifecycle(_c: Any, dom: Any, event: int, detail: int, _o: object) -> None:
        handler.lifecycle(*_named(dom), event, detail)

    def io_error(_c: Any, dom: Any, path: str, alias: str, action: int, *rest: Any) -> None:
        # IO_ERROR_REASON gives (reason, opaque), the older IO_ERROR only (opaque).
        reason = rest[0] if len(rest) > 1 else ""
        number = dom.ID()
        if number < 0 or number not in failed:
            heard.set()
            failed[number] = _named(dom)
        words = (*failed[number], path or "", alias or "", action, reason or "", time.time_ns())
        handler.io_error(tuple.__new__(RawIoError, words))  # as RawIoError(*words), in a third of the time

    def removed(_c: Any, dom: Any, alias: str, _o: object) -> None:
        handler.device_removed(dom.UUIDString(), alias or "")

    def changed(_c: Any, dom: Any, *_rest: object) -> None:
        handler.changed(dom.UUIDString())

    def job(_c: Any, dom: Any, disk: str, _kind: int, status: int, _o: object) -> None:
        # Completed, failed, cancelled or ready: each of them changes the XML.
        if status != libvirt.VIR_DOMAIN_BLOCK_JOB_READY:
            has_failed = status == libvirt.VIR_DOMAIN_BLOCK_JOB_FAILED
            handler.job_ended(dom.UUIDString(), disk or "", failed=has_failed)
        handler.changed(dom.UUIDString())

    def noticing(callback: Callable[..., None]) -> Callable[..., None]:
        def called(*words: Any) -> None:
            heard.set()
            failed.clear()
            callback(*words)

        return called

    return {"io_error": io_error} | {it.__name__: noticing(it) for it in (lifecycle, removed, changed, job)}


# --------------------------------------------------------------------------------------- the source


class LibvirtSource(Observer):
    """Observes the hypervisor of one libvirt URI, read-only; see `virtbus.sources.Source`."""

    def __init__(self, uri: str, *, options: SourceOptions | None = None) -> None:
        """Connect to nothing yet."""
        options = options or SourceOptions()
        self._libvirt = LibvirtConnector(uri, options)
        super().__init__(self._libvirt, options=options)

    def probe(self) -> Sequence[Check]:
        """See Source: connection, versions, and each event's registration, with what it means."""
        try:
            link = self._libvirt.open(None)
        except VirtbusError as error:
            return [unreachable(error)]
        try:
            found = len(link.domains()), link.probe_events()
            return checks_of(self._libvirt.uri, link.facts(), link.version(), *found)
        except VirtbusError as error:
            return [Check("libvirt", "failed", str(error), "see the daemon's own log", error.exit_code)]
        finally:
            link.close()
