"""Looks at every part once and says what is wrong, on what, and what to do: checks as data.

`examine` changes nothing but one thing it says: a probe event (type PROBE_TYPE) goes to the bus and is
confirmed, because only that shows that this identity may publish. Consumers that know our types only
hand it over as an unknown type.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import pwd
import shutil
import socket
import sqlite3
import ssl
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from virtbus import envelope, redaction, schema
from virtbus.bus import Bus
from virtbus.bus.certificates import ends_of
from virtbus.errors import BusDenied, BusUnavailable, ConfigError, SpoolCorrupt, SpoolFull, VirtbusError
from virtbus.model import Check, Checks, Confirmed, Nacked, Outcome, Record, Refused, Unroutable, to_datetime
from virtbus.sources import Source
from virtbus.spool import prepare_state_dir
from virtbus.spool.files import DATABASE, LOCK, connect_to_read, read_holder

PROBE_TYPE = "io.virtbus.agent.probe.v1"
SLOW_SYNC_SECONDS = 0.1
FULL = 0.9  # of spool.max_bytes; what is left is kept for gap events
FILLING = 0.5
SOON_DAYS = 14.0  # a certificate that ends within so many days is a warning
_STA_UNSYNC = 0x0040  # adjtimex(2): the kernel's clock is not synchronised
_EARLIEST_NS = 1_704_067_200 * 10**9  # 2024-01-01: no host of this program ran before


@dataclass(frozen=True, slots=True)
class TlsTarget:
    """A broker's TLS port, and what is trusted there; `server_name` is the name to be verified."""

    host: str
    port: int
    server_name: str
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None


def examine(
    *,
    source: Callable[[], Source],
    bus: Callable[[], Bus],
    state_dir: Path,
    max_bytes: int,
    agent_id: str | None,
    tls: Callable[[], Sequence[TlsTarget]] = tuple,
    exposed: Sequence[str] = (),
    timeout: float = 10.0,
) -> Iterator[Check]:
    """Every check, one after the other. `source` and `bus` make the parts; their errors are findings too."""
    yield from _schemas()
    yield from _user(state_dir)
    yield from _secrets(exposed)
    yield from _clock(state_dir)
    yield from _spool(state_dir, max_bytes)
    yield from _part("libvirt", lambda: source().probe(), timeout)
    yield from _part("tls", lambda: [_tls(target, timeout) for target in tls()], timeout + 1.0)
    yield from _part("client certificate", lambda: list(_own_certificates(tls())), timeout)
    made: list[Bus] = []

    def probe() -> Checks:
        made.append(bus())
        return made[0].probe()

    checks = list(_part("bus", probe, timeout))
    yield from checks
    if made and not any(check.status == "failed" for check in checks):
        yield from _part("bus round trip", lambda: [_round_trip(made[0], agent_id or "doctor")], timeout)
    else:
        yield Check("bus round trip", "skipped", "the bus can't be used: see above")
    for each in made:
        each.close()


def exit_code(checks: Sequence[Check]) -> int:
    """0 when nothing failed, else the first failure's code."""
    return next(
        (check.exit_code or VirtbusError.exit_code for check in checks if check.status == "failed"), 0
    )


def _part(name: str, look: Callable[[], Checks], timeout: float) -> Iterator[Check]:
    """The checks of a part, on a thread: one that hangs (a frozen libvirt) is a finding, not our end."""
    found: list[Check] = []
    done = threading.Event()

    def run() -> None:
        try:
            found.extend(look())
        except VirtbusError as error:
            found.append(Check(name, "failed", str(error), _REMEDIES.get(type(error)), error.exit_code))
        except Exception as error:  # noqa: BLE001 - a part that breaks is a finding
            found.append(
                Check(name, "failed", f"unexpected {type(error).__name__}: {error}", "report it", 70)
            )
        finally:
            done.set()

    threading.Thread(target=run, name=f"virtbus-doctor-{name}", daemon=True).start()
    if done.wait(timeout):
        for check in found:  # whoever looked, no secret is shown, and a failure is never without a next step
            shown = replace(check, summary=redaction.text(check.summary))
            yield shown if shown.status != "failed" or shown.remedy else replace(shown, remedy=_next(shown))
    else:
        yield Check(
            name,
            "failed",
            f"no answer within {timeout:g} s: it hangs",
            "look at libvirtd's process and log; one that was stopped shows as state T in ps (kill -CONT)"
            if name == "libvirt"
            else "look at the network path and at the broker's log",
            69,
        )


_REMEDIES: dict[type[VirtbusError], str] = {
    ConfigError: "fix the setting; `virtbus config show` says where it comes from",
    BusDenied: "check user, password, certificate and the broker's permissions",
    BusUnavailable: "check address, firewall and that the broker runs",
}


