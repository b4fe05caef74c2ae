"""The embedded bus keeps the promise of a bus: with real processes, killed for real."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.bus.embedded_parts import (
    ListFeed,
    child,
    drain,
    event_id,
    line,
    make_record,
    publish,
    publish_all,
    receive,
)
from tests.waiting import wait_until
from virtbus.bus import REASON_HEADER, BusOptions
from virtbus.bus.embedded import EmbeddedBus, EmbeddedSubscription
from virtbus.bus.embedded.log import LEASE_SECONDS, Log, Member, Stored
from virtbus.errors import BusUnavailable, ConfigError
from virtbus.model import Confirmed, Deferred, Refused

SMALL = 64 * 1024


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"embedded://{tmp_path}/bus/events.db"


@pytest.fixture
def open_embedded(url: str) -> Iterator[Callable[..., EmbeddedBus]]:
    opened: list[EmbeddedBus] = []

    def opener(*, max_bytes: int | None = None, **options: object) -> EmbeddedBus:
        full_url = url if max_bytes is None else f"{url}?max_bytes={max_bytes}"
        opened.append(EmbeddedBus(full_url, options=BusOptions(**options)))  # type: ignore[arg-type]
        return opened[-1]

    yield opener
    for bus in opened:
        bus.close()


@pytest.fixture
def bus(open_embedded: Callable[..., EmbeddedBus]) -> EmbeddedBus:
    return open_embedded()


@pytest.fixture
def consume() -> Iterator[Callable[..., EmbeddedSubscription]]:
    opened: list[EmbeddedSubscription] = []

    def opener(bus: EmbeddedBus, group: str | None = "g", prefetch: int = 100) -> EmbeddedSubscription:
        opened.append(bus.consume(group, prefetch=prefetch))
        return opened[-1]

    yield opener
    for subscription in opened:
        subscription.close()


# ----------------------------------------------------------------------------- groups and order


def test_a_group_begins_with_the_oldest_event_that_is_kept(bus, consume):
    records = publish_all(bus, [make_record(n) for n in range(3)])
    assert drain(consume(bus)) == [record.id for record in records]


def test_a_message_carries_the_event_as_it_was_published(bus, consume):
    [record] = publish_all(bus, [make_record(7)])
    message = receive(consume(bus))
    assert message.body == record.body
    assert message.headers["ce-sequence"] == record.attributes["sequence"]
    assert message.content_type == "application/json"
    assert (message.key, message.redelivered, message.user_id) == (record.key, False, None)


def test_a_structured_message_keeps_its_key_and_gets_no_event_headers(open_embedded, consume):
    bus = open_embedded(structured=True)
    [record] = publish_all(bus, [make_record(7)])
    message = receive(consume(bus))
    assert message.content_type.startswith("application/cloudevents")
    assert message.key == record.key
    assert not [name for name in message.headers if name.startswith("ce-")]


def test_without_a_group_only_what_comes_later_is_seen(bus, consume):
    publish_all(bus, [make_record(1)])
    subscription = consume(bus, None)
    later = publish_all(bus, [make_record(2)])
    assert drain(subscription) == [later[0].id]


def test_an_event_of_a_log_that_nobody_reads_is_confirmed(bus):
    assert publish(bus, [make_record(1)]) == [Confirmed()]


def test_two_groups_each_get_everything(bus, consume):
    records = publish_all(bus, [make_record(n, f"key-{n % 3}") for n in range(30)])
    for group in ("scheduler", "audit"):
        assert sorted(drain(consume(bus, group))) == sorted(record.id for record in records)


def test_an_acknowledged_event_does_not_come_again(bus, consume):
    publish_all(bus, [make_record(1)])
    first = consume(bus)
    assert len(drain(first)) == 1
    first.close()
    assert drain(consume(bus)) == []


def test_a_key_that_is_out_with_one_member_is_not_handed_to_another(bus, consume):
    records = publish_all(bus, [make_record(1, "a"), make_record(2, "a"), make_record(3, "b")])
    one, two = consume(bus, prefetch=1), consume(bus)
    held = receive(one)
    assert event_id(held) == records[0].id
    assert drain(two) == [records[2].id]
    one.ack(held)
    assert drain(two) == [records[1].id]


def test_what_a_closed_member_held_comes_again_marked_as_redelivered(bus, consume):
    [record] = publish_all(bus, [make_record(1)])
    one = consume(bus)
    assert not receive(one).redelivered
    one.close()
    again = receive(consume(bus))
    assert (event_id(again), again.redelivered) == (record.id, True)


def test_leased_messages_that_were_never_received_are_not_marked_as_redelivered_after_a_retry(bus, consume):
    publish_all(bus, [make_record(1), make_record(2)])
    subscription = consume(bus)
    subscription.retry(receive(subscription), 0.0)
    assert [receive(subscription).redelivered for _ in range(2)] == [True, False]


def test_a_prefetch_of_one_hands_out_nothing_before_the_verdict(bus, consume):
    publish_all(bus, [make_record(1, "a"), make_record(2, "b")])
    subscription = consume(bus, prefetch=1)
    held = receive(subscription)
    assert subscription.receive(0.2) is None
    subscription.ack(held)
    assert subscription.receive(1) is not None


# --------------------------------------------------------------------------------------- verdicts


def test_retry_delays_a_message_and_nothing_of_its_key_overtakes_it(bus, consume):
    records = publish_all(bus, [make_record(1, "a"), make_record(2, "a"), make_record(3, "b")])
    subscription = consume(bus)
    subscription.retry(receive(subscription), 3600.0)
    other_key = receive(subscription)
    assert event_id(other_key) == records[2].id
    assert subscription.receive(0.3) is None
    subscription.ack(other_key)


def test_a_retried_message_comes_again_before_the_next_of_its_key(bus, consume):
    records = publish_all(bus, [make_record(1, "a"), make_record(2, "a")])
    subscription = consume(bus)
    subscription.retry(receive(subscription), 0.5)
    again = receive(subscription)
    assert event_id(again) == records[0].id
    subscription.ack(again)
    assert drain(subscription) == [records[1].id]


def test_a_delayed_key_is_held_for_other_members_too(bus, consume):
    publish_all(bus, [make_record(1, "a"), make_record(2, "a")])
    one = consume(bus, prefetch=1)
    one.retry(receive(one), 30)
    assert consume(bus).receive(0.3) is None


def test_a_dead_letter_is_kept_with_its_reason_and_gone_for_its_group_only(bus, consume):
    [record] = publish_all(bus, [make_record(1)])
    subscription = consume(bus)
    subscription.dead_letter(receive(subscription), "schema: /error is missing")
    assert subscription.receive(0.2) is None
    with bus.dead_letters("g") as letters:
        [dead] = [letter.message for letter in letters.read()]
    assert dead.headers[REASON_HEADER] == "schema: /error is missing"
    assert (event_id(dead), dead.body) == (record.id, record.body)
    assert drain(consume(bus, "other")) == [record.id]


def test_dead_letters_stay_until_they_are_sent_back_or_dropped_and_count_towards_the_bound(
    open_embedded, consume
):
    bus = open_embedded(max_bytes=SMALL)
    records = publish_all(bus, [make_record(n, f"k{n}", size=6000) for n in range(9)])
    subscription = consume(bus)
    for _ in range(9):
        subscription.dead_letter(receive(subscription), "no")
    [outcome] = publish(bus, [make_record(10, size=12_000)])
    assert "virtbus dead" in str(outcome.error)
    with bus.dead_letters("g") as letters:
        assert letters.count() == 9
        first, second, *rest = letters.read()
        letters.send_back(first)
        for letter in rest:
            letters.drop(letter)
        assert letters.count() == 1
        assert list(letters.read()) == []
        assert (second.id, second.reason) == (records[1].id, "no")
    assert drain(subscription) == [records[0].id]
    assert publish(bus, [make_record(10, size=12_000)]) == [Confirmed()]


def test_without_a_group_a_dead_letter_is_only_logged(bus, consume):
    subscription = consume(bus, None)
    publish_all(bus, [make_record(1)])
    subscription.dead_letter(receive(subscription), "no")
    assert subscription.receive(0.1) is None


def test_a_verdict_on_a_message_of_a_lost_connection_does_nothing(bus, consume):
    [record] = publish_all(bus, [make_record(1)])
    one = consume(bus)
    held = receive(one)
    one.close()
    one.ack(held)
    assert drain(consume(bus)) == [record.id]


# ------------------------------------------------------------------------------------ the bound


def test_a_full_log_defers_and_drops_nothing_and_goes_on_once_it_is_read(open_embedded, consume):
    bus = open_embedded(max_bytes=SMALL)
    subscription = consume(bus)
    feed = ListFeed([make_record(n, f"k{n % 4}", size=3000) for n in range(60)])
    deferred, sent = [], []
    for record, outcome in bus.publish(feed):
        (sent if outcome == Confirmed() else deferred).append((record, outcome))
    assert sent
    assert deferred
    assert "group 'g' has not read" in str(deferred[0][1].error)
    got = drain(subscription)
    assert sorted(got) == sorted(record.id for record, _ in sent)
    assert publish(bus, [deferred[0][0]]) == [Confirmed()]


def test_what_fits_into_a_nearly_full_log_is_confirmed_and_the_rest_deferred(open_embedded):
    bus = open_embedded(max_bytes=SMALL)
    outcomes = publish(bus, [make_record(n, f"k{n}", size=3000) for n in range(30)])
    kinds = [type(outcome) for outcome in outcomes]
    assert kinds == sorted(kinds, key=lambda kind: kind is Deferred)
    assert 10 < kinds.count(Confirmed) < 30


def test_what_nobody_has_read_never_gives_way(open_embedded, consume):
    bus = open_embedded(max_bytes=SMALL)
    records = [make_record(n, size=3000) for n in range(40)]
    confirmed = [r.id for r, o in bus.publish(ListFeed(records)) if o == Confirmed()]
    assert "nobody has read" in str(publish(bus, [make_record(99, size=3000)])[0].error)
    assert drain(consume(bus)) == confirmed


def test_a_log_that_is_read_takes_many_times_its_bound(open_embedded, consume, tmp_path):
    bus = open_embedded(max_bytes=SMALL)
    subscription = consume(bus)
    for start in range(0, 400, 10):
        records = publish_all(bus, [make_record(n, size=3000) for n in range(start, start + 10)])
        assert drain(subscription, 0.05) == [record.id for record in records]
    assert (tmp_path / "bus/events.db").stat().st_size < 4 * SMALL


def test_a_slow_group_holds_what_a_fast_one_has_read(open_embedded, consume):
    bus = open_embedded(max_bytes=SMALL)
    fast, slow = consume(bus, "fast"), consume(bus, "slow")
    confirmed: list[str] = []
    for n in range(40):
        record = make_record(n, size=3000)
        if publish(bus, [record]) == [Confirmed()]:
            confirmed.append(record.id)
        drain(fast, 0.0)
    assert len(confirmed) < 40
    assert drain(slow) == confirmed


def test_a_record_above_the_limit_is_refused_and_others_go_on(open_embedded, consume):
    bus = open_embedded(max_record_bytes=2000)
    outcomes = publish(bus, [make_record(1, "a", size=3000), make_record(2, "b")])
    assert [type(outcome) for outcome in outcomes] == [Refused, Confirmed]


def test_a_record_larger_than_the_whole_log_is_refused_and_others_go_on(open_embedded):
    bus = open_embedded(max_bytes=SMALL)
    outcomes = publish(bus, [make_record(1, "a", size=2 * SMALL), make_record(2, "b")])
    assert [type(outcome) for outcome in outcomes] == [Refused, Confirmed]


def test_a_full_disk_defers_and_loses_nothing_and_goes_on_when_there_is_room(tmp_path):
    mount = tmp_path / "disk"
    mount.mkdir()
    inside = f'mount -t tmpfs -o size=2m tmpfs "{mount}" && exec "$@"'
    prefix = ["unshare", "--mount", "sh", "-c", inside, "sh"]
    if os.geteuid() != 0 or subprocess.run([*prefix, "true"], check=False).returncode:
        pytest.skip("needs root and a mount namespace for a disk of its own")
    with child("fill", mount, prefix=prefix) as process:
        confirmed, kind, error = line(process).split(" ", 2)
        assert kind == "Deferred"
        assert "disk is full" in error
        assert int(confirmed) > 10
        assert [line(process), line(process)] == ["Confirmed", "all"]


# -------------------------------------------------------------------------------------- SIGKILL


def test_an_event_survives_a_producer_killed_right_after_the_confirmation(bus, consume, url):
    with child("publish", url, 0, 1, 1) as producer:
        event = line(producer).split()[0]
        producer.kill()
    assert drain(consume(bus)) == [event]


def test_every_confirmed_event_survives_a_producer_killed_in_the_middle_and_in_order(bus, consume, url):
    with child("publish", url, 0, 5000, 5) as producer:
        confirmed = [line(producer) for _ in range(300)]
        producer.kill()
        assert producer.stdout is not None
        confirmed += [text for text in producer.stdout.read().splitlines() if text.count(" ") == 2]
    subscription = consume(bus)
    got: list[str] = []
    order: dict[str | None, list[int]] = defaultdict(list)
    while (message := subscription.receive(0.3)) is not None:
        subscription.ack(message)
        got.append(event_id(message))
        order[message.key].append(json.loads(message.body)["n"])
    assert {text.split()[0] for text in confirmed} <= set(got)
    assert all(numbers == sorted(numbers) for numbers in order.values())


def test_what_a_killed_consumer_held_is_delivered_again_within_seconds(bus, consume, url):
    records = publish_all(bus, [make_record(n, f"k{n}") for n in range(5)])
    with child("hold", url, "g", 2) as consumer:
        assert line(consumer) == "ready"
        held = [line(consumer), line(consumer)]
        subscription = consume(bus)
        assert subscription.receive(0.3) is None  # it leased all five
        consumer.kill()
        again = receive(subscription)
        subscription.ack(again)
        assert event_id(again) in held
        rest = drain(subscription)
    assert sorted([event_id(again), *rest]) == sorted(record.id for record in records)


def test_a_killed_consumer_without_a_group_holds_no_room_in_the_log(open_embedded, consume, url, tmp_path):
    bus = open_embedded(max_bytes=SMALL)
    group = consume(bus)
    with child("hold", url, "-", 1) as consumer:
        assert line(consumer) == "ready"
        publish_all(bus, [make_record(1)])
        line(consumer)
        consumer.kill()
        consumer.wait()
    for start in range(0, 60, 10):
        publish_all(bus, [make_record(n, size=3000) for n in range(start, start + 10)])
        drain(group, 0.05)


def test_members_share_a_group_in_order_a_key_although_one_is_killed(bus, url, tmp_path):
    output = tmp_path / "worked"
    records = [make_record(n, f"key-{n % 12}") for n in range(600)]
    with child("work", url, "g", output) as one, child("work", url, "g", output) as two:
        with child("work", url, "g", output) as three:
            assert [line(process) for process in (one, two, three)] == ["ready"] * 3
            publish_all(bus, records)
            wait_until(lambda: output.exists() and output.read_text().count("\n") > 100)
            three.kill()
        wait_until(lambda: len({text.split()[1] for text in output.read_text().splitlines()}) == 600)
    first: dict[str, dict[int, None]] = defaultdict(dict)
    workers = set()
    for text in output.read_text().splitlines():
        key, number, worker = text.split()
        first[key].setdefault(int(number))
        workers.add(worker)
    assert len(workers) > 1
    assert all(list(numbers) == sorted(numbers) for numbers in first.values())


def test_two_producers_at_once_lose_nothing_and_keep_their_order(bus, consume, url):
    with child("publish", url, 0, 400, 4) as one, child("publish", url, 1000, 400, 4) as two:
        confirmed = [line(process) for process in (one, two) for _ in range(400)]
        assert [line(one), line(two)] == ["done", "done"]
    subscription = consume(bus)
    numbers: list[int] = []
    while (message := subscription.receive(0.3)) is not None:
        subscription.ack(message)
        numbers.append(json.loads(message.body)["n"])
    assert sorted(numbers) == [*range(400), *range(1000, 1400)]
    assert len(confirmed) == 800
    for key in range(4):
        for low in (0, 1000):
            mine = [n for n in numbers if n % 4 == key and low <= n < low + 1000]
            assert mine == sorted(mine)


class Clock:
    """CLOCK_MONOTONIC, as all processes of the host see it."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def joined(tmp_path: Path) -> Iterator[Callable[[Clock], Member]]:
    """Members of one group, on a clock of the test's."""
    members: list[Member] = []

    def join(clock: Clock) -> Member:
        members.append(Member(Log(tmp_path / "events.db", clock=clock), "g"))
        return members[-1]

    yield join
    for member in members:
        member.leave()


