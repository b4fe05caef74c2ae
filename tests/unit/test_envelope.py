"""Any event → either binding and mode → the same event; and nothing bad gets in or out."""

from __future__ import annotations

import base64
import dataclasses
import gzip
import json
import re
from contextlib import suppress
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from urllib.parse import unquote

import pytest
from cloudevents.core.bindings import kafka as kafka_binding
from cloudevents.core.bindings import rabbitmq as rabbitmq_binding
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests import golden
from virtbus import envelope, schema
from virtbus.envelope import Encoded, Envelope, InvalidEvent
from virtbus.envelope.encoding import sdk_event
from virtbus.errors import SchemaError
from virtbus.model import (
    MAX_COUNT,
    Backlog,
    Binding,
    Device,
    DeviceSource,
    Domain,
    ErrorFacts,
    ErrorPolicy,
    Event,
    Evidence,
    Gap,
    Heartbeat,
    Host,
    Hypervisor,
    Incident,
    IoError,
    IoErrorResolved,
    Message,
    Occurrences,
    OpenIncident,
    OpenIncidents,
    Owner,
    PreviousRun,
    Resolution,
    ResolvedOccurrences,
    SequenceRange,
    SourceHealth,
    Stamp,
)
from virtbus.words import Action, Origin, Phase, Platform, Scope

STAMP = golden.stamp(42)
MODES = [(binding, structured) for binding in Binding for structured in (False, True)]
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")


def message(
    binding: Binding,
    headers: dict[Any, Any],
    body: bytes,
    content_type: str | None = None,
    key: str | None = None,
) -> Message:
    return Message(binding, headers, content_type, body, key, False, None, "queue#1")


def sent(encoded: Encoded, binding: Binding, *, structured: bool) -> Message:
    """The message as the other side's client library would hand it over."""
    if binding is Binding.AMQP:
        wire = envelope.to_amqp(*encoded, structured=structured)
        return message(binding, dict(wire.headers), wire.body, wire.content_type)
    record = envelope.to_kafka(*encoded, structured=structured)
    headers = {name: value.encode() for name, value in record.headers}
    return message(binding, headers, record.value, None, record.key.decode())


# ------------------------------------------------------------------------------- whatever libvirt can give

# libvirt hands over UTF-8: any character but NUL and lone surrogates.
words = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
maybe = st.none() | words
counts = st.integers(0, MAX_COUNT)
floats = st.floats(0, 1e9, allow_nan=False)
uuids = st.uuids().map(str)
times = st.datetimes(datetime(2000, 1, 1), datetime(2200, 12, 31, 23), timezones=st.just(UTC))
hosts = st.builds(Host, words, maybe, maybe, st.builds(Hypervisor, maybe, maybe, maybe))
owners = st.builds(Owner, words, maybe, maybe, maybe, maybe, maybe, maybe)
domains = st.builds(Domain, uuids, words, st.none() | counts, maybe, st.none() | owners)
lists = st.lists(words, max_size=3).map(tuple)
sources = st.builds(DeviceSource, words, maybe, maybe, maybe, maybe, lists, maybe, lists)
policies = st.builds(ErrorPolicy, maybe, maybe)
devices = st.builds(
    Device, maybe, maybe, maybe, maybe, maybe, st.none() | sources, st.none() | policies, st.none() | counts
)
optional = st.none() | counts
evidence = st.builds(Evidence, words, words, maybe, optional, optional, optional)
facts = st.builds(
    ErrorFacts,
    st.sampled_from(Action),
    st.none() | st.integers(-(2**31), 2**31 - 1),
    maybe,
    maybe,
    maybe,
    maybe,
    times,
    st.lists(evidence, max_size=2).map(tuple),
)
incidents = st.builds(
    Incident,
    uuids,
    st.sampled_from(Phase),
    times,
    counts,
    st.booleans(),
    st.none() | floats,
    st.sampled_from(Scope),
)
io_errors = st.builds(
    IoError,
    hosts,
    domains,
    devices,
    facts,
    st.builds(Occurrences, counts, counts, times, times, st.booleans()),
    incidents,
    st.sampled_from(Origin),
    st.booleans(),
)
resolved = st.builds(
    IoErrorResolved,
    hosts,
    domains,
    devices,
    st.builds(ResolvedOccurrences, counts, times, times, st.booleans()),
    incidents,
    st.builds(Resolution, words, times, floats),
)
ranges = st.builds(SequenceRange, uuids, st.integers(1, 2**53), st.integers(1, 2**53))
gaps = st.builds(
    Gap,
    st.none() | hosts,
    uuids,
    words,
    maybe,
    st.none() | times,
    times,
    st.none() | st.builds(PreviousRun, uuids, counts),
    st.lists(ranges, max_size=3).map(tuple),
    counts,
    counts,
    counts,
)
open_incidents = st.builds(
    OpenIncident,
    uuids,
    uuids,
    words,
    devices,
    st.sampled_from(Action),
    maybe,
    times,
    times,
    counts,
    counts,
    st.booleans(),
    st.booleans(),
    st.sampled_from(Scope),
)
heartbeats = st.builds(
    Heartbeat,
    st.none() | hosts,
    uuids,
    words,
    uuids,
    times,
    times,
    st.floats(0, 3600),
    st.builds(SourceHealth, words, times),
    st.builds(Backlog, counts, counts, st.none() | floats),
    counts,
    counts,
    st.builds(OpenIncidents, counts, st.lists(open_incidents, max_size=2).map(tuple)),
)
relaxed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])