def _next(check: Check) -> str:
    kinds = (kind for kind in _REMEDIES if kind.exit_code == check.exit_code)
    return next((_REMEDIES[kind] for kind in kinds), "see the message")


# ---------------------------------------------------------------------------------------- one by one


def _schemas() -> Iterator[Check]:
    """The bundled schemas are whole."""
    wrong = []
    for entry in schema.entries():
        try:
            schema.load(entry.id)
        except VirtbusError as error:
            wrong.append(str(error))
    if wrong:
        yield Check("schemas", "failed", "; ".join(wrong), "install the package again", 65)
    else:
        yield Check("schemas", "ok", f"{len(schema.entries())} bundled schemas are whole")


def _user(state_dir: Path) -> Iterator[Check]:
    """Who looks: root may do what the agent's user may not."""
    owner = state_dir.stat().st_uid if os.path.exists(state_dir) else os.geteuid()  # noqa: PTH110 - no error
    if os.geteuid() == 0 and owner != 0:
        try:
            name = pwd.getpwuid(owner).pw_name
        except KeyError:
            name = f"#{owner}"
        yield Check(
            "user",
            "warning",
            f"root looks, but {state_dir} is {name}'s: what follows may be right for root alone",
            f"look as the agent's user: sudo -u '{name}' virtbus doctor",
        )
    else:
        yield Check("user", "ok", f"uid {os.geteuid()} looks")


def _secrets(exposed: Sequence[str]) -> Iterator[Check]:
    """No secret is open to the other users of this host."""
    if exposed:
        remedy = "the files are for the agent's user alone: chmod 0600"
        yield Check("secrets", "warning", "; ".join(exposed), remedy)
    else:
        yield Check("secrets", "ok", "none is open to other users")


class _Timex(ctypes.Structure):
    """The head of struct timex (adjtimex(2)); the rest only has to be there."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_byte * 256),
    )


def _is_synchronised() -> bool | None:
    with suppress(OSError, AttributeError):
        timex = _Timex()
        if ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(timex)) >= 0:
            return not timex.status & _STA_UNSYNC
    return None


def _clock(state_dir: Path) -> Iterator[Check]:
    """The wall clock only stamps; but consumers compare the stamps of many hosts."""
    now = time.time_ns()
    newest = 0
    with suppress(OSError):
        newest = (state_dir / DATABASE).stat().st_mtime_ns
    remedy = "set the clock (chronyd, systemd-timesyncd)"
    if now < _EARLIEST_NS:
        yield Check("clock", "failed", f"it is {time.strftime('%Y-%m-%d', time.gmtime())} here", remedy, 69)
    elif newest > now + 60 * 10**9:
        late = (newest - now) / 1e9
        yield Check("clock", "failed", f"the spool was written {late:.0f} s in the future", remedy, 69)
    elif _is_synchronised() is False:
        yield Check("clock", "warning", "the kernel says that nobody synchronises the clock", remedy)
    else:
        yield Check("clock", "ok", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now // 10**9)))


def _spool(state_dir: Path, max_bytes: int) -> Iterator[Check]:
    """The folder can be written and synced, has room, and says who uses it."""
    if not os.path.exists(state_dir):  # noqa: PTH110 - a folder above it that may not be entered is no error
        yield _to_be_made(state_dir)
        return
    try:
        prepare_state_dir(state_dir)
        seconds = _sync_time(state_dir)
    except VirtbusError as error:
        yield Check("spool", "failed", str(error), "make the folder writable for this user", error.exit_code)
        return
    except OSError as error:
        yield Check(
            "spool",
            "failed",
            f"{state_dir} can't be written: {error.strerror}",
            "make room, or make it writable; until then errors are only counted in memory",
            SpoolFull.exit_code,
        )
        return
    slow = seconds > SLOW_SYNC_SECONDS
    yield Check(
        "spool",
        "warning" if slow else "ok",
        f"{state_dir} is writable, a sync takes {seconds * 1000:.1f} ms",
        "put it on a faster disk: each event waits for a sync" if slow else None,
        details={"sync_seconds": round(seconds, 6)},
    )
    if (shared := _is_shared(state_dir)) is not None:
        yield Check(
            "spool folder",
            "warning",
            f"other users may write into {shared}: they can take the spool away, or give us another",
            f"chmod go-w {shared}",
        )
    free = shutil.disk_usage(state_dir).free
    if free < 2 * max_bytes:
        yield Check(
            "spool space",
            "warning",
            f"{free >> 20} MiB free in {state_dir}, spool.max_bytes may need {2 * max_bytes >> 20} MiB",
            "make room, or lower spool.max_bytes",
        )
    else:
        yield Check("spool space", "ok", f"{free >> 20} MiB free")
    yield from _backlog(state_dir / DATABASE, max_bytes)
    if _is_held(state_dir):
        pid = read_holder(state_dir).pid
        yield Check(
            "agent",
            "ok",
            f"an agent runs on {state_dir}, pid {pid}; a second one needs a --state-dir of its own",
            details={"pid": pid},
        )
    else:
        yield Check("agent", "ok", f"no agent runs on {state_dir} now")


def _to_be_made(state_dir: Path) -> Check:
    """It is the agent's to make the folder: one that doctor made might be another user's."""
    above = next(each for each in state_dir.absolute().parents if os.path.exists(each))  # noqa: PTH110
    if above.is_dir() and os.access(above, os.W_OK | os.X_OK):
        return Check("spool", "ok", f"{state_dir} is not there yet; the agent's first start makes it")
    return Check(
        "spool",
        "failed",
        f"state_dir {state_dir} is not there, and uid {os.geteuid()} can't make it in {above}",
        "make the folder for the agent's user, or set --state-dir",
        ConfigError.exit_code,
    )


def _is_shared(state_dir: Path) -> Path | None:
    """The folder, it or one above it, in which other users can put something else in our files' place."""
    folder = state_dir.resolve()
    if not folder.is_mount() and folder.stat().st_mode & 0o022:  # a pod's own volume is everybody's in there
        return folder
    others = stat.S_IWOTH | stat.S_ISVTX  # a sticky folder (/tmp) keeps names for who made them
    return next((each for each in folder.parents if each.stat().st_mode & others == stat.S_IWOTH), None)


