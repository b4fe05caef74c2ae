"""A disk that loses in a power cut what was not synced: SQLite's own writes, watched below SQLite.

A VFS (https://www.sqlite.org/vfs.html) that is the default one, with its writes, truncations and syncs noted.
A write counts as on the disk once its file was synced. A power cut leaves each later write out, keeps it or
tears it at a sector, as a disk with a cache may. What other code writes counts as synced at once, and
so do directory entries: a file that was made is there.
"""

from __future__ import annotations

import ctypes
import os
import random
import sqlite3
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

SECTOR = 512
NAME = b"virtbus-sim"
_OK, _IOERR, _IOERR_FSYNC, _FULL = 0, 10, 10 | 4 << 8, 13
_WAL, _MAIN, _JOURNAL = 0x80000, 0x100, 0x800


@dataclass(slots=True)
class Write:
    """One write, or truncation (`new` is empty then), since the last sync of its file."""

    offset: int
    old: bytes  # what was there, up to the end of the file
    new: bytes
    size: int  # of the file before


class Journal:
    """What was written and not synced, by path."""

    def __init__(self) -> None:
        self.writes: dict[str, list[Write]] = defaultdict(list)
        self.syncs = 0
        self._open: dict[str, int] = {}  # descriptors that read what a write replaces
        self.failing: Callable[[str], int] = lambda path: _OK  # an error code for a write to it, or 0
        self.watching: Callable[[str], bool] = lambda path: True  # whether anything may happen to it

    def wrote(self, path: str, offset: int, new: bytes) -> None:
        """Before it is written."""
        file = self._file(path)
        size = os.fstat(file).st_size
        old = os.pread(file, len(new), offset) if offset < size else b""
        self.writes[path].append(Write(offset, old, new, size))

    def truncates(self, path: str, size: int) -> None:
        """Before it is cut."""
        file = self._file(path)
        before = os.fstat(file).st_size
        self.writes[path].append(Write(size, os.pread(file, max(0, before - size), size), b"", before))

    def _file(self, path: str) -> int:
        file = self._open.get(path)
        if file is None:
            file = self._open[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        return file

    def opened(self, path: str) -> None:
        """Another file may have that name now."""
        file = self._open.pop(path, None)
        if file is not None:
            os.close(file)

    def close(self) -> None:
        """Let go of all files."""
        for path in list(self._open):
            self.opened(path)

    def synced(self, path: str) -> None:
        """All of it is on the disk."""
        self.syncs += 1
        self.writes.pop(path, None)

    def after_power_cut(self, path: Path, keeps: str, dice: random.Random) -> bytes:
        """The file as the next boot has it, with "nothing", "some" or "torn" parts of what was not synced."""
        content = bytearray(path.read_bytes())
        writes = self.writes.get(str(path), [])
        for write in reversed(writes):
            content[write.offset : write.offset + max(len(write.new), len(write.old))] = write.old
            del content[write.size :]
        for write in writes:
            if keeps == "nothing" or (not write.new and dice.random() < 0.5):
                continue
            if not write.new:
                del content[write.offset :]
                continue
            sectors = range(0, len(write.new), SECTOR if keeps == "torn" else len(write.new))
            for at in sectors:
                if dice.random() < 0.5:
                    part = write.new[at : at + (SECTOR if keeps == "torn" else len(write.new))]
                    begin = write.offset + at
                    content.extend(bytes(max(0, begin - len(content))))
                    content[begin : begin + len(part)] = part
        return bytes(content)


class _Vfs(ctypes.Structure):
    """sqlite3_vfs."""


_OPEN = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p
)
_Vfs._fields_ = [
    ("iVersion", ctypes.c_int),
    ("szOsFile", ctypes.c_int),
    ("mxPathname", ctypes.c_int),
    ("pNext", ctypes.c_void_p),
    ("zName", ctypes.c_char_p),
    ("pAppData", ctypes.c_void_p),
    ("xOpen", _OPEN),
    ("others", ctypes.c_void_p * 17),
]
_WRITE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_int64)
_TRUNCATE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int64)
_SYNC = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_int)
_CLOSE = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)


class _Methods(ctypes.Structure):
    """sqlite3_io_methods."""

    _fields_ = [
        ("iVersion", ctypes.c_int),
        ("xClose", _CLOSE),
        ("xRead", ctypes.c_void_p),
        ("xWrite", _WRITE),
        ("xTruncate", _TRUNCATE),
        ("xSync", _SYNC),
        ("others", ctypes.c_void_p * 13),
    ]