def check_round_trip(event: Event) -> None:
    encoded = envelope.encode(event, STAMP)
    assert not any(CONTROLS.search(value) for value in encoded.attributes.values())
    assert json.loads(encoded.body)["truncated"] == []
    for binding, structured in MODES:
        received = sent(encoded, binding, structured=structured)
        decoded = envelope.decode(received)
        assert decoded.attributes == encoded.attributes
        assert decoded.body == encoded.body
        assert envelope.to_event(decoded) == event


@settings(relaxed, max_examples=1000)
@given(event=io_errors)
def test_any_error_arrives_with_the_same_facts_in_each_mode_and_binding(event: IoError) -> None:
    check_round_trip(event)
    alias = event.device.alias
    subject = envelope.encode(event, STAMP).attributes["subject"]
    assert subject == f"{event.domain.uuid}/" + ("-" if not alias else subject.partition("/")[2])
    if alias:
        assert unquote(subject.partition("/")[2]) == alias


@settings(relaxed, max_examples=150)
@given(event=st.one_of(resolved, gaps, heartbeats))
def test_any_other_event_arrives_with_the_same_facts_in_each_mode_and_binding(event: Event) -> None:
    check_round_trip(event)


@pytest.mark.parametrize("case", golden.cases(), ids=lambda case: case.name)
def test_a_real_event_arrives_with_the_same_facts(case: golden.Case) -> None:
    check_round_trip(case.event)


# ------------------------------------------------------------------------------------------- what goes out


def named(name: str, **more: Any) -> IoError:
    return dataclasses.replace(golden.FULL, domain=Domain(golden.DOMAIN, name), **more)


@settings(relaxed, max_examples=150)
@given(text=st.text(st.characters(), min_size=1, max_size=40))
@example("\ud800\udc00")
@example("\udcff")
@example("\x00\x1f\x7f\x85\u2028\ufffe")
def test_text_that_is_not_even_unicode_goes_out_visibly_replaced(text: str) -> None:
    event = named(text, device=Device(text))
    encoded = envelope.encode(event, STAMP)
    name = json.loads(encoded.body)["domain"]["name"]
    assert name == re.sub("[\ud800-\udfff]", "\ufffd", text)
    assert not any(CONTROLS.search(value) for value in encoded.attributes.values())
    for binding, structured in MODES:
        assert envelope.to_event(envelope.decode(sent(encoded, binding, structured=structured))) is not None


def test_the_exact_name_stays_in_the_data_whatever_it_holds() -> None:
    name = 'tab\t nl\n bell\x07 "quote" \\ / ☃ 🐛 \u2028'
    assert json.loads(envelope.encode(named(name), STAMP).body)["domain"]["name"] == name


def test_the_attributes_are_those_of_the_contract() -> None:
    attributes = envelope.encode(golden.FULL, golden.stamp(7)).attributes
    assert attributes == {
        "specversion": "1.0",
        "id": "0193512b-1111-7222-8333-000000000007",
        "source": f"/virtbus/agents/{golden.AGENT}",
        "type": "io.virtbus.domain.io_error.v1",
        "subject": f"{golden.DOMAIN}/virtio-disk0",
        "time": "2026-11-22T13:02:38.000000Z",
        "datacontenttype": "application/json",
        "dataschema": schema.latest(IoError.TYPE).id,
        "partitionkey": golden.DOMAIN,
        "epoch": golden.EPOCH,
        "sequence": "000000000007",
        "recordedtime": "2026-11-22T13:07:41.000008Z",
        "severitytext": "ERROR",
        "severitynumber": "17",
    }


def test_a_heartbeat_has_an_epoch_and_no_sequence() -> None:
    attributes = envelope.encode(golden.HEARTBEAT, golden.stamp(7, sequence=False)).attributes
    assert attributes["epoch"] == golden.EPOCH
    assert "sequence" not in attributes


@pytest.mark.parametrize(
    ("event", "severity"),
    [
        (golden.FULL, ("ERROR", "17")),
        (
            dataclasses.replace(
                golden.FULL, error=dataclasses.replace(golden.FULL.error, action=Action.REPORT)
            ),
            ("WARN", "13"),
        ),
        (
            dataclasses.replace(
                golden.FULL, error=dataclasses.replace(golden.FULL.error, action=Action.NONE)
            ),
            ("INFO", "9"),
        ),
        (golden.RESOLVED, ("INFO", "9")),
        (golden.AGENT_DOWN, ("WARN", "13")),
        (golden.HEARTBEAT, ("DEBUG", "5")),
    ],
)
def test_the_severity_is_opentelemetrys(event: Event, severity: tuple[str, str]) -> None:
    attributes = envelope.encode(event, STAMP).attributes
    assert (attributes["severitytext"], attributes["severitynumber"]) == severity


