"""The checks of `virtbus doctor` that need no broker: the host, and the spool's folder."""

from __future__ import annotations

import ctypes
import os
import pwd
import shutil
import sqlite3
import stat
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from virtbus import schema
from virtbus.bus import Bus
from virtbus.errors import VirtbusError
from virtbus.loading import Loaded, exposed_secrets
from virtbus.model import Check
from virtbus.spool import prepare_state_dir
from virtbus.spool.files import DATABASE, connect_to_read, who_holds

SLOW_SYNC_SECONDS = 0.1
FULL, FILLING = 0.9, 0.5  # of spool.max_bytes; above FULL all that is left is kept for gap events
_STA_UNSYNC = 0x0040  # adjtimex(2): the kernel's clock is not synchronised
_EARLIEST_NS = 1_704_067_200 * 10**9  # 2024-01-01: no host of this program ran before


@dataclass(slots=True)
class Look:
    """What is looked at, and what came out of it so far."""

    loaded: Loaded
    timeout: float
    bus: Bus | None = None
    failed: set[str] = field(default_factory=set)  # parts

    @property
    def state_dir(self) -> Path:
        """The agent's folder."""
        return Path(self.loaded.config.state_dir)

    @property
    def max_bytes(self) -> int:
        """What the spool may hold."""
        return self.loaded.config.spool.max_bytes


def ok(name: str, summary: str, **details: object) -> Check:
    """All is well."""
    return Check(name, "ok", summary, details=details)


def warn(name: str, summary: str, remedy: str, **details: object) -> Check:
    """Not right, but it works."""
    return Check(name, "warning", summary, remedy, details=details)


def fail(name: str, summary: str, remedy: str, code: int, **details: object) -> Check:
    """It does not work; `code` is one of sysexits.h."""
    return Check(name, "failed", summary, remedy, code, details)


# ----------------------------------------------------------------------------------------------- the host


def schemas(look: Look) -> Iterator[Check]:
    """The bundled schemas are whole."""
    wrong = []
    for entry in schema.entries():
        try:
            schema.load(entry.id)
        except VirtbusError as error:
            wrong.append(str(error))
    if wrong:
        yield fail("schemas", "; ".join(wrong), "install the package again", os.EX_DATAERR)
    else:
        yield ok("schemas", f"{len(schema.entries())} bundled schemas are whole")


def user(look: Look) -> Iterator[Check]:
    """Who looks: root may do what the agent's user may not."""
    folder = look.state_dir
    owner = folder.stat().st_uid if os.path.exists(folder) else os.geteuid()  # noqa: PTH110 - no error
    if os.geteuid() != 0 or owner == 0:
        yield ok("user", f"uid {os.geteuid()} looks")
        return
    name = f"#{owner}"
    with suppress(KeyError):
        name = pwd.getpwuid(owner).pw_name
    yield warn("user", f"root looks, but {folder} is {name}'s: what follows may be right for root alone",
               f"look as the agent's user: sudo -u '{name}' virtbus doctor")  # fmt: skip


def secrets(look: Look) -> Iterator[Check]:
    """No secret is open to the other users of this host."""
    if exposed := exposed_secrets(look.loaded):
        yield warn("secrets", "; ".join(exposed), "the files are for the agent's user alone: chmod 0600")
    else:
        yield ok("secrets", "none is open to other users")


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