def stored(path: Path, *keys: str) -> None:
    log = Log(path)
    log.append([Stored(0, key, "text/plain", {}, b"x") for key in keys])
    log.close()


def test_a_consumer_that_hangs_loses_its_leases_and_goes_on_when_it_wakes(joined, tmp_path):
    clock = Clock()
    stored(tmp_path / "events.db", "a", "b", "c")
    hanging, other = joined(clock), joined(clock)
    assert len(hanging.lease(2)) == 2
    clock.now += LEASE_SECONDS
    hanging.settle(1)  # it has called: its leases go on
    clock.now += LEASE_SECONDS
    assert [message.pos for message in other.lease(1)] == [3]
    clock.now += 2
    [again] = other.lease(1)
    assert (again.pos, again.attempts) == (2, 1)
    clock.now += 1
    hanging.settle(2)  # late, and harmless
    assert hanging.lease(1) == []


def test_two_members_of_one_process_do_not_share_a_lease(joined, tmp_path):
    clock = Clock()
    stored(tmp_path / "events.db", "a")
    one, two = joined(clock), joined(clock)
    assert len(one.lease(1)) == 1
    clock.now += 2
    assert two.lease(1) == []
    one.leave()
    assert len(two.lease(1)) == 1


# ---------------------------------------------------------------------------------- waiting


