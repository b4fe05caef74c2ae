"""Shows what passes through a running agent to whoever looks: lossy and bounded, it never slows the path."""

from __future__ import annotations

import json
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, is_dataclass
from datetime import datetime
from enum import Enum
from typing import Any

from virtbus.errors import ConfigError

TAP_STAGES = ("raw", "incident", "published")
TAP_BUFFER = 1000  # lines a reader may lag behind
MAX_READERS = 8


class Taps:
    """Hands copies of what passes to readers; costs one attribute look-up when there are none."""

    def __init__(self) -> None:
        self.active = False
        self._lock = threading.Lock()
        self._readers: list[_TapReader] = []

    def offer(self, stage: str, item: object, stamp: object = None) -> None:
        """Give `item` to every reader of `stage`; drops it for a reader that lags. Never blocks or raises."""
        for reader in tuple(self._readers):
            reader.offer(stage, item, stamp)

    def open(self, stage: str | None, domain: str | None) -> _TapReader:
        """A new reader; raises ConfigError when too many are open."""
        with self._lock:
            if len(self._readers) >= MAX_READERS:
                raise ConfigError(f"{MAX_READERS} taps are open already; close one")
            reader = _TapReader(stage, domain)
            self._readers.append(reader)
            self.active = True
        return reader

    def close(self, reader: _TapReader) -> None:
        """Let a reader go."""
        with self._lock:
            if reader in self._readers:
                self._readers.remove(reader)
            self.active = bool(self._readers)


class _TapReader:
    """One reader's bounded buffer."""

    def __init__(self, stage: str | None, domain: str | None) -> None:
        self._stage, self._domain = stage, domain
        self._lines: deque[tuple[str, int, object, object]] = deque()
        self._filled = threading.Event()
        self.lost = 0

    def offer(self, stage: str, item: object, stamp: object) -> None:
        if self._stage is not None and stage != self._stage:
            return
        if self._domain is not None and self._domain not in _domains(item):
            return
        if len(self._lines) >= TAP_BUFFER:
            self.lost += 1
            return
        self._lines.append((stage, time.time_ns(), item, stamp))
        self._filled.set()

    def take(self, timeout: float) -> list[str]:
        """The waiting lines as JSON; rendering happens here, on the reader's thread."""
        self._filled.wait(timeout)
        self._filled.clear()
        lines = []
        for _ in range(len(self._lines)):  # not what comes meanwhile: in a storm that never ends
            stage, at_ns, item, stamp = self._lines.popleft()
            line = {"stage": stage, "at_ns": at_ns, "item": plain(item), "stamp": plain(stamp)}
            lines.append(json.dumps(line))
        if self.lost:
            lost, self.lost = self.lost, 0
            lines.append(json.dumps({"stage": "tap", "lost": lost}))
        return lines


def _domains(item: object) -> Sequence[str]:
    """What a reader may call the domain of an item: UUID, name or partition key."""
    domain = getattr(item, "domain", None)
    if domain is not None:
        return (domain.uuid, domain.name)
    raw = getattr(item, "raw", item)
    return tuple(str(getattr(raw, name, "")) for name in ("domain_uuid", "domain_name", "key"))


def plain(value: object) -> Any:
    """Dataclasses, enums and times as JSON data."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    return value