def _backlog(path: Path, max_bytes: int) -> Iterator[Check]:
    """How full the spool is; read beside a running agent, without disturbing it."""
    if not path.exists():
        yield Check("spool backlog", "ok", "no spool yet; the agent's first start makes it")
        return
    try:
        with closing(connect_to_read(path)) as connection:
            waiting, size = connection.execute("SELECT count(*), total(bytes) FROM events").fetchone()
            dead, aside = connection.execute("SELECT count(*), total(bytes) FROM dead").fetchone()
    except sqlite3.Error as error:
        yield Check(
            "spool backlog",
            "failed",
            f"{path} can't be read: {error}",
            "start the agent: it moves a damaged file, salvages what can be read, and reports the gap",
            SpoolCorrupt.exit_code,
        )
        return
    used = size / max_bytes  # what was set aside gives way first, and no event is lost for it
    told = f"{waiting} events wait, {used:.0%} of spool.max_bytes; {dead} set aside, {aside / max_bytes:.0%}"
    details = {"waiting": waiting, "dead": dead, "bytes": int(size + aside), "max_bytes": max_bytes}
    if used >= FULL:
        yield Check(
            "spool backlog",
            "failed",
            f"the spool is full: {told}; the least important events are dropped, each named in a gap event",
            "see why the broker does not take them (below), or raise spool.max_bytes",
            SpoolFull.exit_code,
            details,
        )
    elif used >= FILLING or dead:
        remedy = "see why the broker does not take them (below)"
        if dead:
            remedy = "look at what was set aside: virtbus spool list --dead"
        yield Check("spool backlog", "warning", told, remedy, details=details)
    else:
        yield Check("spool backlog", "ok", told, details=details)


def _is_held(state_dir: Path) -> bool:
    """Whether an agent runs on this spool."""
    try:
        with (state_dir / LOCK).open("rb") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _sync_time(folder: Path) -> float:
    """Seconds of the fastest of three synced writes."""
    path = folder / f".doctor-{os.getpid()}"
    best = float("inf")
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        for _ in range(3):
            begun = time.monotonic()
            os.write(descriptor, b"\0" * 4096)
            os.fsync(descriptor)
            best = min(best, time.monotonic() - begun)
    finally:
        os.close(descriptor)
        path.unlink()
    return best


# X509_V_ERR_* (openssl-verification-options(1)) → what to do.
_VERIFY_REMEDIES = {
    9: "set this host's clock, or the certificate is not valid yet",
    10: "renew the broker's certificate (or is this host's clock wrong?)",
    18: "set bus.tls.ca_file to the broker's own certificate or to its authority",
    19: "set bus.tls.ca_file to the authority that signed the broker's certificate",
    20: "set bus.tls.ca_file to the authority that signed the broker's certificate",
    21: "set bus.tls.ca_file to the authority that signed the broker's certificate",
    62: "use a name of the certificate as the host in bus.url, or set bus.tls.server_name",
    64: "use a name of the certificate as the host in bus.url, or set bus.tls.server_name",
}