def test_a_waiting_consumer_gets_an_event_at_once(bus, consume):
    subscription = consume(bus)
    publish_all(bus, [make_record(0)])
    drain(subscription)
    started = threading.Timer(0.5, lambda: publish_all(bus, [make_record(1)]))
    started.start()
    receive(subscription)
    started.join()


def test_a_waiting_consumer_asks_for_messages_a_few_times_a_second(bus, consume, monkeypatch):
    subscription, asked, lease = consume(bus), [], Member.lease
    subscription.receive(0.1)
    monkeypatch.setattr(Member, "lease", lambda self, *more: asked.append(1) or lease(self, *more))
    assert subscription.receive(2.0) is None
    assert 1 <= len(asked) <= 12


# --------------------------------------------------------------------------- files and bad input


def test_the_file_is_for_its_owner_alone(bus, tmp_path):
    publish_all(bus, [make_record(1)])
    assert (tmp_path / "bus").stat().st_mode & 0o777 == 0o700
    modes = {file.name: file.stat().st_mode & 0o777 for file in (tmp_path / "bus").iterdir()}
    assert set(modes.values()) == {0o600}


def test_another_user_is_denied_with_one_clear_line(bus, url, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    publish_all(bus, [make_record(1)])
    with child("open_as", 65534, url) as process:
        assert "failed" in line(process)
        for _ in range(2):
            text = line(process)
            assert text.startswith("BusDenied embedded bus")
            assert "run as the user who owns" in text


def test_a_folder_that_can_not_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    bus = EmbeddedBus(f"embedded://{tmp_path}/file/below/events.db", options=BusOptions())
    with pytest.raises(BusUnavailable, match=r"file/below/events\.db: can't be made"):
        bus.consume("g").receive(0)


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"not a database" * 400, "damaged or is not a bus"), (None, "is not a virtbus bus")],
    ids=["garbage", "another program's database"],
)
def test_a_file_that_is_not_a_bus_is_left_alone(tmp_path, url, content, says):
    path = tmp_path / "bus/events.db"
    path.parent.mkdir()
    if content is None:
        other = sqlite3.connect(path)
        other.execute("CREATE TABLE theirs (x)")
        other.close()
    else:
        path.write_bytes(content)
    before = path.read_bytes()
    bus = EmbeddedBus(url, options=BusOptions())
    with pytest.raises(BusUnavailable, match=says):
        bus.consume("g").receive(0)
    feed = ListFeed([make_record(1)])
    with pytest.raises(BusUnavailable, match=says):
        next(bus.publish(feed))
    assert len(feed.left) == 1
    assert path.read_bytes() == before
    assert [check.status for check in bus.probe()] == ["failed"]


