"""One object gives the line and the metric; repeats are limited and counted, never silent."""

import io
import json
import logging
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from virtbus import telemetry
from virtbus.telemetry import METRICS, BusLost, Notice, Trouble, emit


@pytest.fixture
def log():
    stream = io.StringIO()
    telemetry.configure(level="info", fmt="json", stream=stream)
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


def test_a_value_that_json_does_not_know_is_written_as_text(log):
    emit(Trouble("here", Path("/x")))
    emit(Notice("half a pair: \udc80"))
    assert [line.get("error") or line["what"] for line in log()] == ["/x", "half a pair: \udc80"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_text_is_for_people_and_does_nothing_to_their_terminal(monkeypatch):
    stream = io.StringIO()
    telemetry.configure(level="info", fmt="text", stream=stream)
    emit(Notice("a\x1b[2Jname\nof a guest"))
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z \[info   \] notice {24} what=a\\x1b\[2Jname\\nof a guest\n",
        stream.getvalue(),
    )


def test_colour_is_for_terminals_that_want_it(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured, plain = Terminal(), Terminal()
    telemetry.configure(stream=coloured)
    emit(Notice("hello"))
    monkeypatch.setenv("NO_COLOR", "1")
    telemetry.configure(stream=plain)
    emit(Notice("hello"))
    assert re.sub(r"\x1b\[\d+m", "", coloured.getvalue())[28:] == plain.getvalue()[28:]
    assert "\x1b[32minfo" in coloured.getvalue()
    assert "\x1b" not in plain.getvalue()


def test_lines_below_the_level_are_left_out(log):
    telemetry.configure(level="warning", fmt="json", stream=(stream := io.StringIO()))
    emit(Notice("hello"))
    emit(Trouble("here", "oops"))
    assert [json.loads(line)["level"] for line in stream.getvalue().splitlines()] == ["error"]


def test_a_log_that_can_not_be_written_stops_nothing_and_is_counted():
    stream = io.StringIO()
    telemetry.configure(fmt="json", stream=stream)
    stream.close()
    failures = METRICS.registry.get_sample_value("virtbus_log_failures_total")
    emit(Notice("hello"))
    assert METRICS.registry.get_sample_value("virtbus_log_failures_total") == failures + 1


WRITER = "type('W', (), {'write': lambda self, text: None, 'flush': lambda self: None})()"


@pytest.mark.parametrize("stderr", ["None", WRITER], ids=["none", "no terminal"])
def test_a_process_without_a_standard_error_can_use_the_sdk(stderr):
    code = f"import sys; sys.stderr = {stderr}; import virtbus.consumer; "
    code += "from virtbus.telemetry import Notice, emit; emit(Notice('x')); print('done')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "done"), done


def every_event(cls=telemetry.TelemetryEvent):
    return [each for sub in cls.__subclasses__() for each in (sub, *every_event(sub))]


def test_no_field_of_an_event_hides_what_each_line_has():
    assert len(every_event()) > 20
    for cls in every_event():
        assert not {"event", "level", "timestamp", "left_out"} & {item.name for item in fields(cls)}, cls


def test_in_somebodys_program_the_lines_are_that_programs(caplog):
    logger = logging.getLogger("virtbus")
    kept = logger.handlers, logger.propagate, logger.level
    logger.handlers, logger.propagate = [logging.NullHandler()], True
    try:
        with caplog.at_level("INFO"):
            emit(Notice("hello"))
    finally:
        logger.handlers, logger.propagate, level = kept
        logger.setLevel(level)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("virtbus", "INFO")
    assert record.getMessage() == "notice what=hello"
    assert record.virtbus == {"what": "hello"}