def _tls(target: TlsTarget, timeout: float) -> Check:
    """One handshake with our trust and our certificate: chain, host name, days left."""
    where = f"{target.host}:{target.port}"
    try:
        context = ssl.create_default_context(cafile=target.ca_file)
        if target.cert_file is not None:
            context.load_cert_chain(target.cert_file, target.key_file)
    except OSError as error:  # ssl.SSLError is one
        files = ", ".join(name for name in (target.ca_file, target.cert_file, target.key_file) if name)
        return Check(
            "tls",
            "failed",
            f"{files}: can't be used: {error.strerror or error}",
            "bus.tls.* name PEM files that this user can read; the key belongs to the certificate",
            ConfigError.exit_code,
        )
    try:
        with (
            socket.create_connection((target.host, target.port), timeout) as plain,
            context.wrap_socket(plain, server_hostname=target.server_name) as secure,
        ):
            certificate, version = secure.getpeercert() or {}, secure.version()
    except ssl.SSLCertVerificationError as error:
        return Check(
            "tls",
            "failed",
            f"{where}: the broker's certificate is refused: {error.verify_message}",
            _VERIFY_REMEDIES.get(error.verify_code, "check bus.tls.ca_file and the broker's certificate"),
            BusDenied.exit_code,
        )
    except OSError as error:
        reason = getattr(error, "reason", None) or error.strerror or str(error)
        return Check(
            "tls",
            "failed",
            f"{where}: no TLS connection: {reason}",
            "check that this is the broker's TLS port, and that it runs",
            BusUnavailable.exit_code,
        )
    days = (ssl.cert_time_to_seconds(str(certificate["notAfter"])) - time.time()) / 86400
    return Check(
        "tls",
        "warning" if days < SOON_DAYS else "ok",
        f"{where}: {version}, verified for {target.server_name}, {days:.0f} days left",
        "renew the broker's certificate" if days < SOON_DAYS else None,
        details={"days_left": round(days, 1), "protocol": version},
    )


def _own_certificates(targets: Sequence[TlsTarget]) -> Iterator[Check]:
    """How long the broker will go on taking our certificate. One that can't be read is told by `tls`."""
    for path in dict.fromkeys(target.cert_file for target in targets if target.cert_file is not None):
        ends = ends_of(path)
        if not ends:
            continue
        days = (ends[0] - time.time()) / 86400
        status = "failed" if days < 0 else "warning" if days < SOON_DAYS else "ok"
        yield Check(
            "client certificate",
            status,
            f"{path}: ended {-days:.0f} days ago" if days < 0 else f"{path}: {days:.0f} days left",
            None if status == "ok" else "renew it; the next connection uses the new file",
            BusDenied.exit_code if status == "failed" else 0,
            {"days_left": round(days, 1)},
        )


class _OneRecord:
    """A feed of a single record."""

    def __init__(self, record: Record) -> None:
        self._records = [record]

    def take(self, limit: int, busy: AbstractSet[str]) -> Sequence[Record]:
        """See virtbus.bus.Feed."""
        taken, self._records = self._records, []
        return taken


def _round_trip(bus: Bus, agent_id: str) -> Check:
    """Publish one probe event and wait for the broker's word."""
    now = time.time_ns()
    event_id = envelope.uuid7(now)
    record = Record(
        row=0,
        epoch=event_id,
        seq=0,
        id=event_id,
        key=agent_id,
        attributes={
            "specversion": "1.0",
            "id": event_id,
            "type": PROBE_TYPE,
            "source": f"/virtbus/agents/{agent_id}",
            "subject": agent_id,
            "time": to_datetime(now).isoformat(timespec="microseconds").replace("+00:00", "Z"),
            "datacontenttype": "application/json",
            "partitionkey": agent_id,
        },
        body=b"{}",
        created_ns=now,
    )
    begun = time.monotonic()
    outcomes: list[Outcome] = [outcome for _, outcome in bus.publish(_OneRecord(record))]
    outcome = outcomes[-1] if outcomes else None
    seconds = time.monotonic() - begun
    if isinstance(outcome, Confirmed):
        return Check(
            "bus round trip",
            "ok",
            f"a probe event was confirmed in {seconds * 1000:.0f} ms",
            details={"seconds": round(seconds, 6)},
        )
    if isinstance(outcome, Unroutable):
        return Check(
            "bus round trip",
            "warning",
            f"the broker takes our events, but {outcome.reason}",
            "bind a consumer's queue: events wait in the spool until somebody does",
        )
    if isinstance(outcome, Nacked):
        told = f"the broker does not take our events now: {outcome.reason}"
        return Check("bus round trip", "warning", told, "make room in its queues: events wait in the spool")
    error = outcome.error if outcome is not None else BusUnavailable("the broker gave no answer")
    kind = BusDenied if isinstance(outcome, Refused) or isinstance(error, BusDenied) else BusUnavailable
    return Check("bus round trip", "failed", str(error), _REMEDIES[kind], kind.exit_code)
