"""Sockets of libvirt's daemons: those that a pattern finds, and the folder of the host's own."""

from __future__ import annotations

import ctypes
import fnmatch
import os
import select
import stat
import threading
from collections.abc import Callable, Container, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

_DEFAULT = Path("/run/libvirt")
_MOUNTS = Path("/proc/self/mountinfo")


def is_local(uri: str) -> bool:
    """Whether a libvirt URI names the machine we run on, by the rules of libvirt's own URIs."""
    parts = urlsplit(uri)
    transport = parts.scheme.partition("+")[2]
    return not parts.netloc and transport in ("", "unix")


def socket_folder(uri: str) -> Path | None:
    """Where the socket of a system connection on this host is; None: the URI names no such socket."""
    parts = urlsplit(uri)
    driver, _, transport = parts.scheme.partition("+")
    if parts.netloc or transport not in ("", "unix") or driver == "test" or parts.path != "/system":
        return None
    named = parse_qs(parts.query).get("socket")
    return Path(named[0]).parent if named else _DEFAULT


def serves(uri: str, path: Path) -> bool:
    """Whether this is a socket, the read-only one or the other, of the daemon that a URI names."""
    parts = urlsplit(uri)
    driver, _, transport = parts.scheme.partition("+")
    if parts.netloc or transport not in ("", "unix") or parts.path not in ("/system", "/session"):
        return False
    named = parse_qs(parts.query).get("socket")
    folder, names = _folder_of(parts.path), ["libvirt-sock", f"virt{driver}d-sock"]
    if named:
        folder, names = Path(named[0]).parent, [Path(named[0]).name.removesuffix("-ro")]
    if path.parent.resolve() == folder.resolve() and path.name.removesuffix("-ro") in names:
        return True
    return any(_is_same(path, folder / f"{name}{end}") for name in names for end in ("", "-ro"))


def _folder_of(kind: str) -> Path:
    """Where the sockets of /system or /session are; root's session is the system's."""
    if kind == "/system" or os.geteuid() == 0:
        return _DEFAULT
    return Path(os.environ.get("XDG_RUNTIME_DIR") or Path.home() / ".cache") / "libvirt"


def _is_same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def has_socket(folder: Path) -> bool:
    """Whether a libvirt daemon, or systemd for it, has a socket there. A folder that can't be read has."""
    try:
        return any(stat.S_ISSOCK(entry.lstat().st_mode) for entry in folder.iterdir())
    except FileNotFoundError:
        return False
    except OSError:
        return True


def was_removed(folder: Path, mounts: Path = _MOUNTS) -> bool:
    """Whether the folder is a mount of a folder that was removed on the host since.

    A container keeps the removed one for as long as it runs; what is made in its place is never seen.
    """
    names = {str(folder), str(folder.resolve())}
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    # proc_pid_mountinfo(5): id, parent, device, root, mount point; the kernel marks a root that was unlinked.
    return any(
        words[4] in names and words[3].endswith("//deleted")
        for line in lines
        if len(words := line.split()) > 4
    )


# ------------------------------------------------------------------------------ those that a pattern finds

Identity = tuple[int, int, int]
"""Device, inode and change time (ns) of a socket: another daemon's is another one."""


def look(patterns: Sequence[str], watch: Callable[[str], None] = lambda folder: None) -> dict[str, Identity]:
    """The sockets that are there; `watch` gets each folder where one may come or go, before it is listed.

    One that several names lead to is there once.
    """
    found: dict[str, Identity] = {}
    known: set[tuple[int, int]] = set()
    for pattern in patterns:
        for path in _matches(pattern, watch, _ignore):
            with suppress(OSError):
                status = path.lstat()  # a link may lead anywhere: whoever runs a guest could lay one
                if stat.S_ISSOCK(status.st_mode) and (status.st_dev, status.st_ino) not in known:
                    known.add((status.st_dev, status.st_ino))
                    found[str(path)] = (status.st_dev, status.st_ino, status.st_ctime_ns)
    return found


