"""No event that fits its schema can end the fleet, its table or the policy, whatever stands in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from tests.producer import NOVA_XML, Producer
from virtbus import envelope
from virtbus.commands.fleet import as_data, table
from virtbus.envelope import Envelope
from virtbus.errors import SchemaError
from virtbus.fleet import Fleet
from virtbus.integrations.policy import HoldPolicy, HoldRules
from virtbus.model import Event, Now, OpenIncident, OpenIncidents, PreviousRun, SequenceRange, to_ns
from virtbus.testing import (
    DOMAIN_UUID,
    EPOCH,
    MOMENT,
    a_device,
    a_gap,
    a_heartbeat,
    a_record,
    a_resolved,
    an_io_error,
)
from virtbus.words import Action

ITEM = OpenIncident("i", DOMAIN_UUID, "x", a_device(), Action.PAUSE, "eio", MOMENT, MOMENT, 1, 1, True, False)
EVENTS = {
    "io_error": an_io_error(),
    "resolved": a_resolved(),
    "gap": a_gap(previous=PreviousRun(EPOCH, 9), missing=(SequenceRange(EPOCH, 1, 5),), missing_events=5),
    "heartbeat": a_heartbeat(incidents=OpenIncidents(1, (ITEM,))),
}
NUMBERS = [-(10**18), -1, 0, 2**53, 2**53 + 1, 10**30, 10**400, 1.7e308]
TIMES = ["1999-12-31T23:59:59.999999Z", "2000-01-01T00:00:00.000000Z", "2200-12-31T23:59:59.999999Z"]
TIMES += ["2201-01-01T00:00:00.000000Z", "0001-01-01T00:00:00Z", "2016-12-31T23:59:60.000000Z"]
TEXTS = ["", "\x00", "\ud800", "a" * 5000, "[::1", "[", "host:name:1", "unix:", "*"]
VALUES = [*NUMBERS, *TIMES, *TEXTS, True, None, []]


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


def changed(body: bytes, path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    data = msgspec.json.decode(body)
    at = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    return data


def look_at(event: Event, attributes: dict[str, str]) -> None:
    """All that is done with an event once it has been read."""
    fleet, now = Fleet(), Now(to_ns(MOMENT), 100.0)
    fleet.saw(a_heartbeat(), attributes, now)
    fleet.saw(event, attributes, now)
    fleet.saw(EVENTS["heartbeat"], attributes, now)
    view = fleet.view(Now(now.wall_ns + 100 * 10**9, 200.0))
    json.dumps(as_data(view))
    table(view, rows=None, columns=100)
    HoldPolicy(HoldRules(when="any", min_guests=1, raise_seconds=0.0)).decide(view, {}, 1.0)


@pytest.mark.parametrize("name", EVENTS)
def test_whatever_fits_the_schema_is_folded_in_and_the_rest_is_refused(name):
    record = a_record(EVENTS[name])
    accepted = refused = 0
    for path in list(places(msgspec.json.decode(record.body))):
        for value in VALUES:
            data = changed(record.body, path, value)
            try:
                event = envelope.to_event(Envelope(dict(record.attributes), record.body, data))
            except SchemaError:
                refused += 1
                continue
            assert event is not None
            look_at(event, dict(record.attributes))
            accepted += 1
    assert accepted > 100
    assert refused > 100


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("occurrences", "count"), 2**53 + 1),
        (("occurrences", "total"), 10**400),
        (("domain", "id"), 10**30),
        (("error", "occurred_at"), "1999-12-31T23:59:59.999999Z"),
        (("incident", "opened_at"), "2201-01-01T00:00:00.000000Z"),
    ],
    ids=str,
)
def test_numbers_and_times_out_of_bounds_are_refused(path, value):
    record = a_record(an_io_error())
    with pytest.raises(SchemaError, match="/".join(path)):
        envelope.to_event(Envelope(dict(record.attributes), record.body, changed(record.body, path, value)))


def test_an_interval_of_more_than_an_hour_is_refused():
    record = a_record(a_heartbeat())
    data = changed(record.body, ("interval_seconds",), 3601)
    with pytest.raises(SchemaError, match="at most 3600"):
        envelope.to_event(Envelope(dict(record.attributes), record.body, data))


def test_what_libvirt_says_of_a_guest_of_nova_is_understood_by_the_fleet():
    """From the domain's XML to the name of its storage."""
    producer, fleet = Producer(NOVA_XML), Fleet()
    now = Now(to_ns(MOMENT), 100.0)
    for event in producer.fails():
        record = producer.record(event)
        read = envelope.to_event(
            Envelope(dict(record.attributes), record.body, msgspec.json.decode(record.body))
        )
        assert read == event
        fleet.saw(read, record.attributes, now)
    (backend,) = fleet.view(now).backends
    assert (backend.name, backend.kind, backend.guests) == ("10.20.0.11", "rbd", 1)
