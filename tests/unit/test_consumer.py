"""The SDK hands each event out once, in order, and tells what is missing."""

import uuid
from datetime import UTC, datetime

import pytest

from virtbus import envelope
from virtbus.bus import BusOptions, open_bus
from virtbus.consumer import Consumer, MissingEvents
from virtbus.errors import ConfigError
from virtbus.model import Confirmed, Gap, PreviousRun, SequenceRange, Stamp
from virtbus.sequences import SequenceCheck

AGENT = "11111111-2222-4333-8444-555555555555"
EPOCH = "01890000-0000-7000-8000-000000000001"
AT = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)


def a_record(sequence, *, agent=AGENT, epoch=EPOCH, missing=(), previous=None):
    gap = Gap(None, agent, "agent_down", None, AT, AT, missing=missing, previous=previous)
    stamp = Stamp(envelope.uuid7(sequence * 1_000_000_000), agent, epoch, sequence, 10**18)
    return envelope.record(envelope.encode(gap, stamp), stamp, row=sequence)


class ListFeed:
    def __init__(self, records):
        self.records = list(records)

    def take(self, limit, busy):
        for index, record in enumerate(self.records):
            if record.key not in busy:
                return [self.records.pop(index)]
        return []


@pytest.fixture
def url(tmp_path):
    return f"embedded://{tmp_path}/bus.db"


def publish(url, *records):
    bus = open_bus(url, BusOptions())
    assert all(isinstance(outcome, Confirmed) for _, outcome in bus.publish(ListFeed(records)))
    bus.close()


def drain(consumer, timeout=0.3):
    found = []
    while (delivery := consumer.receive(timeout)) is not None:
        found.append(delivery)
        delivery.ack()
    return found


def test_events_come_typed_and_in_order(url):
    publish(url, *(a_record(number) for number in range(1, 6)))
    with Consumer(url, group="g") as consumer:
        found = drain(consumer)
    assert [delivery.attributes["sequence"] for delivery in found] == [f"{n:012d}" for n in range(1, 6)]
    assert all(isinstance(delivery.event, Gap) for delivery in found)
    assert found[0].event.reason == "agent_down"
    assert found[0].key == AGENT


def test_an_event_that_was_sent_twice_is_handed_out_once(url):
    record = a_record(1)
    publish(url, record, record)
    with Consumer(url, group="g") as consumer:
        assert len(drain(consumer)) == 1
        publish(url, record)
        assert drain(consumer) == []


def test_a_mark_survives_a_restart(url, tmp_path):
    record = a_record(1)
    publish(url, record)
    with Consumer(url, group="g", dedupe=tmp_path / "seen.db") as consumer:
        assert len(drain(consumer)) == 1
    publish(url, record)
    with Consumer(url, group="g", dedupe=tmp_path / "seen.db") as consumer:
        assert drain(consumer) == []


def test_what_had_no_verdict_comes_again_after_a_restart(url, tmp_path):
    publish(url, a_record(1))
    with Consumer(url, group="g", dedupe=tmp_path / "seen.db") as consumer:
        assert consumer.receive(1) is not None
    with Consumer(url, group="g", dedupe=tmp_path / "seen.db") as consumer:
        again = consumer.receive(3)
        assert again is not None
        again.ack()


def test_the_dedupe_file_is_bounded_and_the_oldest_give_way(url, tmp_path):
    records = [a_record(number) for number in range(1, 31)]
    with Consumer(url, group="g", dedupe=tmp_path / "seen.db", dedupe_rows=10, prefetch=5) as consumer:
        publish(url, *records)
        assert len(drain(consumer)) == 30
        assert consumer._seen._database.execute("SELECT count(*) FROM seen").fetchone()[0] <= 10
    with Consumer(url, group="g", dedupe=tmp_path / "seen.db", dedupe_rows=10) as consumer:
        publish(url, records[-1], records[0])
        assert [delivery.id for delivery in drain(consumer)] == [records[0].id]


def test_a_retried_event_comes_before_the_next_of_its_key(url):
    publish(url, a_record(1), a_record(2))
    with Consumer(url, group="g", prefetch=1) as consumer:
        first = consumer.receive(1)
        first.retry(0.05)
        order = [delivery.attributes["sequence"][-1] for delivery in drain(consumer, 1)]
    assert order == ["1", "2"]


def test_a_second_verdict_is_refused(url):
    publish(url, a_record(1))
    with Consumer(url, group="g") as consumer:
        delivery = consumer.receive(1)
        delivery.ack()
        with pytest.raises(ConfigError, match="has had its verdict"):
            delivery.retry(1)