@pytest.mark.parametrize(
    ("event", "key", "word", "last"),
    [
        (golden.FULL, golden.DOMAIN, "io_error", golden.DOMAIN),
        (golden.RESOLVED, golden.DOMAIN, "resolved", golden.DOMAIN),
        (golden.AGENT_DOWN, golden.AGENT, "gap", "-"),
        (golden.HEARTBEAT, golden.AGENT, "heartbeat", "-"),
    ],
)
def test_keys_are_those_of_the_contract(event: Event, key: str, word: str, last: str) -> None:
    encoded = envelope.encode(event, STAMP)
    assert encoded.attributes["partitionkey"] == key
    assert envelope.routing_key(encoded.attributes) == f"{word}.{golden.AGENT}.{last}"
    assert envelope.to_kafka(*encoded).key == key.encode()
    assert envelope.record(encoded, STAMP, row=3).key == key


def test_a_time_of_another_zone_goes_out_in_utc_with_six_digits() -> None:
    moment = datetime(2026, 1, 1, 2, 0, tzinfo=timezone(timedelta(hours=2)))
    event = dataclasses.replace(golden.RESOLVED, resolution=Resolution("resumed", moment, 1.0))
    encoded = envelope.encode(event, STAMP)
    assert encoded.attributes["time"] == "2026-01-01T00:00:00.000000Z"
    assert envelope.to_amqp(*encoded).headers["ce-time"] == "2026-01-01T00:00:00.000000Z"
    assert dict(envelope.to_kafka(*encoded).headers)["ce_time"] == "2026-01-01T00:00:00.000000Z"


def test_amqp_carries_the_content_type_as_a_property_and_as_a_header() -> None:
    encoded = envelope.encode(golden.FULL, STAMP)
    binary = envelope.to_amqp(*encoded)
    structured = envelope.to_amqp(*encoded, structured=True)
    assert binary.content_type == binary.headers["content-type"] == "application/json"
    assert structured.content_type == structured.headers["content-type"] == "application/cloudevents+json"
    assert set(structured.headers) == {"content-type"}


@pytest.mark.parametrize("structured", [False, True])
def test_headers_hold_text_and_nothing_else(structured: bool) -> None:
    encoded = envelope.encode(golden.FULL, STAMP)
    amqp = envelope.to_amqp(*encoded, structured=structured).headers
    kafka = envelope.to_kafka(*encoded, structured=structured).headers
    assert {type(value) for value in amqp.values()} == {str}
    assert {type(value) for _, value in kafka} == {str}


@pytest.mark.parametrize("case", golden.cases(), ids=lambda case: case.name)
def test_binary_headers_are_those_of_the_sdks_own_bindings(case: golden.Case) -> None:
    """They are written straight, for speed; the SDK only leaves out microseconds that are zero."""
    encoded = envelope.encode(case.event, case.stamp)
    event = sdk_event(encoded.attributes, encoded.body)
    amqp = rabbitmq_binding.to_binary_event(event)
    ours = envelope.to_amqp(encoded.attributes, encoded.body)
    assert ours.headers == {
        **amqp.headers,
        "ce-time": encoded.attributes["time"],
        "content-type": amqp.content_type,
    }
    assert (ours.content_type, ours.body) == (amqp.content_type, amqp.body)
    kafka = kafka_binding.to_binary_event(event)
    sent = envelope.to_kafka(encoded.attributes, encoded.body)
    headers = {name: value.encode() for name, value in sent.headers}
    assert headers == {**kafka.headers, "ce_time": encoded.attributes["time"].encode()}
    assert (sent.key.decode(), sent.value) == (kafka.key, kafka.value)


def test_two_events_made_from_the_same_attributes_share_nothing() -> None:
    encoded = envelope.encode(golden.FULL, STAMP)
    before = dict(encoded.attributes)
    first = envelope.to_amqp(*encoded)
    first.headers["ce-id"] = "changed"
    assert encoded.attributes == before
    assert envelope.to_amqp(*encoded).headers["ce-id"] == STAMP.id


def test_structured_json_is_one_line_with_sorted_keys_and_a_number_as_severity() -> None:
    line = envelope.structured_json(*envelope.encode(named("two\nlines"), STAMP))
    assert b"\n" not in line
    event = json.loads(line)
    assert list(event) == sorted(event)
    assert event["severitynumber"] == 17
    assert event["sequence"] == "000000000042"
    assert schema.validate(schema.ENVELOPE, event) == []


def test_structured_json_of_a_strangers_indented_data_is_one_line() -> None:
    line = envelope.structured_json({"id": "1"}, b'{\n "a": 1\n}')
    assert line == b'{"data":{"a":1},"id":"1"}'


def test_an_event_that_breaks_its_schema_is_told_and_still_handed_over() -> None:
    bad = dataclasses.replace(golden.FULL, domain=Domain("not a\nuuid", "web-1"))
    with pytest.raises(InvalidEvent, match="/domain/uuid") as raised:
        envelope.encode(bad, STAMP)
    encoded = raised.value.encoded
    assert json.loads(encoded.body)["domain"]["uuid"] == "not a\nuuid"
    assert encoded.attributes["id"] == STAMP.id
    assert not any(CONTROLS.search(value) for value in encoded.attributes.values())
    assert envelope.record(encoded, STAMP).id == STAMP.id


