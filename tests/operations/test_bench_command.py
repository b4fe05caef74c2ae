"""`virtbus bench` on the bus that needs no server."""

from __future__ import annotations

import json
from pathlib import Path

from tests.agent.process import virtbus
from virtbus.commands.bench import Latency


def test_it_tells_rate_and_confirm_latency_as_json(tmp_path: Path) -> None:
    told = virtbus("bench", "--bus", "embedded:", "--state-dir", str(tmp_path), "--events", "400", "--json")
    assert told.returncode == 0, told.stderr
    report = json.loads(told.stdout)
    assert report["events"] == 400
    assert report["events_per_second"] > 0
    for name in ("confirm_ms_alone", "confirm_ms_busy"):
        assert 0 < report[name]["p50"] <= report[name]["p95"] <= report[name]["p99"]
    assert "publishing" not in told.stderr  # that is no terminal


def test_the_quantiles_are_those_of_what_was_measured() -> None:
    measured = [number / 1000 for number in range(1000, 0, -1)]
    assert Latency.of(measured) == Latency(p50=501.0, p95=951.0, p99=991.0)
    assert Latency.of([0.002]) == Latency(2.0, 2.0, 2.0)


def test_it_leaves_no_event_on_the_real_bus(tmp_path: Path) -> None:
    bus = f"embedded://{tmp_path}/bus.db"
    assert virtbus("bench", "--bus", bus, "--state-dir", str(tmp_path), "--events", "50").returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_missing_is_one_clear_line(tmp_path: Path) -> None:
    told = virtbus("bench", "--bus", "embedded:", "--state-dir", str(tmp_path / "none"))
    assert told.returncode == 78
    assert told.stderr.splitlines()[-1].startswith(f"virtbus: no file can be made in {tmp_path}/none: ")


def test_a_broker_that_is_away_is_one_clear_line_and_exit_code_69(tmp_path: Path) -> None:
    told = virtbus("bench", "--bus", "amqp://127.0.0.1:1//", "--state-dir", str(tmp_path))
    assert told.returncode == 69
    assert told.stdout == ""
    assert told.stderr.splitlines()[-1].startswith("virtbus: amqp://127.0.0.1:1/: ")


def test_it_measures_a_real_rabbitmq(amqp_url: str, tmp_path: Path) -> None:
    told = virtbus("bench", "--bus", amqp_url, "--state-dir", str(tmp_path), "--events", "300")
    assert told.returncode == 0, told.stderr
    assert "events a second, confirmed" in told.stdout
    head, alone, busy = told.stdout.splitlines()[-3:]
    assert head.split()[-3:] == ["p50", "p95", "p99"]
    for line in (alone, busy):
        p50, p95, p99 = map(float, line.split()[-3:])
        assert 0 < p50 <= p95 <= p99
    assert "guest:guest" not in told.stdout