def test_a_message_that_is_no_event_is_put_aside_and_the_next_one_comes(url):
    bad = a_record(1)._replace(body=b'{"not": "a gap"}', id=str(uuid.uuid4()))
    publish(url, bad, a_record(2))
    with Consumer(url, group="g") as consumer:
        assert [delivery.attributes["sequence"][-1] for delivery in drain(consumer)] == ["2"]
    with Consumer(url, group="g") as consumer:
        assert drain(consumer) == []


def test_an_unknown_type_is_handed_over_raw(url):
    record = a_record(1)
    attributes = {**record.attributes, "type": "io.virtbus.agent.gap.v2",
                  "dataschema": "urn:virtbus:schema:io.virtbus.agent.gap.v2:2.0"}  # fmt: skip
    publish(url, record._replace(attributes=attributes, body=b'{"new":1}'))
    with Consumer(url, group="g") as consumer:
        (delivery,) = drain(consumer)
    assert delivery.event is None
    assert delivery.data == {"new": 1}


class Gaps:
    """A consumer that checks sequences, and what it told."""

    def __init__(self, url, window=0.0):
        self.told = []
        self.consumer = Consumer(
            url, group="g", check_gaps=True, reorder_seconds=window, on_missing=self.told.append
        )

    def after(self, url, *records):
        publish(url, *records)
        drain(self.consumer)
        return [(hole.epoch, hole.first, hole.last) for hole in self.told]


@pytest.fixture
def gaps(url):
    gaps = Gaps(url)
    yield gaps
    gaps.consumer.close()


def test_the_first_number_seen_is_the_baseline(url, gaps):
    assert gaps.after(url, a_record(7), a_record(8)) == []


def test_a_hole_that_nothing_explains_is_told_with_its_numbers(url, gaps):
    assert gaps.after(url, a_record(1), a_record(5), a_record(6), a_record(9)) == [
        (EPOCH, 2, 4),
        (EPOCH, 7, 8),
    ]


def test_a_hole_that_a_gap_event_names_is_explained(url):
    gaps = Gaps(url, window=0.5)
    named = (SequenceRange(EPOCH, 2, 4),)
    assert gaps.after(url, a_record(1), a_record(5), a_record(6, missing=named)) == []
    assert drain(gaps.consumer, 0.7) == []
    assert gaps.told == []
    gaps.consumer.close()


def test_an_event_that_comes_late_fills_its_hole(url):
    gaps = Gaps(url, window=60)
    assert gaps.after(url, a_record(1), a_record(3), a_record(2)) == []
    assert gaps.consumer._sequences._runs[(f"/virtbus/agents/{AGENT}", EPOCH)].holes == {}
    gaps.consumer.close()


def test_the_lost_tail_of_an_earlier_run_is_told(url, gaps):
    second = "01890000-0000-7000-8000-000000000002"
    restart = a_record(1, epoch=second, previous=PreviousRun(EPOCH, 4))
    assert gaps.after(url, a_record(1), a_record(2), restart) == [(EPOCH, 3, 4)]


@pytest.mark.parametrize("odd", ["²", "٣", "9" * 5_000, "-1", "1e3", ""])
def test_a_sequence_that_is_no_number_of_ours_is_left_out_of_the_check(url, gaps, odd):
    record = a_record(2)
    record = record._replace(attributes={**record.attributes, "sequence": odd})
    assert gaps.after(url, a_record(1), record, a_record(2)) == []


class Counted(dict):
    """How often it was walked."""

    walked = 0

    def items(self):
        self.walked += 1
        return super().items()


def test_a_look_for_holes_walks_only_the_epochs_with_holes_and_once_a_second():
    told = []
    check = SequenceCheck(60.0, told.append)
    check._runs, check._holed = Counted(), Counted()
    for agent in range(1_000):
        check.saw({"source": str(agent), "epoch": "e", "sequence": "1"}, None, 0.0)
    check.saw({"source": "7", "epoch": "e", "sequence": "3"}, None, 0.0)
    for now in range(600):
        check.tick(now / 10)  # ten messages a second
    assert len(check._holed) == 1
    assert check._runs.walked == 0
    assert check._holed.walked == 60
    assert told == []
    check.tick(60.0)
    assert told == [MissingEvents("7", "e", 2, 2)]
    assert check._holed == {}


def test_a_dedupe_file_that_is_none_is_one_clear_line(url, tmp_path):
    (tmp_path / "seen.db").write_text("not a database, and long enough to be read as one" * 100)
    with pytest.raises(ConfigError, match=r"dedupe file .* can't be used"):
        Consumer(url, dedupe=tmp_path / "seen.db")
