"""One object gives the line and the metric; repeats are limited and counted, never silent."""

import io
import json

import pytest

from virtbus import telemetry
from virtbus.telemetry import METRICS, BusLost, Notice, Trouble, emit


@pytest.fixture
def log():
    stream = io.StringIO()
    telemetry.configure(level="info", fmt="json", stream=stream)
    telemetry._limiter._seen.clear()
    return lambda: [json.loads(line) for line in stream.getvalue().splitlines()]


def warnings_of(name):
    return METRICS.registry.get_sample_value("virtbus_warnings_total", {"event": name}) or 0


def test_an_event_is_one_line_of_json_with_its_fields(log):
    emit(Notice("hello"))
    (line,) = log()
    assert (line["event"], line["what"], line["level"]) == ("notice", "hello", "info")
    assert line["timestamp"].endswith("Z")


def test_repeats_are_left_out_of_the_log_and_counted_in_the_metric(log):
    before = warnings_of("BusLost")
    for _ in range(50):
        emit(BusLost("amqp", "gone"))
    assert len(log()) == 1
    assert warnings_of("BusLost") == before + 50


def test_the_next_line_says_how_many_were_left_out(log, monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(telemetry.time, "monotonic", lambda: now[0])
    for _ in range(5):
        emit(Trouble("here", "oops"))
    now[0] += 60
    emit(Trouble("here", "oops"))
    assert [line.get("left_out") for line in log()] == [None, 4]


def test_two_places_have_a_line_each(log):
    emit(Trouble("here", "oops"))
    emit(Trouble("there", "oops"))
    assert len(log()) == 2


def test_what_is_rare_has_a_series_before_its_first_time_so_that_a_rate_sees_that():
    value = telemetry.Metrics().registry.get_sample_value
    opened = {"type": "io_error", "origin": "event", "phase": "opened"}
    assert value("virtbus_events_total", opened) == 0
    assert value("virtbus_occurrences_total", {"origin": "reconcile"}) == 0
    assert value("virtbus_occurrences_total", {"origin": "unknown"}) is None  # a consumer's word
    assert value("virtbus_retries_total", {"stage": "libvirt"}) == 0
    value = METRICS.registry.get_sample_value
    assert value("virtbus_warnings_total", {"event": "SpoolSetAside"}) is not None
    assert value("virtbus_warnings_total", {"event": "Notice"}) is None


def test_the_state_gauges_follow_the_events(log):
    emit(telemetry.BusConnected("amqp"))
    assert METRICS.registry.get_sample_value("virtbus_bus_connected") == 1
    emit(BusLost("amqp", "gone"))
    assert METRICS.registry.get_sample_value("virtbus_bus_connected") == 0


def test_plaintext_beyond_loopback_is_a_loud_line_and_a_metric(log):
    emit(telemetry.InsecureTransport("amqp://broker:5672/"))
    (line,) = log()
    assert line["level"] == "warning"
    assert "PLAINTEXT" in line["event"]
    assert METRICS.registry.get_sample_value("virtbus_insecure_transport") == 1
    METRICS.insecure_transport.set(0)
