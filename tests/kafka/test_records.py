"""A record as a message: what other producers write is refused by name, or read as what it says."""

import pytest

from virtbus import envelope
from virtbus.bus.kafka.client import headers_of, message_of
from virtbus.errors import SchemaError
from virtbus.testing import a_record


class Polled:
    """A polled record."""

    def __init__(self, *more):
        self.record = a_record()
        self.wire = envelope.to_kafka(self.record.attributes, self.record.body)
        self.more = more

    def headers(self):
        sent = [
            (name, value.encode() if isinstance(value, str) else value) for name, value in self.wire.headers
        ]
        return [*sent, *self.more]

    def key(self):
        return self.wire.key

    def value(self):
        return self.wire.value

    def topic(self):
        return "t"

    def partition(self):
        return 1

    def offset(self):
        return 7


def decoded(polled):
    return envelope.decode(message_of(polled, headers_of(polled)))


def test_a_record_is_what_was_sent():
    polled = Polled()
    assert decoded(polled).attributes == {**polled.record.attributes, "datacontenttype": "application/json"}


@pytest.mark.parametrize("name", ["ce_id", "ce_time", "content-type"])
def test_a_header_that_comes_twice_with_two_values_is_refused_by_name(name):
    with pytest.raises(SchemaError, match=rf"t\[1\]@7: header '{name}' is there twice"):
        decoded(Polled((name, b"other")))


def test_a_header_that_comes_twice_with_the_same_value_says_one_thing():
    polled = Polled(("ce_type", a_record().attributes["type"].encode()))
    assert decoded(polled).attributes["type"] == polled.record.attributes["type"]


def test_a_null_header_is_one_that_is_not_there():
    polled = Polled(("ce_traceparent", None), ("trace", None))
    assert "traceparent" not in decoded(polled).attributes


def test_other_headers_may_come_twice():
    assert decoded(Polled(("hop", b"1"), ("hop", b"2"))).attributes["id"]
