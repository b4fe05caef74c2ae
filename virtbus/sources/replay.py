"""Replays recorded callbacks through the same decisions as live ones; every event says `replay`.

For drills, demonstrations and tests: `replay:/path/to/recording.jsonl`, `?speed=10` for ten times as fast,
`?speed=full` for no waiting at all.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event as StopEvent
from typing import Any
from urllib.parse import parse_qs, unquote

from virtbus import redaction
from virtbus.errors import ConfigError, InputMissing, SchemaError
from virtbus.model import Check, Clock, Host, Now
from virtbus.observations import (
    Burst,
    Description,
    DeviceRemoved,
    DomainResumed,
    DomainState,
    Observation,
    RawIoError,
    SourceReady,
)
from virtbus.sources import Sink, SourceOptions, recording
from virtbus.sources.crosscheck import CrossCheck, Verdict
from virtbus.sources.evidence import Look, read_messages
from virtbus.sources.link import PAUSES, SUSPENDED
from virtbus.telemetry import Notice, emit
from virtbus.words import Origin

FULL_SPEED = math.inf


class ReplaySource:
    """A recording as a source; see `virtbus.sources.Source`. After its end it is silent."""

    def __init__(
        self,
        recorded: str | Path | Sequence[str],
        *,
        options: SourceOptions | None = None,
        speed: float = 1.0,
        clock: Callable[[], Now] | None = None,
    ) -> None:
        """A `replay:` URI, a file, or lines. `speed` 1.0 is the original, FULL_SPEED waits for nothing.

        Raises InputMissing when the file can't be read, ConfigError for a `speed` that is not a number.
        """
        self._lines: Sequence[str] | None = None
        self._name = "recording"
        if isinstance(recorded, str):
            recorded, speed = _of_uri(recorded, speed)
        if isinstance(recorded, Path):
            self._name = str(recorded)
        else:
            self._lines = list(recorded)
        self._path = recorded if isinstance(recorded, Path) else None
        self._speed = speed
        self._clock = clock or Clock()
        self._grace = (options or SourceOptions()).grace_seconds
        self._host = Host(name="replay")
        self._descriptions: dict[str, Description] = {}
        self._looks: dict[str, Look] = {}
        self._has_reasons = False
        self._learn()

    # ---- the Source contract

    def run(self, sink: Sink, stop: StopEvent) -> None:
        """Play it once, then wait for `stop`; see Source. Raises SchemaError for a damaged line."""
        sink(self.snapshot())
        began = time.monotonic()
        count = 0
        for at, observations in self._played():
            if not self._wait_until(began, at, stop):
                return
            for observation in observations:
                sink(observation)
            count += len(observations)
        emit(Notice(f"{self._name}: replayed to its end, {count} observations; no more will come"))
        stop.wait()

    def describe(self, domain_uuid: str) -> Description | None:
        """What the recording says of a domain; see Source."""
        return self._descriptions.get(domain_uuid)

    def snapshot(self) -> SourceReady:
        """The domains that the recording describes, all running; see Source."""
        domains = tuple(
            DomainState(uuid, known.domain.name, "running", False, frozenset(known.devices))
            for uuid, known in self._descriptions.items()
        )
        return SourceReady(self._host, self._clock().wall_ns, domains)

    def probe(self) -> Sequence[Check]:
        """Whether it can be read to its end; see Source."""
        try:
            count = sum(1 for record in self._records() if record.get("kind") == "callback")
        except (InputMissing, SchemaError) as error:
            return [
                Check(
                    "replay", "failed", str(error), "record it again: virtbus watch --json", error.exit_code
                )
            ]
        return [Check("replay", "ok", f"{self._name}: {count} recorded callbacks")]

    # ---- playing

    def _wait_until(self, began: float, at: float, stop: StopEvent) -> bool:
        """Sleep until `at` seconds after `began` have passed, at our speed; False on `stop`."""
        wait = 0.0 if self._speed == FULL_SPEED else began + at / self._speed - time.monotonic()
        return not (stop.wait(wait) if wait > 0 else stop.is_set())

    def _played(self) -> Iterator[tuple[float, list[Observation]]]:
        """(seconds after the first callback, what is observed then), in order. Pure but for reading."""
        check = CrossCheck(self._grace)
        first: float | None = None
        at = 0.0
        for record in self._records():
            if record.get("kind") != "callback":
                continue
            stamp = record.get("t")
            if isinstance(stamp, int | float) and math.isfinite(stamp):
                first = stamp if first is None else first
                at = max(at, stamp - first)
            while (due := check.next_due()) is not None and due <= at:
                yield due, self._decided(check, due)
            observations = self._observed(check, record, at)
            if observations:
                yield at, observations
        while (due := check.next_due()) is not None:
            yield due, self._decided(check, due)

    def _observed(self, check: CrossCheck, record: Mapping[str, Any], at: float) -> list[Observation]:
        """What one recorded callback means."""
        ns = self._clock().wall_ns
        uuid, name = recording.domain_uuid(record), str(record.get("name", ""))
        number = record.get("id") if isinstance(record.get("id"), int) else None
        kind = record.get("cb")
        if kind == "IO_ERROR_REASON" or (kind == "IO_ERROR" and not self._has_reasons):
            raw = RawIoError(
                uuid,
                name,
                number,
                redaction.path(str(record.get("srcPath") or "")),
                str(record.get("devAlias") or ""),
                _integer(record.get("action")),
                str(record.get("reason") or ""),
                ns,
            )
            counted = check.event(raw, at) not in (Verdict.KNOWN, Verdict.FOUND)
            return [Burst(raw, int(counted), ns, ns, Origin.REPLAY)]
        if kind == "DEVICE_REMOVED":
            alias = str(record.get("devAlias") or "")
            check.removed(uuid, alias)
            return [DeviceRemoved(uuid, alias, ns)]
        if kind != "LIFECYCLE":
            return []
        event, detail = _integer(record.get("event")), _integer(record.get("detail"))
        found = check.lifecycle(uuid, name, number, event, detail, Now(ns, at))
        look, known = self._looks.get(uuid), self._descriptions.get(uuid)
        if event == SUSPENDED and detail in PAUSES and look is not None:
            check.looked(uuid, replace(look, asked_at=at), known.devices if known else {})
        return [_replayed(each, ns) if isinstance(each, Burst) else each for each in found]

    def _decided(self, check: CrossCheck, due: float) -> list[Observation]:
        ns = self._clock().wall_ns
        out: list[Observation] = []
        devices = {uuid: known.devices for uuid, known in self._descriptions.items()}
        for decision in check.due(due, devices):
            found = [_replayed(burst, ns) for burst in decision.bursts if burst.count]
            out += found
            if found and decision.over:
                out.append(DomainResumed(found[0].raw.domain_uuid, ns))
        return out

    # ---- reading

    def _records(self) -> Iterator[Mapping[str, Any]]:
        if self._path is None:
            yield from recording.read(self._lines or (), self._name)
            return
        try:
            with self._path.open(encoding="utf-8") as lines:
                yield from recording.read(lines, self._name)
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise InputMissing(f"recording {self._path} can't be read: {reason}") from error

    def _learn(self) -> None:
        """Read it once for what is known about host and domains. Raises InputMissing, SchemaError."""
        scenario: Mapping[str, Any] = {}
        name = ""
        for record in self._records():
            kind = record.get("kind")
            if kind == "host":
                self._host = recording.host_of(record)
            elif kind == "domain":
                description = recording.description_of(record, self._name)
                self._descriptions[description.domain.uuid] = description
            elif kind == "scenario":
                scenario = record
            elif kind == "callback":
                name = name or str(record.get("name", ""))
                self._has_reasons = self._has_reasons or record.get("cb") == "IO_ERROR_REASON"
            elif kind == "state_while_failing" and (look := _look_of(record)) is not None:
                self._looks[""] = look
        if scenario and name:
            described = recording.description_of_scenario(scenario, name)
            if described is not None:
                self._descriptions.setdefault(described.domain.uuid, described)
                if "" in self._looks:
                    self._looks[described.domain.uuid] = self._looks[""]


def _replayed(burst: Burst, ns: int) -> Burst:
    return replace(
        burst, raw=burst.raw._replace(observed_at=ns), first_ns=ns, last_ns=ns, origin=Origin.REPLAY
    )


def _look_of(record: Mapping[str, Any]) -> Look | None:
    """A recording's `state_while_failing`: state, diskErrors, messages0 (or the text of an exception)."""
    state = record.get("state")
    if not (isinstance(state, list) and len(state) == 2):
        return None
    errors, messages = record.get("diskErrors"), record.get("messages0")
    return Look(
        state=_integer(state[0]),
        reason=_integer(state[1]),
        disk_errors={str(k): _integer(v) for k, v in errors.items()} if isinstance(errors, dict) else None,
        messages=read_messages([str(m) for m in messages]) if isinstance(messages, list) else None,
    )


def _integer(value: object) -> int:
    return value if isinstance(value, int) else -1


def _of_uri(uri: str, speed: float) -> tuple[Path, float]:
    """`replay:PATH?speed=…`, or a plain path."""
    if not uri.startswith("replay:"):
        return Path(uri), speed
    path, _, query = uri.removeprefix("replay:").partition("?")
    if path.startswith("//"):
        path = path.removeprefix("//")
    options = parse_qs(query, keep_blank_values=True)
    unknown = sorted(options.keys() - {"speed"})
    if unknown:
        raise ConfigError(f"{uri}: unknown option {', '.join(unknown)}; known: speed")
    given = options.get("speed", [""])[-1]
    if given == "full":
        return Path(unquote(path)), FULL_SPEED
    try:
        speed = float(given) if given else speed
    except ValueError:
        speed = -1.0
    if not (0 < speed < math.inf):
        raise ConfigError(f"{uri}: speed={given!r}: expected a number above 0, or full")
    return Path(unquote(path)), speed
