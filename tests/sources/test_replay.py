"""Recordings are played through the same decisions as live callbacks; every event says that it is a drill."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.sources.simulated import Seen
from virtbus.errors import ConfigError, InputMissing, SchemaError
from virtbus.model import Device, DeviceSource, Domain, ErrorPolicy, Host, Hypervisor, Owner
from virtbus.observations import (
    Burst,
    Description,
    DeviceRemoved,
    DomainGone,
    DomainHalted,
    DomainResumed,
    RawIoError,
    SourceReady,
)
from virtbus.sources import SourceOptions, recording
from virtbus.sources.replay import FULL_SPEED, ReplaySource
from virtbus.telemetry import configure
from virtbus.words import Origin

RECORDINGS = sorted((Path(__file__).parents[1] / "data" / "recordings").glob("*.jsonl"))
UUID = "4a1e599b-c22b-493a-85b4-40a340b65693"
DESCRIPTION = Description(
    Domain(UUID, "db1", 3, "running", Owner("openstack", UUID, "web-1", "p1", "shop")),
    {
        "virtio-disk0": Device(
            "virtio-disk0",
            target="vda",
            bus="virtio",
            kind="disk",
            source=DeviceSource("network", "nbd", "disk0", hosts=("unix:/run/nbd",), backing=("/img/base",)),
            policy=ErrorPolicy("stop", "report"),
        )
    },
)


def played(source: ReplaySource) -> Seen:
    """All that it observes, up to its end."""
    seen, stop = Seen(), threading.Event()
    thread = threading.Thread(target=source.run, args=(seen, stop))
    thread.start()
    last = -1
    while len(seen.all) != last:
        last = len(seen.all)
        time.sleep(0.1)
    stop.set()
    thread.join(5)
    assert not thread.is_alive()
    return seen


def bursts(source: ReplaySource) -> list[Burst]:
    return [item for item in played(source).of(Burst) if isinstance(item, Burst)]


def recorded(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def error(at: float, alias: str = "virtio-disk0", action: int = 1) -> str:
    return recording.io_error_line(
        RawIoError(UUID, "db1", 3, "disk0", alias, action, "enospc", int(at * 1e9))
    )


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_a_recorded_scenario_gives_one_error_for_each_that_was_recorded(path: Path) -> None:
    records = recorded(path)
    callbacks = [record for record in records if record.get("cb") == "IO_ERROR_REASON"]
    lost = not callbacks  # the unnamed disk on old libvirt: the pause alone
    told = bursts(ReplaySource(path, speed=FULL_SPEED))
    assert {burst.origin for burst in told} == {Origin.REPLAY}
    assert sum(burst.count for burst in told) == (1 if lost else len(callbacks))
    assert {burst.raw.alias for burst in told} == (
        {"virtio-disk0"} if lost else {record["devAlias"] for record in callbacks}
    )


def test_what_watch_prints_is_what_replay_plays() -> None:
    host = Host("compute-7", UUID, hypervisor=Hypervisor("QEMU", "7.2.0", "9.0.0"))
    lines = [
        recording.host_line(host),
        recording.domain_line(DESCRIPTION),
        error(100.0),
        recording.lifecycle_line(UUID, "db1", 3, event=3, detail=2, ns=int(100e9)),
        recording.lifecycle_line(UUID, "db1", 3, event=4, detail=0, ns=int(101e9)),
        recording.device_removed_line(UUID, "virtio-disk0", int(102e9)),
        recording.lifecycle_line(UUID, "db1", 3, event=5, detail=3, ns=int(103e9)),
    ]
    source = ReplaySource(lines, speed=FULL_SPEED)
    seen = played(source)
    ready, burst, *rest = seen.all
    assert isinstance(ready, SourceReady)
    assert isinstance(burst, Burst)
    assert ready.host == host
    assert (burst.raw.path, burst.raw.alias, burst.raw.reason) == ("disk0", "virtio-disk0", "enospc")
    assert [type(item) for item in rest] == [DomainHalted, DomainResumed, DeviceRemoved, DomainGone]
    assert getattr(rest[-1], "cause", None) == "migrated"
    assert source.describe(UUID) == DESCRIPTION


def test_an_error_of_a_replay_has_the_time_of_the_replay() -> None:
    before = time.time_ns()
    (burst,) = bursts(ReplaySource([error(1.0)], speed=FULL_SPEED))
    assert before <= burst.first_ns <= time.time_ns()


def test_the_original_speed_keeps_the_time_between_callbacks() -> None:
    class Waits(threading.Event):
        """Is never set, and notes how long it was waited for."""

        def __init__(self) -> None:
            super().__init__()
            self.asked: list[float] = []

        def wait(self, timeout: float | None = None) -> bool:
            self.asked += [] if timeout is None else [timeout]
            return False

    lines = [error(10.0), error(1010.0)]
    for speed, seconds in ((1.0, 1000.0), (4.0, 250.0)):
        seen, stop = Seen(), Waits()
        ReplaySource(lines, speed=speed).run(seen, stop)
        assert len(seen.of(Burst)) == 2
        assert seconds - 60 < stop.asked[-1] <= seconds


def test_a_replay_stops_in_the_middle_when_it_is_told_to() -> None:
    stop = threading.Event()
    thread = threading.Thread(target=ReplaySource([error(0.0), error(1000.0)]).run, args=(Seen(), stop))
    thread.start()
    stop.set()
    thread.join(2)
    assert not thread.is_alive()


def test_a_pause_whose_event_was_lost_is_found_in_a_replay_too() -> None:
    lines = [recording.lifecycle_line(UUID, "db1", 3, event=3, detail=2, ns=0)]
    (burst,) = bursts(ReplaySource(lines, speed=FULL_SPEED, options=SourceOptions(grace_seconds=5)))
    assert (burst.origin, burst.count, burst.raw.alias) == (Origin.REPLAY, 1, "")


def test_lines_of_another_kind_are_left_alone() -> None:
    lines = ['{"kind": "later", "x": 1}', "", '{"kind": "callback", "cb": "RTC_CHANGE", "t": 1}', error(1)]
    assert len(bursts(ReplaySource(lines, speed=FULL_SPEED))) == 1


@pytest.mark.parametrize(
    ("lines", "match"),
    [
        (["not json"], "recording:1: not a JSON object"),
        ([error(1), "[1]"], "recording:2: a list"),
        (['{"kind": "domain", "name": 3}'], "domain 3"),
    ],
)
def test_a_damaged_recording_is_refused_with_the_line_that_is_wrong(lines: Sequence[str], match: str) -> None:
    with pytest.raises(SchemaError, match=match):
        ReplaySource(lines)


def test_a_uri_names_file_and_speed(tmp_path: Path) -> None:
    path = tmp_path / "a b.jsonl"
    path.write_text(error(1) + "\n" + error(1000) + "\n")
    assert len(bursts(ReplaySource(f"replay:{tmp_path}/a%20b.jsonl?speed=full"))) == 2
    (check,) = ReplaySource(f"replay:{path}").probe()
    assert (check.status, check.summary) == ("ok", f"{path}: 2 recorded callbacks")


@pytest.mark.parametrize("query", ["speed=0", "speed=-1", "speed=x", "speed=nan", "pace=1"])
def test_a_uri_with_an_option_that_makes_no_sense_is_refused(query: str) -> None:
    with pytest.raises(ConfigError, match=r"speed"):
        ReplaySource(f"replay:/x?{query}")


def test_a_recording_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputMissing, match=r"none\.jsonl can't be read"):
        ReplaySource(f"replay:{tmp_path}/none.jsonl")


def test_the_end_of_a_replay_is_told_in_the_log() -> None:
    log = io.StringIO()
    configure(stream=log, fmt="json")
    try:
        played(ReplaySource([error(1.0), error(2.0)], speed=FULL_SPEED))
    finally:
        configure()
    (line,) = log.getvalue().splitlines()
    assert json.loads(line)["what"] == "recording: replayed to its end, 2 observations; no more will come"