def test_a_file_of_a_later_release_is_left_alone(bus, tmp_path):
    publish_all(bus, [make_record(1)])
    bus.close()
    raw = sqlite3.connect(tmp_path / "bus/events.db")
    raw.execute("PRAGMA user_version = 99")
    raw.close()
    with pytest.raises(BusUnavailable, match="format 99"):
        EmbeddedBus(f"embedded://{tmp_path}/bus/events.db", options=BusOptions()).consume("g").receive(0)


def test_a_damaged_file_is_found_by_the_probe_and_says_what_to_do(bus, tmp_path, url):
    publish_all(bus, [make_record(n, size=3000) for n in range(100)])
    bus.close()
    path = tmp_path / "bus/events.db"
    content = bytearray(path.read_bytes())
    content[8192:-4096] = b"\xff" * (len(content) - 8192 - 4096)
    path.write_bytes(content)
    broken = EmbeddedBus(url, options=BusOptions())
    [check] = broken.probe()
    assert (check.status, check.exit_code) == ("failed", 69)
    assert "move" in check.summary
    assert "\n" not in check.summary


def test_a_file_that_is_removed_under_a_producer_is_noticed_and_made_anew(bus, consume, tmp_path):
    publish_all(bus, [make_record(1)])
    shutil.rmtree(tmp_path / "bus")
    [outcome] = publish(bus, [record := make_record(2)])
    assert isinstance(outcome, Deferred)
    assert "removed or replaced" in str(outcome.error)
    publish_all(bus, [record])
    assert drain(consume(bus)) == [record.id]