def test_a_value_that_no_schema_takes_is_a_dead_letter_and_no_crash() -> None:
    bad: Any = {"a", "set"}
    with pytest.raises(InvalidEvent, match="/domain/state"):
        envelope.encode(
            dataclasses.replace(golden.FULL, domain=Domain(golden.DOMAIN, "web-1", 7, bad)), STAMP
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_a_number_never_goes_out(value: float) -> None:
    beat = dataclasses.replace(golden.HEARTBEAT, backlog=Backlog(0, 0, value))
    assert json.loads(envelope.encode(beat, STAMP).body)["backlog"]["oldest_seconds"] is None
    with pytest.raises(InvalidEvent, match="/interval_seconds"):
        envelope.encode(dataclasses.replace(golden.HEARTBEAT, interval_seconds=value), STAMP)


# ------------------------------------------------------------------------------------------------ the size


def total(encoded: Encoded, binding: Binding, *, structured: bool) -> int:
    received = sent(encoded, binding, structured=structured)
    # AMQP: one length octet a name, five a value (type and length). Kafka: up to five octets each.
    headers = sum(len(str(name)) + len(value) + 10 for name, value in received.headers.items())  # type: ignore[arg-type]
    return headers + len(received.body) + len(received.key or "")


def crowded(letter: str) -> Heartbeat:
    """A hundred incidents, each on a disk of a hundred storage hosts and a hundred images."""
    names = tuple(f"{number:03d}" + letter * 100 for number in range(100))
    incident = dataclasses.replace(
        golden.HEARTBEAT.incidents.items[0],
        device=Device("vda", source=DeviceSource("network", hosts=names, backing=names)),
    )
    return dataclasses.replace(golden.HEARTBEAT, incidents=OpenIncidents(100, (incident,) * 100))


BIG = 300_000
TOO_LARGE: dict[str, Event] = {
    "a name of ASCII": named("x" * BIG),
    "a name of control characters": named("\x01" * BIG),
    "a name beyond the first plane": named("🐛" * BIG),
    "a name of lone surrogates": named("\udc80" * BIG),
    "an alias": named("web-1", device=Device("☃" * BIG)),
    "a backing chain": named(
        "web-1",
        device=Device("vda", source=DeviceSource("file", backing=tuple("/image" * 20 for _ in range(5000)))),
    ),
    "evidence": dataclasses.replace(
        golden.FULL,
        error=dataclasses.replace(
            golden.FULL.error, evidence=(Evidence("messages", "confirms", "x" * 900),) * 500
        ),
    ),
    "storage hosts": named(
        "web-1", device=Device("vda", source=DeviceSource("network", hosts=("h:1",) * 100_000))
    ),
    "everything": IoError(
        Host("h" * BIG, "u" * BIG, "b" * BIG, Hypervisor("k" * BIG, "v" * BIG, "l" * BIG)),
        Domain(golden.DOMAIN, "n" * BIG, 1, "s" * BIG, Owner(*["o" * BIG] * 7)),
        Device(
            *["d" * BIG] * 5,
            DeviceSource("t", "p", "x" * BIG, None, None, ("h" * BIG,) * 99, None, ("b" * BIG,) * 99),
        ),
        dataclasses.replace(golden.FULL.error, reason="r" * BIG, path="p" * BIG, message="m" * BIG),
        golden.FULL.occurrences,
        golden.FULL.incident,
        Origin.EVENT,
        True,
    ),
    "a heartbeat of a hundred incidents with long names": dataclasses.replace(
        golden.HEARTBEAT,
        incidents=OpenIncidents(
            100, (dataclasses.replace(golden.HEARTBEAT.incidents.items[0], domain_name="☃" * 5000),) * 100
        ),
    ),
    "a heartbeat of a hundred incidents on many hosts and images": crowded("x"),
    "the same in characters that need six bytes each": crowded("\x01"),
    "a gap of many ranges": dataclasses.replace(
        golden.SPOOL_FULL, missing=(SequenceRange(golden.EPOCH, 1, 2),) * 5000
    ),
    "a resolution": dataclasses.replace(golden.RESOLVED, resolution=Resolution("c" * BIG, golden.T1, 1.0)),
}


@pytest.mark.parametrize("event", TOO_LARGE.values(), ids=TOO_LARGE)
def test_too_large_an_event_is_cut_visibly_and_names_what(event: Event) -> None:
    encoded = envelope.encode(event, STAMP)
    for binding, structured in MODES:
        assert total(encoded, binding, structured=structured) < envelope.MAX_WIRE_BYTES
    data = json.loads(encoded.body)
    assert data["truncated"]
    assert len(data["truncated"]) <= 100
    for pointer in data["truncated"]:
        node = data
        for part in pointer.split("/")[1:]:
            node = node[int(part)] if isinstance(node, list) else node[part]
        assert node.endswith("…") if isinstance(node, str) else isinstance(node, list | dict)


@pytest.mark.parametrize("letter", ["x", "☃", "\x01"])
def test_however_much_is_cut_what_names_an_incident_and_its_guest_stays_whole(letter: str) -> None:
    whole = golden.HEARTBEAT.incidents.items[0]
    data = json.loads(envelope.encode(crowded(letter), STAMP).body)
    assert data["incidents"]["total"] == 100
    assert data["incidents"]["items"]
    for item in data["incidents"]["items"]:
        assert (item["id"], item["domain_uuid"]) == (whole.id, whole.domain_uuid)


def test_what_is_not_too_large_keeps_every_character() -> None:
    event = named("x" * 40_000)
    assert (
        envelope.to_event(
            envelope.decode_structured(envelope.structured_json(*envelope.encode(event, STAMP)))
        )
        == event
    )


def test_short_facts_survive_beside_one_that_is_cut() -> None:
    data = json.loads(envelope.encode(named("x" * BIG), STAMP).body)
    assert data["truncated"] == ["/domain/name"]
    assert data["device"]["alias"] == "virtio-disk0"
    assert data["error"]["path"] == "/a/path"


def test_a_typical_event_is_far_from_the_limit() -> None:
    assert len(envelope.encode(golden.FULL, STAMP).body) < 4096


# -------------------------------------------------------------------------------------------- what comes in

KAFKA = {
    "ce_specversion": b"1.0",
    "ce_id": b"1",
    "ce_type": b"com.example.thing",
    "ce_source": b"/somewhere",
    "content-type": b"application/json",
}
AMQP = {"ce-specversion": "1.0", "ce-id": "1", "ce-type": "com.example.thing", "ce-source": "/somewhere"}
STRUCTURED = {
    "specversion": "1.0",
    "id": "1",
    "type": "com.example.thing",
    "source": "/somewhere",
    "data": {"a": 1},
}


def structured(event: object) -> Envelope:
    return envelope.decode_structured(json.dumps(event).encode())


@pytest.mark.parametrize(
    "content_type",
    [
        "application/cloudevents+json",
        "application/cloudevents+json; charset=utf-8",
        "Application/CloudEvents+JSON",
    ],
)
def test_kafka_is_structured_when_the_content_type_says_so_whatever_other_headers_say(
    content_type: str,
) -> None:
    body = json.dumps(STRUCTURED).encode()
    headers = {"content-type": content_type.encode(), "ce_id": b"not this one"}
    decoded = envelope.decode(message(Binding.KAFKA, headers, body))
    assert decoded.attributes["id"] == "1"
    assert decoded.data == {"a": 1}


def test_kafka_is_binary_when_the_content_type_is_the_datas() -> None:
    decoded = envelope.decode(message(Binding.KAFKA, KAFKA, b'{"a": 1}'))
    assert decoded.attributes == {
        "specversion": "1.0",
        "id": "1",
        "type": "com.example.thing",
        "source": "/somewhere",
        "datacontenttype": "application/json",
    }
    assert decoded.body == b'{"a": 1}'


@pytest.mark.parametrize("content_type", ["application/json", None])
def test_amqp_takes_the_content_type_from_the_property_or_the_header(content_type: str | None) -> None:
    headers = AMQP if content_type else {**AMQP, "content-type": "application/json"}
    decoded = envelope.decode(message(Binding.AMQP, headers, b"{}", content_type))
    assert decoded.attributes["datacontenttype"] == "application/json"


def test_header_names_are_read_in_any_case_and_as_bytes() -> None:
    headers = {
        b"CE-SpecVersion": b"1.0",
        "CE-ID": b"1",
        b"ce-type": "t",
        "ce-source": "/s",
        "x-other": object(),
    }
    assert envelope.decode(message(Binding.AMQP, headers, b"{}")).attributes["id"] == "1"


def test_numbers_and_booleans_of_other_senders_become_canonical_text() -> None:
    read = structured({**STRUCTURED, "number": 17, "yes": True, "nothing": None})
    assert (read.attributes["number"], read.attributes["yes"]) == ("17", "true")
    assert "nothing" not in read.attributes
    headers = {**AMQP, "ce-number": 17, "ce-yes": False, "ce-when": datetime(2026, 1, 1, tzinfo=UTC)}
    attributes = envelope.decode(message(Binding.AMQP, headers, b"{}")).attributes
    assert (attributes["number"], attributes["yes"]) == ("17", "false")
    assert attributes["when"] == "2026-01-01T00:00:00.000000Z"


def test_base64_data_is_read() -> None:
    event = {name: value for name, value in STRUCTURED.items() if name != "data"}
    read = structured({**event, "data_base64": base64.b64encode(b'{"a":1}').decode()})
    assert read.data == {"a": 1}


JUNK_HEADERS: dict[str, dict[Any, Any]] = {
    "no attributes": {"x-a": "b"},
    "no specversion": {**AMQP, "ce-specversion": ""},
    "an old specversion": {**AMQP, "ce-specversion": "0.3"},
    "no id": {**AMQP, "ce-id": ""},
    "no type": {key: value for key, value in AMQP.items() if key != "ce-type"},
    "twice, differently": {**AMQP, "CE-ID": "2"},
    "an odd name": {**AMQP, "ce-odd_name": "x"},
    "an empty name": {**AMQP, "ce-": "x"},
    "a value that is a list": {**AMQP, "ce-x": ["a"]},
    "a number of 5,000 digits": {**AMQP, "ce-x": 10**5000},
    "a value that is not UTF-8": {**AMQP, "ce-x": b"\xff"},
    "a name that is not UTF-8": {**AMQP, b"ce-\xff": "x"},
    "a control character": {**AMQP, "ce-x": "a\nb"},
    "a lone surrogate": {**AMQP, "ce-x": "\ud800"},
    "a time that is none": {**AMQP, "ce-time": "yesterday"},
    "a batch": {**AMQP, "content-type": "application/cloudevents-batch+json"},
    "a format nobody asked for": {**AMQP, "content-type": "application/cloudevents+avro"},
}


@pytest.mark.parametrize("headers", JUNK_HEADERS.values(), ids=JUNK_HEADERS)
def test_junk_headers_are_one_clear_error(headers: dict[Any, Any]) -> None:
    with pytest.raises(SchemaError) as raised:
        envelope.decode(message(Binding.AMQP, headers, b"{}"))
    assert "\n" not in str(raised.value)


OURS = {**AMQP, "ce-type": "io.virtbus.agent.gap.v1"}
ALLOWED: dict[str, tuple[dict[Any, Any], bytes]] = {
    "no data": (AMQP, b""),
    "a list": (AMQP, b"[]"),
    "a text that says so": ({**AMQP, "content-type": "text/plain"}, b"hello"),
    "anything, without a content type": ({**AMQP, "content-type": None}, b"\xff\x00"),
    "a void header": ({**AMQP, "ce-subject": None}, b"{}"),
    "a time as an AMQP timestamp": ({**AMQP, "ce-time": datetime(2026, 3, 14, 9, 26, 53)}, b"{}"),
    "a time of twelve digits": ({**AMQP, "ce-time": "2026-03-14T09:26:53.123456789012Z"}, b"{}"),
    "a time with a blank": ({**AMQP, "ce-time": "2026-03-14 09:26:53Z"}, b"{}"),
    "a fraction": ({**AMQP, "ce-ratio": 0.5}, b"{}"),
    "the names of AMQP 1.0": ({f"cloudEvents:{name[3:]}": value for name, value in AMQP.items()}, b"{}"),
    "the other names of AMQP 1.0": ({f"cloudEvents_{name[3:]}": AMQP[name] for name in AMQP}, b"{}"),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_what_the_specifications_allow_others_is_read(name: str) -> None:
    headers, body = ALLOWED[name]
    content_type = None if "content-type" in headers else "application/json"
    read = envelope.decode(message(Binding.AMQP, headers, body, content_type))
    assert (read.attributes["id"], read.attributes["type"], read.body) == ("1", "com.example.thing", body)
    assert read.data == {}
    assert envelope.to_event(read) is None


@pytest.mark.parametrize("body", [b"", b"[]", b"hello"])
def test_an_event_of_ours_without_a_json_object_is_one_clear_error(body: bytes) -> None:
    with pytest.raises(SchemaError):
        envelope.decode(message(Binding.AMQP, OURS, body))


def test_a_structured_event_may_have_no_data_or_any() -> None:
    assert structured({key: value for key, value in STRUCTURED.items() if key != "data"}).body == b""
    assert structured({**STRUCTURED, "data": [1]}).body == b"[1]"


def test_a_structured_text_is_the_text_and_not_its_json() -> None:
    assert (
        structured({**STRUCTURED, "datacontenttype": "text/plain", "data": "two\nlines"}).body
        == b"two\nlines"
    )
    assert structured({**STRUCTURED, "datacontenttype": "application/json", "data": "a"}).body == b'"a"'


@pytest.mark.parametrize(
    ("content_type", "body", "member"),
    [
        ("text/plain", b"two\nlines", {"data": "two\nlines"}),
        ("text/plain", b'"quoted"', {"data": '"quoted"'}),
        ("application/xml", "<ä/>".encode(), {"data": "<ä/>"}),
        ("application/octet-stream", b"\x00\xff", {"data_base64": "AP8="}),
        ("application/json", b'{\n"a": [1]\n}', {"data": {"a": [1]}}),
        ("application/json", gzip.compress(b"{}", mtime=0), None),
        (None, b"1", {"data": 1}),
        (None, b"no\r\njson", {"data_base64": "bm8NCmpzb24="}),
        (None, b"", {}),
    ],
)
def test_an_event_of_others_is_one_line_of_json_whatever_its_data_are(
    content_type: str | None, body: bytes, member: dict[str, Any] | None
) -> None:
    read = envelope.decode(message(Binding.AMQP, {**AMQP, "content-type": content_type}, body))
    line = envelope.structured_json(read.attributes, read.body)
    assert b"\n" not in line
    if member is not None:
        told = json.loads(line)
        assert {name: told[name] for name in ("data", "data_base64") if name in told} == member
    again = envelope.decode_structured(line)
    assert again.attributes == read.attributes
    if content_type != "application/json":  # blanks in JSON say nothing
        assert again.body == body


def test_an_amqp_timestamp_is_utc() -> None:
    headers = {**AMQP, "ce-time": datetime(2026, 3, 14, 9, 26, 53)}
    read = envelope.decode(message(Binding.AMQP, headers, b"{}"))
    assert read.attributes["time"] == "2026-03-14T09:26:53.000000Z"


def test_without_validation_what_does_not_fit_its_type_is_raw() -> None:
    read = envelope.decode(message(Binding.AMQP, OURS, b'{"not": "a gap"}'))
    assert envelope.to_event(read, validate=False) is None
    with pytest.raises(SchemaError):
        envelope.to_event(read)


@pytest.mark.parametrize(
    ("body", "told"),
    [
        (b"", "it is empty"),
        (gzip.compress(b"{}", mtime=0), "compressed (gzip)"),
        ("{}".encode("utf-16"), "UTF-16"),
        (b"\0\0\0\0\7{}", "the id of a schema registry"),
    ],
)
def test_a_body_in_another_format_is_told_by_its_name(body: bytes, told: str) -> None:
    with pytest.raises(SchemaError, match=re.escape(told)):
        envelope.decode(message(Binding.AMQP, OURS, body))
    theirs = message(Binding.AMQP, {**AMQP, "content-type": "application/json"}, body)
    assert (envelope.decode(theirs).data, envelope.decode(theirs).body) == ({}, body), "not ours to judge"


LATIN, EBCDIC = '{"a":"é"}'.encode("latin-1"), '{"a":"é"}'.encode("cp037")


@pytest.mark.parametrize("binding", Binding)
@pytest.mark.parametrize(
    ("content_type", "encoding", "body", "found"),
    [
        ("application/json; charset=latin-1", None, LATIN, "its charset is 'latin-1'"),
        ('application/json;x=y; Charset="ISO-8859-1"', None, LATIN, "its charset is 'ISO-8859-1'"),
        ("application/json; charset=utf-16", None, '{"a":1}'.encode("utf-16-le"), "its charset is 'utf-16'"),
        ("application/json; charset=nobody-knows", None, EBCDIC, "its charset is 'nobody-knows'"),
        ("application/json; charset=utf-8", None, LATIN, "byte 0xe9 is not UTF-8"),
        ("application/json", None, LATIN, "byte 0xe9 is not UTF-8"),
        ("application/json", None, '{"a":1}'.encode("utf-16-le"), "it is UTF-16"),
        ("application/json", None, '{"a":1}'.encode("utf-16-be"), "it is UTF-16"),
        ("application/json", None, '{"a":1}'.encode("utf-32"), "it is UTF-32"),
        ("application/json", "latin-1", LATIN, "its content encoding is 'latin-1'"),
        ("application/json", "br", b"\x8b\x03\x80{}\x03", "its content encoding is 'br'"),
        ("application/cloudevents+json; charset=latin-1", None, LATIN, "its charset is 'latin-1'"),
        ("application/cloudevents+json", None, LATIN, "byte 0xe9 is not UTF-8"),
    ],
)
def test_json_in_another_charset_is_refused_by_its_name(
    binding: Binding, content_type: str, encoding: str | None, body: bytes, found: str
) -> None:
    headers: dict[Any, Any] = OURS
    if binding is Binding.KAFKA:
        headers = {**KAFKA, "ce_type": OURS["ce-type"].encode(), "content-type": content_type.encode()}
    theirs = dataclasses.replace(message(binding, headers, body, content_type), content_encoding=encoding)
    with pytest.raises(SchemaError, match=re.escape(found)) as raised:
        envelope.decode(theirs)
    assert str(raised.value).endswith("JSON is sent as UTF-8")
    assert "codec" not in str(raised.value)


@pytest.mark.parametrize("charset", ["utf-8", "UTF8", "us-ascii", "latin-1"])
def test_what_is_utf_8_is_read_whatever_it_says_of_itself(charset: str) -> None:
    read = envelope.decode(message(Binding.AMQP, AMQP, b'{"a":1}', f"application/json; charset={charset}"))
    assert read.data == {"a": 1}


def test_broken_json_in_utf_8_has_no_charset_to_blame() -> None:
    with pytest.raises(SchemaError) as raised:
        envelope.decode(message(Binding.AMQP, OURS, b'{"a":', "application/json; charset=utf-8"))
    assert "UTF-8" not in str(raised.value)


JUNK_BODIES = {
    "not JSON": b"hello",
    "not UTF-8": b'{"a":"\xff"}',
    "a byte order mark": b"\xef\xbb\xbf{}",
    "two values": b"{}{}",
    "not a number": b'{"a":NaN}',
    "a number of 5,000 digits": b'{"a":' + b"9" * 5000 + b"}",
    "infinite": b'{"a":1e999}',
    "a lone surrogate": b'{"a":"\\ud800"}',
    "cut off": b'{"a":',
    "too deep": b'{"a":' * 100_000,
    "too large": b'{"a":"' + b"x" * envelope.MAX_DECODE_BYTES + b'"}',
}


@pytest.mark.parametrize("body", JUNK_BODIES.values(), ids=JUNK_BODIES)
def test_a_junk_body_is_one_clear_error(body: bytes) -> None:
    for headers in (OURS, {**AMQP, "content-type": "application/json"}):  # or it says that it is JSON
        with pytest.raises(SchemaError):
            envelope.decode(message(Binding.AMQP, headers, body))
    with pytest.raises(SchemaError):
        envelope.decode_structured(body)


JUNK_EVENTS: dict[str, object] = {
    "data twice": {**STRUCTURED, "data_base64": "e30="},
    "base64 that is none": {**STRUCTURED, "data": None, "data_base64": "%%"},
    "an attribute that is an object": {**STRUCTURED, "x": {}},
    "an attribute that is a fraction": {**STRUCTURED, "x": 1.5},
    "an upper case attribute": {**STRUCTURED, "Foo": "x"},
    "an id that is null": {**STRUCTURED, "id": None},
}


@pytest.mark.parametrize("event", JUNK_EVENTS.values(), ids=JUNK_EVENTS)
def test_a_junk_structured_event_is_one_clear_error(event: object) -> None:
    with pytest.raises(SchemaError):
        structured(event)


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.binary(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
header_names = st.sampled_from(
    [*AMQP, *KAFKA, "ce-time", "ce_time", "content-type", "ce-", b"ce-id"]
) | st.text(max_size=8)


@settings(relaxed, max_examples=400)
@given(
    binding=st.sampled_from(Binding),
    headers=st.dictionaries(header_names, anything, max_size=8),
    content_type=st.none()
    | st.sampled_from(["application/json", "application/cloudevents+json"])
    | st.text(max_size=20),
    body=st.binary(max_size=60) | anything.map(lambda value: repr(value).encode("utf-8", "replace")),
)
def test_no_message_ever_raises_anything_but_a_schema_error(
    binding: Binding, headers: dict[Any, Any], content_type: str | None, body: bytes
) -> None:
    try:
        decoded = envelope.decode(message(binding, headers, body, content_type))
    except SchemaError:
        return
    assert decoded.attributes["specversion"] == "1.0"


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=5,
)


def leaves(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    if isinstance(node, dict):
        for name, child in node.items():
            found += leaves(child, (*path, name))
    elif isinstance(node, list):
        for index, child in enumerate(node):
            found += leaves(child, (*path, index))
    return found


@settings(relaxed, max_examples=400)
@given(
    data=st.data(), case=st.sampled_from([golden.FULL, golden.RESOLVED, golden.SPOOL_FULL, golden.HEARTBEAT])
)
def test_a_valid_event_with_one_value_replaced_is_read_or_refused_never_a_crash(
    data: st.DataObject, case: Event
) -> None:
    event = json.loads(envelope.structured_json(*envelope.encode(case, STAMP)))
    path = data.draw(st.sampled_from(leaves(event)))
    node = event
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = data.draw(json_values)
    with suppress(SchemaError):
        envelope.to_event(structured(event))


# ----------------------------------------------------------------------------------- versions of tomorrow


def later(change: dict[str, Any], **attributes: str) -> Envelope:
    encoded = envelope.encode(golden.FULL, STAMP)
    data = json.loads(encoded.body)
    for pointer, value in change.items():
        node = data
        *parents, last = pointer.split(".")
        for part in parents:
            node = node[part]
        node[last] = value
    return Envelope({**encoded.attributes, **attributes}, json.dumps(data).encode(), data)


def test_a_later_minor_is_read_and_what_is_new_is_passed_over() -> None:
    urn = f"urn:virtbus:schema:{IoError.TYPE}:1.99"
    read = envelope.to_event(later({"extra": {"a": 1}, "host.rack": "r7"}, dataschema=urn))
    assert read == golden.FULL


def test_new_words_of_a_later_minor_are_read_as_they_stand() -> None:
    said = {"error.action": "retry", "origin": "guess", "incident.scope": "rack"}
    read = envelope.to_event(later({**said, "domain.owner.platform": "x"}))
    assert isinstance(read, IoError)
    assert read.domain.owner is not None
    words = (read.error.action, read.origin, read.incident.scope, read.domain.owner.platform)
    assert words == ("retry", "guess", "rack", "x")
    assert [type(word) for word in words] == [Action, Origin, Scope, Platform]
    assert not any(word.is_known for word in words)
    assert json.loads(envelope.encode(read, STAMP).body)["origin"] == "guess"


def test_a_whole_number_that_came_with_a_fraction_is_the_same_number() -> None:
    read = envelope.to_event(later({"occurrences.count": 3.0, "domain.id": 7.0}))
    assert read == golden.FULL


def test_an_unknown_type_or_major_is_handed_over_raw() -> None:
    assert envelope.to_event(later({}, type="io.virtbus.domain.io_error.v2")) is None
    assert envelope.to_event(later({}, dataschema=f"urn:virtbus:schema:{IoError.TYPE}:2.0")) is None
    assert envelope.to_event(Envelope({"type": "com.example", "id": "1"}, b"{}", {})) is None


def test_an_event_that_breaks_its_schema_is_refused_and_the_place_named() -> None:
    with pytest.raises(SchemaError, match="/host/name"):
        envelope.to_event(later({"host.name": None}))


def test_a_time_that_the_schema_lets_pass_and_no_calendar_knows_is_refused() -> None:
    with pytest.raises(SchemaError, match="can't be read"):
        envelope.to_event(later({"error.occurred_at": "2026-02-30T12:00:00.000000Z"}))


# ----------------------------------------------------------------------------------------------------- ids


def test_ids_are_version_7_and_carry_their_time() -> None:
    made = envelope.uuid7(10**18 * 4)
    assert re.fullmatch(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", made)
    assert int(made.replace("-", "")[:12], 16) == 10**12 * 4


def test_ids_rise_within_a_nanosecond_and_when_the_clock_steps_back() -> None:
    start = 10**18 * 4 + 10**12
    made = [envelope.uuid7(start) for _ in range(10_000)] + [envelope.uuid7(start - 10**9) for _ in range(10)]
    assert made == sorted(set(made))


def test_a_heartbeats_record_has_no_sequence() -> None:
    stamp = golden.stamp(1, sequence=False)
    record = envelope.record(envelope.encode(golden.HEARTBEAT, stamp), stamp)
    assert (record.row, record.seq, record.key) == (0, 0, golden.AGENT)


def test_a_stamps_junk_never_reaches_a_header() -> None:
    junk = Stamp("a\nb", "c\x00d", "é\u200b", 1, 0)
    encoded = envelope.encode(golden.FULL, junk)
    assert not any(CONTROLS.search(value) for value in encoded.attributes.values())