def clock(look: Look) -> Iterator[Check]:
    """The wall clock only stamps; but consumers compare the stamps of many hosts."""
    now, newest = time.time_ns(), 0
    with suppress(OSError):
        newest = (look.state_dir / DATABASE).stat().st_mtime_ns
    late, remedy = (newest - now) / 1e9, "set the clock (chronyd, systemd-timesyncd)"
    if now < _EARLIEST_NS:
        yield fail(
            "clock", f"it is {time.strftime('%Y-%m-%d', time.gmtime())} here", remedy, os.EX_UNAVAILABLE
        )
    elif late > 60:
        yield fail("clock", f"the spool was written {late:.0f} s in the future", remedy, os.EX_UNAVAILABLE)
    elif _is_synchronised() is False:
        yield warn("clock", "the kernel says that nobody synchronises the clock", remedy)
    else:
        yield ok("clock", time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now // 10**9)))


# ---------------------------------------------------------------------------------------------- the spool


def spool(look: Look) -> Iterator[Check]:
    """The folder can be written and synced, has room, and says who uses it."""
    folder = look.state_dir
    if not os.path.exists(folder):  # noqa: PTH110 - a folder above it that may not be entered is not an error
        yield _to_be_made(folder)
        return
    try:
        prepare_state_dir(folder)
        seconds = _sync_time(folder)
    except VirtbusError as error:
        yield fail("spool", str(error), "make the folder writable for this user", error.exit_code)
        return
    except OSError as error:
        remedy = "make room, or make it writable; until then errors are only counted in memory"
        yield fail("spool", f"{folder} can't be written: {error.strerror}", remedy, os.EX_IOERR)
        return
    summary = f"{folder} is writable, a sync takes {seconds * 1000:.1f} ms"
    if seconds > SLOW_SYNC_SECONDS:
        remedy = "put it on a faster disk: each event waits for a sync"
        yield warn("spool", summary, remedy, sync_seconds=round(seconds, 6))
    else:
        yield ok("spool", summary, sync_seconds=round(seconds, 6))
    if (shared := _is_shared(folder)) is not None:
        summary = f"other users may write into {shared}: they can take the spool away, or give us another"
        yield warn("spool folder", summary, f"chmod go-w {shared}")
    free, wanted = shutil.disk_usage(folder).free, 2 * look.max_bytes
    if free < wanted:
        summary = f"{free >> 20} MiB free in {folder}, spool.max_bytes may need {wanted >> 20} MiB"
        yield warn("spool space", summary, "make room, or lower spool.max_bytes")
    else:
        yield ok("spool space", f"{free >> 20} MiB free")
    yield _backlog(folder / DATABASE, look.max_bytes)
    holder = who_holds(folder)
    if holder is None:
        yield ok("agent", f"no agent runs on {folder} now")
    else:
        summary = f"an agent runs on {folder}, pid {holder.pid}; a second one needs a --state-dir of its own"
        yield ok("agent", summary, pid=holder.pid)


def _to_be_made(folder: Path) -> Check:
    """It is the agent's to make the folder: one that doctor made might be another user's."""
    above = next(each for each in folder.absolute().parents if os.path.exists(each))  # noqa: PTH110
    if above.is_dir() and os.access(above, os.W_OK | os.X_OK):
        return ok("spool", f"{folder} is not there yet; the agent's first start makes it")
    summary = f"state_dir {folder} is not there, and uid {os.geteuid()} can't make it in {above}"
    return fail("spool", summary, "make the folder for the agent's user, or set --state-dir", os.EX_CONFIG)


def _is_shared(folder: Path) -> Path | None:
    """The folder, it or one above it, in which other users can put something else in our files' place."""
    folder = folder.resolve()
    if not folder.is_mount() and folder.stat().st_mode & 0o022:  # a pod's own volume is everybody's in there
        return folder
    others = stat.S_IWOTH | stat.S_ISVTX  # a sticky folder (/tmp) keeps names for who made them
    return next((each for each in folder.parents if each.stat().st_mode & others == stat.S_IWOTH), None)


def _backlog(path: Path, max_bytes: int) -> Check:
    """How full the spool is; read beside a running agent, without disturbing it."""
    if not path.exists():
        return ok("spool backlog", "no spool yet; the agent's first start makes it")
    try:
        with closing(connect_to_read(path)) as connection:
            waiting, size = connection.execute("SELECT count(*), total(bytes) FROM events").fetchone()
            dead, aside = connection.execute("SELECT count(*), total(bytes) FROM dead").fetchone()
    except sqlite3.Error as error:
        remedy = "start the agent: it moves a damaged file, salvages what can be read, and reports the gap"
        return fail("spool backlog", f"{path} can't be read: {error}", remedy, os.EX_IOERR)
    used = size / max_bytes  # dead letters are evicted first, and no event is lost for it
    summary = (
        f"{waiting} events wait, {used:.0%} of spool.max_bytes; {dead} dead letters, {aside / max_bytes:.0%}"
    )
    details: dict[str, Any] = {
        "waiting": waiting, "dead": dead, "bytes": int(size + aside), "max_bytes": max_bytes,
    }  # fmt: skip
    if used >= FULL:
        summary = (
            f"the spool is full: {summary}; the least important events are dropped, each named in a gap event"
        )
        remedy = "see why the broker does not take them (below), or raise spool.max_bytes"
        return fail("spool backlog", summary, remedy, os.EX_IOERR, **details)
    if dead:
        return warn(
            "spool backlog", summary, "look at the dead letters: virtbus spool list --dead", **details
        )
    if used >= FILLING:
        return warn("spool backlog", summary, "see why the broker does not take them (below)", **details)
    return ok("spool backlog", summary, **details)


def _sync_time(folder: Path) -> float:
    """Seconds of the fastest of three synced writes."""
    path, best = folder / f".doctor-{os.getpid()}", float("inf")
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