def test_a_consumer_whose_file_is_removed_subscribes_anew_by_itself(bus, consume, tmp_path):
    subscription = consume(bus)
    assert subscription.receive(0.1) is None
    shutil.rmtree(tmp_path / "bus")
    [record] = publish_all(bus, [make_record(2)])
    assert event_id(receive(subscription)) == record.id


def test_a_consumer_waits_for_a_file_that_can_not_be_used_yet(bus, consume, tmp_path):
    blocker = tmp_path / "bus"
    blocker.write_text("")
    subscription = consume(bus)
    with pytest.raises(BusUnavailable):
        subscription.receive(0.5)
    blocker.unlink()
    [record] = publish_all(bus, [make_record(1)])
    assert event_id(receive(subscription)) == record.id


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("embedded:", "state folder"),
        ("embedded://host/file", "host"),
        ("embedded:file", "relative"),
        ("embedded:///x?max_bytes=1", "at least"),
        ("embedded:///x?max_bytes=many", "write a number"),
        ("embedded:///x?size=1", "unknown option 'size'"),
    ],
)
def test_a_url_that_can_not_be_used_is_named(url, says):
    with pytest.raises(ConfigError, match=says):
        EmbeddedBus(url, options=BusOptions())


def test_a_url_without_a_path_means_the_state_folder(tmp_path):
    bus = EmbeddedBus("embedded:", options=BusOptions(state_dir=tmp_path))
    assert bus.path == tmp_path / "bus.db"