class _Real:
    """SQLite's own methods of one kind of file; an attribute of a structure is made at each use."""

    def __init__(self, address: int) -> None:
        self.address = address
        self._methods = methods = _Methods.from_address(address)
        self.write, self.truncate, self.close = methods.xWrite, methods.xTruncate, methods.xClose


class _Shim:
    """Registered once a process; `journal` is whose turn it is to note."""

    def __init__(self) -> None:
        with closing(sqlite3.connect(":memory:")):
            library = next(
                line.split()[-1]
                for line in Path("/proc/self/maps").read_text().splitlines()
                if "libsqlite3" in line
            )
        self._library = ctypes.CDLL(library)
        self._library.sqlite3_vfs_find.restype = ctypes.POINTER(_Vfs)
        self._default = self._library.sqlite3_vfs_find(None)
        self.journal: Journal | None = None
        self._paths: dict[int, str] = {}  # of open files, by address
        self._methods: dict[int, _Methods] = {}  # by the address of the real ones
        self._reals: dict[int, _Real] = {}  # by their address
        self._real: dict[int, _Real] = {}  # by the address of the file
        self._vfs = _Vfs.from_buffer_copy(self._default.contents)
        self._vfs.zName = NAME
        self._vfs.xOpen = self._open_callback = _OPEN(self._open)
        self._callbacks = (
            _WRITE(self._write),
            _TRUNCATE(self._truncate),
            _SYNC(self._sync),
            _CLOSE(self._close),
        )

    def register(self) -> None:
        self._library.sqlite3_vfs_register(ctypes.byref(self._vfs), 1)

    def unregister(self) -> None:
        """Files that are still open are SQLite's own again: they may be closed when Python is no more."""
        for file, real in self._real.items():
            ctypes.cast(file, ctypes.POINTER(ctypes.c_void_p))[0] = real.address
        self._real.clear()
        self._paths.clear()
        self._library.sqlite3_vfs_register(self._default, 1)

    def _open(self, vfs: int, name: int | None, file: int, flags: int, out: int | None) -> int:
        code: int = self._default.contents.xOpen(vfs, name, file, flags, out)
        if code != _OK or name is None or not flags & (_WAL | _MAIN | _JOURNAL):
            return code
        path = ctypes.string_at(name).decode()
        if self.journal is not None and self.journal.watching(path):
            at = ctypes.cast(file, ctypes.POINTER(ctypes.c_void_p))
            address = at[0]
            ours = self._methods.get(address)
            if ours is None:
                ours = self._methods[address] = _Methods.from_buffer_copy(_Methods.from_address(address))
                ours.xWrite, ours.xTruncate, ours.xSync, ours.xClose = self._callbacks
            real = self._reals.get(address)
            if real is None:
                real = self._reals[address] = _Real(address)
            self._real[file] = real
            self._paths[file] = path
            self.journal.opened(path)
            at[0] = ctypes.addressof(ours)
        return code

    def _write(self, file: int, data: int, size: int, offset: int) -> int:
        if self.journal is not None:
            path = self._paths[file]
            code = self.journal.failing(path)
            if code:
                return code
            self.journal.wrote(path, offset, ctypes.string_at(data, size))
        done: int = self._real[file].write(file, data, size, offset)
        return done

    def _truncate(self, file: int, size: int) -> int:
        if self.journal is not None:
            self.journal.truncates(self._paths[file], size)
        done: int = self._real[file].truncate(file, size)
        return done

    def _sync(self, file: int, flags: int) -> int:
        if self.journal is not None:
            path = self._paths[file]
            if self.journal.failing(path):
                return _IOERR_FSYNC
            self.journal.synced(path)
        return _OK  # nothing of the simulation outlives this machine's own power

    def _close(self, file: int) -> int:
        real = self._real.pop(file)
        self._paths.pop(file, None)
        done: int = real.close(file)
        return done


_shim: _Shim | None = None
FULL, FAILS = _FULL, 10 | 3 << 8  # SQLITE_FULL, SQLITE_IOERR_WRITE


@contextmanager
def watched() -> Iterator[Journal]:
    """While inside, every database that is opened in this process is on such a disk."""
    global _shim
    if _shim is None:
        _shim = _Shim()
    journal = _shim.journal = Journal()
    _shim.register()
    try:
        yield journal
    finally:
        _shim.journal = None
        journal.close()
        _shim.unregister()