def unreadable(patterns: Sequence[str]) -> frozenset[str]:
    """The folders on the way of which we may not see what is in them."""
    closed: set[str] = set()
    for pattern in patterns:
        for path in _matches(pattern, _ignore, closed.add):
            try:
                path.lstat()
            except PermissionError:
                closed.add(str(path.parent))
            except OSError:  # it is not there
                continue
    return frozenset(closed)


def one_each(sockets: Mapping[str, Identity], kept: Container[str] = ()) -> dict[str, Identity]:
    """Without the second socket of a daemon, by which each error would be counted twice.

    The one that is `kept` stays, there or not: a daemon that starts again makes one a moment after the other.
    Else it is the read-only one.
    """

    def is_chosen(path: str) -> bool:
        bare = path.removesuffix("-ro")
        return path == max(
            (bare, f"{bare}-ro"), key=lambda each: (each in kept, each in sockets, each.endswith("-ro"))
        )

    return {path: identity for path, identity in sockets.items() if is_chosen(path)}


def _ignore(_folder: str) -> None:
    """Nobody asks."""


def _matches(pattern: str, watch: Callable[[str], None], closed: Callable[[str], None]) -> list[Path]:
    at = [Path("/")]
    *folders, name = [part for part in pattern.split("/") if part]
    for part in folders:
        at = [below for folder in at for below in _folders(folder, part, watch, closed)]
    for folder in at:
        watch(str(folder))
    return [path for folder in at for path in _below(folder, name, closed)]


def _folders(
    folder: Path, part: str, watch: Callable[[str], None], closed: Callable[[str], None]
) -> list[Path]:
    """Those that are there. One with a fixed name is waited for only while it is missing: whatever else
    happens beside it, in /run or /tmp, would wake us all the time.
    """
    if not _is_pattern(part) and _is_folder(folder / part, closed):
        return [folder / part]
    watch(str(folder))
    return [below for below in _below(folder, part, closed) if _is_folder(below, closed)]


def _is_folder(path: Path, closed: Callable[[str], None]) -> bool:
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except PermissionError:
        closed(str(path.parent))
    except OSError:  # it is not there
        return False
    return False


def _below(folder: Path, part: str, closed: Callable[[str], None]) -> list[Path]:
    if not _is_pattern(part):
        return [folder / part]
    try:
        names = sorted(os.listdir(folder))  # noqa: PTH208
    except FileNotFoundError:
        return []
    except OSError:
        closed(str(folder))
        return []
    return [folder / name for name in names if fnmatch.fnmatchcase(name, part)]


def _is_pattern(part: str) -> bool:
    return any(sign in part for sign in "*?[")


class Watch:
    """inotify(7), which Python lacks. What happened is of no interest, only that something did."""

    _EVENTS = 0x100 | 0x200 | 0x40 | 0x80 | 0x01000000  # CREATE, DELETE, MOVED_FROM, MOVED_TO, ONLYDIR

    def __init__(self, changed: Callable[[], None]) -> None:
        """`changed` is called on a thread of this object."""
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        self._over = os.eventfd(0, os.EFD_CLOEXEC)
        self._changed = changed
        self._thread = threading.Thread(target=self._run, name="virtbus-inotify", daemon=True)
        self._thread.start()

    def add(self, folder: str) -> None:
        """Watch a folder; that it can't be (it is gone, or there are too many) is left to the slow look."""
        if self._descriptor >= 0:
            self._libc.inotify_add_watch(self._descriptor, os.fsencode(folder), self._EVENTS)

    def close(self) -> None:
        """End."""
        os.eventfd_write(self._over, 1)
        self._thread.join()
        os.close(self._over)
        if self._descriptor >= 0:
            os.close(self._descriptor)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._over, select.POLLIN)
        if self._descriptor >= 0:
            poll.register(self._descriptor, select.POLLIN)
        while not any(descriptor == self._over for descriptor, _ in poll.poll()):
            with suppress(BlockingIOError):
                os.read(self._descriptor, 1 << 16)
            self._changed()