def test_a_url_of_a_folder_means_a_file_in_it(tmp_path):
    assert EmbeddedBus(f"embedded://{tmp_path}", options=BusOptions()).path == tmp_path / "bus.db"


def test_the_probe_changes_nothing(bus, tmp_path):
    assert [check.status for check in bus.probe()] == ["ok"]
    assert not (tmp_path / "bus").exists()


def test_the_probe_warns_of_a_log_that_is_nearly_full(open_embedded, consume):
    bus = open_embedded(max_bytes=SMALL)
    consume(bus)
    publish(bus, [make_record(n, f"k{n}", size=3000) for n in range(30)])
    room = next(check for check in bus.probe() if check.name == "bus room")
    assert (room.status, room.remedy) == ("warning", "consume group g")


def test_the_probe_of_a_folder_that_can_not_be_written_fails(url):
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    with child("open_as", 65534, "embedded:///root/virtbus-no/events.db") as process:
        assert line(process) == "failed"


def test_close_is_idempotent_and_ends_publishing(bus):
    publish_all(bus, [make_record(1)])
    bus.tick()
    bus.close()
    bus.close()
    with pytest.raises(BusUnavailable, match="closed"):
        next(bus.publish(ListFeed([make_record(2)])))


def test_closing_from_another_thread_defers_what_is_not_stored(bus):
    publishing = bus.publish(ListFeed([make_record(n) for n in range(3)]))
    assert next(publishing)[1] == Confirmed()
    closer = threading.Thread(target=bus.close)
    closer.start()
    closer.join()
    assert [type(outcome) for _, outcome in publishing] == [Deferred]


def test_at_most_one_record_a_key_is_unconfirmed(bus):
    class Watching(ListFeed):
        def take(self, limit, busy):
            taken = super().take(limit, busy)
            assert len({record.key for record in taken}) == len(taken)
            return taken

    records = [make_record(n, f"k{n % 3}") for n in range(30)]
    outcomes = list(bus.publish(Watching(records)))
    assert sorted(record.seq for record, _ in outcomes) == list(range(30))


def test_a_path_that_can_not_be_looked_at_is_reported_by_who_opens_it(tmp_path):
    bus = EmbeddedBus(f"embedded://{tmp_path}/{'x' * 300}/bus.db", options=BusOptions())
    with closing(bus.consume("g")) as subscription, pytest.raises(BusUnavailable, match="can't be made"):
        subscription.receive(0.0)
