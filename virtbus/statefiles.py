"""Files of ours: what may stand in their place, and which file it is.

`claim` is for the dedupe file and the reactor's store; the spool's lock is in spool/files.py.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import weakref
from contextlib import suppress
from pathlib import Path

_KINDS = (
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISCHR, "a device"),
)


class Claimed(Exception):
    """Another process has claimed the file; the text is its process id, as far as it is known."""


class NotRegular(OSError):
    """Something else stands where a state file belongs; `strerror` says which file and what it is."""


def check(*paths: Path) -> None:
    """Raise NotRegular for the first path at which something else stands.

    Before anything is opened: open(2) waits at a FIFO for its other end, for ever, and SQLite makes of the
    rest what looks like a damaged or a lost file. A path that can't be looked at is reported by who opens it.
    """
    for path in paths:
        try:
            mode = path.lstat().st_mode
            if stat.S_ISLNK(mode):
                mode = path.stat().st_mode
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ELOOP) or not path.is_symlink():
                continue
            raise _refusal(path, f"a symbolic link that leads nowhere ({path.readlink()})") from None
        if not stat.S_ISREG(mode):
            raise _refusal(path, next((kind for fits, kind in _KINDS if fits(mode)), "something else"))


def check_database(path: Path) -> None:
    """`check` of a SQLite database and of what SQLite keeps beside it."""
    check(path, *(path.with_name(path.name + end) for end in ("-wal", "-shm", "-journal")))


def identity(file: int | Path) -> tuple[int, int]:
    """Which file it is, whatever it is called. Raises OSError."""
    found = os.fstat(file) if isinstance(file, int) else file.stat()
    return found.st_dev, found.st_ino


class LockFile:
    """A file that is open for the locks on it, until `close` or the end of this process.

    A lock belongs to the open file, which a forked child shares: one that outlives us would keep the file
    from whoever comes after us. So a child lets go at once, which leaves us ours.
    """

    def __init__(self, path: Path) -> None:
        """Open it, made when missing. Raises OSError."""
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        _OPEN.add(self)

    def close(self) -> None:
        """End its locks; idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


_OPEN: weakref.WeakSet[LockFile] = weakref.WeakSet()


def _in_forked_child() -> None:
    for file in list(_OPEN):
        file.close()


os.register_at_fork(after_in_child=_in_forked_child)


def claim(path: Path) -> LockFile:
    """Lock a file for as long as it stays open, and write our process id into it.

    Raises Claimed, NotRegular, OSError.
    """
    check(path)
    claimed = LockFile(path)
    try:
        fcntl.flock(claimed.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(claimed.fd, 20, 0).decode(errors="replace").strip()
        claimed.close()
        raise Claimed(holder or "(unknown)") from None
    with suppress(OSError):  # no room: it is only told to others
        os.ftruncate(claimed.fd, 0)
        os.pwrite(claimed.fd, b"%d\n" % os.getpid(), 0)
    return claimed


def _refusal(path: Path, kind: str) -> NotRegular:
    return NotRegular(errno.EINVAL, f"{path.name} is {kind}, not a regular file: move it away")
