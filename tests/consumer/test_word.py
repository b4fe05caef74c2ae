"""The SDK keeps its word: what `ack`, `retry`, `dead_letter`, `close` and the dedupe file promise."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import pkgutil
import signal
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import wait_until
from virtbus.bus import Bus, BusOptions, open_bus
from virtbus.bus.embedded import EmbeddedBus
from virtbus.consumer import Consumer, MissingEvents
from virtbus.errors import BusDenied, BusUnavailable, ConfigError, ConsumerClosed, GroupTakenOver
from virtbus.integrations.telemetry import Disbelieved, EventPutAside
from virtbus.model import Message
from virtbus.telemetry import METRICS, emit
from virtbus.testing import ListFeed, a_record, an_io_error, no_waiting, records


@pytest.fixture
def url(tmp_path: Path) -> str:
    """An embedded bus with ten events of ten domains for the group "g"."""
    url = f"embedded://{tmp_path}/bus.db"
    with Consumer(url, group="g") as first:
        assert first.receive(0.0) is None
    publish(url, records(10, keys=10))
    return url


def publish(url: str, items: Any) -> None:
    bus = open_bus(url, BusOptions())
    ListFeed(items).drain(bus)
    bus.close()


@pytest.fixture
def bus(tmp_path: Path) -> Bus:
    return open_bus(f"embedded://{tmp_path}/bus.db")


def on(bus: Bus, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Consumer:
    """A consumer of this very object."""
    monkeypatch.setattr("virtbus.consumer.open_bus", lambda url, options: bus)
    return Consumer("embedded:", group="g", **options)


def drain(consumer: Consumer, wait: float = 0.3) -> list[str]:
    found = []
    while (delivery := consumer.receive(wait)) is not None:
        found.append(delivery.id)
        delivery.ack()
    return found


# ------------------------------------------------------------------------------------- the dedupe file


def marks(file: Path) -> set[str]:
    """The ids on disk, read by another process's eyes."""
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as database:
        return {name for (name,) in database.execute("SELECT id FROM seen")}


def test_when_ack_returns_its_mark_is_on_disk(url: str, tmp_path: Path) -> None:
    with Consumer(url, group="g", dedupe=tmp_path / "seen.db") as consumer:
        for _ in range(3):
            delivery = consumer.receive(1.0)
            assert delivery is not None
            assert delivery.id not in marks(tmp_path / "seen.db")
            delivery.ack()
            assert delivery.id in marks(tmp_path / "seen.db")


def test_marks_share_a_write_only_for_who_asks_for_it_and_wait_for_a_call(
    url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with Consumer(url, group="g", dedupe=tmp_path / "seen.db", group_commit=True) as consumer:
        monkeypatch.setattr("virtbus.consumer.FLUSH_SECONDS", 3600.0)
        first, second = consumer.receive(1.0), consumer.receive(1.0)
        assert first is not None
        assert second is not None
        first.ack()
        monkeypatch.setattr("virtbus.consumer.FLUSH_SECONDS", 0.0)  # the time is over, and nobody calls
        assert marks(tmp_path / "seen.db") == set()
        third = consumer.receive(1.0)
        assert marks(tmp_path / "seen.db") == {first.id}
        assert third is not None
        monkeypatch.setattr("virtbus.consumer.FLUSH_SECONDS", 3600.0)
        third.ack()
        assert marks(tmp_path / "seen.db") == {first.id}
    assert marks(tmp_path / "seen.db") == {first.id, third.id}


def test_a_second_group_has_marks_of_its_own_in_the_same_file(tmp_path: Path) -> None:
    url = f"embedded://{tmp_path}/bus.db"
    for group in ("one", "two"):
        with Consumer(url, group=group) as consumer:
            consumer.receive(0.0)
    publish(url, records(5, keys=5))
    for group in ("one", "two"):
        with Consumer(url, group=group, dedupe=tmp_path / "seen.db") as consumer:
            assert len(drain(consumer)) == 5


def test_a_dedupe_file_in_use_is_one_clear_error(url: str, tmp_path: Path) -> None:
    with (
        Consumer(url, group="g", dedupe=tmp_path / "seen.db"),
        pytest.raises(ConfigError, match=rf"in use by process {os.getpid()}.*a file of its own"),
    ):
        Consumer(url, group="g", dedupe=tmp_path / "seen.db")


def test_a_dead_letter_never_marks_what_has_the_same_id(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with on(bus, monkeypatch, dedupe=tmp_path / "seen.db") as consumer:
        consumer.receive(0.0)
        record = a_record()
        ListFeed([record]).publish(bus)
        forged = consumer.receive(1.0)
        assert forged is not None
        forged.dead_letter("not believed")
        ListFeed([record]).publish(bus)
        true = consumer.receive(1.0)
        assert true is not None
        assert true.id == record.id


def dead_letters() -> float:
    """How many were counted, of any kind."""
    (counter,) = METRICS.dead_letters.collect()
    return sum(each.value for each in counter.samples if each.name.endswith("_total"))


def test_each_dead_letter_counts_once_whoever_made_it_one(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    with on(bus, monkeypatch, max_attempts=1) as consumer, bus.dead_letters("g") as letters:
        consumer.receive(0.0)
        before = dead_letters()
        ListFeed([a_record()._replace(body=b"{"), *records(2, keys=2)]).publish(bus)
        for reason in ("not believed", "it fails here"):
            delivery = consumer.receive(1.0)
            assert delivery is not None
            emit(Disbelieved(None, None, delivery.source, delivery.id, reason))
            emit(EventPutAside("nova", delivery.source, delivery.id, ValueError(reason)))
            delivery.dead_letter(reason)
        consumer.receive(0.3)
        wait_until(lambda: letters.count() == 3, what="three letters")
        wait_until(lambda: dead_letters() == before + 3, what="three are counted")
        assert consumer.receive(0.1) is None
        assert dead_letters() == before + 3


def test_a_forged_copy_in_hand_does_not_decide_for_the_true_one(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    with on(bus, monkeypatch) as consumer:
        consumer.receive(0.0)
        true = a_record(an_io_error())
        forged = a_record(an_io_error(), id=true.id)
        forged = forged._replace(body=forged.body.replace(b"enospc", b"forged"))
        ListFeed([forged]).publish(bus)
        ListFeed([true]).publish(bus)
        first = consumer.receive(1.0)
        assert first is not None
        assert consumer.receive(0.1) is None
        first.dead_letter("not believed")
        second = consumer.receive(1.0)
        assert second is not None
        assert second.body == true.body


# ------------------------------------------------------------------------------------- letting go


def test_a_loop_that_is_left_lets_go_of_the_group(url: str) -> None:
    before = threading.active_count()
    for delivery in Consumer(url, group="g"):  # noqa: B007
        break
    name = delivery.id
    del delivery
    gc.collect()
    with Consumer(url, group="g") as second:
        assert name in drain(second)
    assert threading.active_count() == before


@pytest.mark.rabbitmq
def test_a_loop_that_is_left_lets_go_of_a_rabbitmq_group(amqp_url: str) -> None:
    with Consumer(amqp_url, group="g") as first:
        first.receive(0.3)
    publish(amqp_url, records(3))
    before = threading.active_count()
    for delivery in Consumer(amqp_url, group="g"):  # noqa: B007
        break
    name = delivery.id
    del delivery
    with Consumer(amqp_url, group="g") as second:
        again = second.receive(10.0)
        assert again is not None
        assert again.id == name
        assert again.attempts == 2
    assert threading.active_count() == before


def test_a_closed_consumer_says_so(url: str) -> None:
    consumer = Consumer(url, group="g")
    delivery = consumer.receive(1.0)
    assert delivery is not None
    consumer.close()
    consumer.close()
    uses = (
        lambda: consumer.receive(0.0),
        lambda: next(iter(consumer)),
        consumer.__enter__,
        delivery.ack,
        lambda: delivery.retry(1),
        lambda: delivery.dead_letter("x"),
    )
    for use in uses:
        with pytest.raises(ConsumerClosed, match="was closed"):
            use()


def test_a_stopped_consumer_ends_its_loop_and_gives_nothing(url: str) -> None:
    with Consumer(url, group="g") as consumer:
        found = []
        for delivery in consumer:
            found.append(delivery.id)
            delivery.ack()
            if len(found) == 3:
                consumer.stop()
        assert len(found) == 3
        assert consumer.receive(1.0) is None


@pytest.mark.parametrize("how", ["stop", "close"])
@pytest.mark.parametrize("kind", ["amqp", "embedded", "kafka"])
def test_a_long_wait_ends_when_another_thread_ends_the_consumer(
    how: str, kind: str, request: pytest.FixtureRequest
) -> None:
    where, options = request.getfixturevalue("url" if kind == "embedded" else f"{kind}_url"), BusOptions()
    if kind == "kafka":
        options = BusOptions(topic=request.getfixturevalue("kafka_topic"))
    consumer = Consumer(where, group="other", options=options)
    while consumer.receive(0.5) is not None:  # connected
        pass
    ending = threading.Timer(0.5, getattr(consumer, how))
    ending.start()
    assert consumer.receive(3600.0) is None
    ending.join()
    consumer.close()
    with pytest.raises(ConsumerClosed):
        consumer.receive(0.0)


def test_a_signals_handler_may_close_the_consumer_in_the_middle_of_a_wait(amqp_url: str) -> None:
    consumer = Consumer(amqp_url, group="g")
    while consumer.receive(0.5) is not None:
        pass
    before = signal.signal(signal.SIGALRM, lambda *_: consumer.close())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        assert consumer.receive(3600.0) is None
    finally:
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(ConsumerClosed):
        consumer.receive(0.0)


def test_an_on_missing_may_close_the_consumer(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def end(missing: MissingEvents) -> None:
        told.append((missing.first, missing.last))
        consumer.close()

    consumer = on(bus, monkeypatch, check_gaps=True, reorder_seconds=0.0, on_missing=end)
    consumer.receive(0.0)
    first, _, third, fourth = records(4)
    ListFeed([first, third, fourth]).drain(bus)
    for delivery in consumer:
        delivery.ack()
    assert told == [(2, 2)]
    with pytest.raises(ConsumerClosed):
        consumer.receive(0.0)


def test_a_forked_child_is_told_to_make_its_own(url: str) -> None:
    with Consumer(url, group="g") as consumer:
        assert consumer.receive(1.0) is not None
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            try:
                consumer.receive(0.1)
                os.write(write, b"nothing was raised")
            except ConfigError as error:
                os.write(write, str(error).encode())
            consumer.close()  # must not reach the parent's connection
            os._exit(0)
        os.waitpid(child, 0)
        os.close(write)
        with os.fdopen(read) as told:
            assert "make a Consumer in each process" in told.read()
        assert len(drain(consumer)) == 9


@pytest.mark.parametrize("half_way", ["bus.subscription.Line.next", "envelope.decode", "marks.Marks.has"])
def test_a_signals_handler_that_raises_with_a_message_half_way_costs_no_event_and_no_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half_way: str
) -> None:
    url = f"embedded://{tmp_path}/bus.db"
    with Consumer(url, group="g", dedupe=tmp_path / "seen.db") as consumer:
        assert consumer.receive(0.0) is None
        sent = records(6, keys=2)
        publish(url, sent)
        with monkeypatch.context() as patch:
            real = pkgutil.resolve_name(f"virtbus.{half_way}")

            def interrupted(*arguments: Any, **named: Any) -> Any:
                patch.undo()
                real(*arguments, **named)
                raise KeyboardInterrupt

            patch.setattr(f"virtbus.{half_way}", interrupted)
            with pytest.raises(KeyboardInterrupt):
                consumer.receive(1.0)
        assert drain(consumer) == [record.id for record in sent]


@pytest.mark.parametrize("end", ["stop", "close"])
@pytest.mark.parametrize("patient", [True, False])
def test_who_waits_for_a_broker_that_was_never_there_hears_of_the_end(patient: bool, end: str) -> None:
    consumer = Consumer("amqp://guest@127.0.0.1:1//", group="g", patient=patient)
    found: list[Any] = []
    with no_waiting():
        thread = threading.Thread(target=lambda: found.append(consumer.receive(3600.0)))
        thread.start()
        while not consumer._grip.calls:
            thread.join(0.01)
        getattr(consumer, end)()
        thread.join(20)
    assert found == [None]
    consumer.close()


def test_who_is_not_patient_hears_why_in_the_end() -> None:
    with (
        Consumer("amqp://guest@127.0.0.1:1//", group="g", patient=False) as consumer,
        pytest.raises(BusUnavailable, match="refused"),
    ):
        consumer.receive(2.5)


def test_a_second_thread_at_the_same_time_is_refused_and_may_follow_later(
    bus: Bus, monkeypatch: pytest.MonkeyPatch
) -> None:
    with on(bus, monkeypatch) as consumer:
        consumer.receive(0.0)
        ListFeed(records(2, keys=2)).drain(bus)
        delivery = consumer.receive(1.0)
        assert delivery is not None
        inside, go_on = threading.Event(), threading.Event()
        receive = consumer._next_message

        def slowly(timeout: float) -> Message | None:
            inside.set()
            go_on.wait(20)
            return receive(timeout)

        monkeypatch.setattr(consumer, "_next_message", slowly)
        found: list[Any] = []
        thread = threading.Thread(target=lambda: found.append(consumer.receive(1.0)))
        thread.start()
        assert inside.wait(20)
        uses = (
            lambda: consumer.receive(0.0),
            delivery.ack,
            lambda: delivery.retry(1),
            lambda: delivery.dead_letter("x"),
        )
        for use in uses:
            with pytest.raises(ConfigError, match="another thread uses this Consumer"):
                use()
        go_on.set()
        thread.join(20)
        delivery.ack()
        found[0].ack()


@pytest.mark.parametrize("exclusive", [False, True])
def test_a_forked_child_that_outlives_its_parent_keeps_nothing_of_it(
    url: str, tmp_path: Path, exclusive: bool
) -> None:
    program = (
        "import os, sys\n"
        "from virtbus import Consumer\n"
        f"consumer = Consumer(sys.argv[1], group='g', dedupe=sys.argv[2], exclusive={exclusive})\n"
        "consumer.receive(1.0)\n"
        "if os.fork() == 0:\n"
        "    sys.stdout.write('.'), sys.stdout.flush(), sys.stdin.read(), os._exit(0)\n"
        "os.waitpid(-1, os.WNOHANG), os._exit(0)"
    )
    file = tmp_path / "seen.db"
    with subprocess.Popen(
        [sys.executable, "-c", program, url, str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.read(1) == b"."
        assert process.wait(20) == 0
        with Consumer(url, group="g", dedupe=file, exclusive=exclusive) as consumer:
            first = consumer.receive(20.0)  # what somebody had who is gone comes within about a second
            assert first is not None
            first.ack()
            assert len(drain(consumer)) == 9
        process.communicate(b"", timeout=20)


@pytest.mark.parametrize("where", ["receive", "ack"])
def test_a_task_that_is_cancelled_in_the_midst_of_a_call_loses_nothing(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """As docs/schedulers.md shows it: one thread makes all calls, and who is cancelled leaves."""
    file, effects, inside = tmp_path / "seen.db", [], threading.Event()
    slow = {"receive": "_next_message", "ack": "_flush"}[where]
    real = getattr(Consumer, slow)

    async def consume() -> None:
        loop = asyncio.get_running_loop()
        with Consumer(url, group="g", dedupe=file) as consumer, ThreadPoolExecutor(1) as thread:
            while True:
                delivery = await loop.run_in_executor(thread, consumer.receive, 1.0)
                if delivery is not None:
                    effects.append(delivery.id)
                    await loop.run_in_executor(thread, delivery.ack)

    async def cancelled() -> None:
        task = asyncio.create_task(consume())
        while not inside.is_set():
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    def slowly(self: Consumer, *arguments: Any) -> Any:
        inside.set()
        return real(self, *arguments)

    for _ in range(3):
        inside.clear()
        with monkeypatch.context() as patch:
            patch.setattr(Consumer, slow, slowly)
            asyncio.run(cancelled())
    with Consumer(url, group="g", dedupe=file) as consumer:
        effects += drain(consumer)
    assert len(set(effects)) == 10, "each had its effect at least once"


# ------------------------------------------------------------------------------------- arguments


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("group", ""), ("group", "a\nb"), ("group", "x" * 129), ("group", "g.dead"), ("group", 5),
        ("prefetch", 0), ("prefetch", 1.5), ("prefetch", "5"), ("prefetch", True),
        ("dedupe_rows", 0), ("max_attempts", 0), ("max_attempts", 1.5),
        ("reorder_seconds", -1), ("reorder_seconds", "1"), ("reorder_seconds", float("nan")),
        ("on_missing", None),
    ],
)  # fmt: skip
def test_an_argument_that_can_not_be_used_is_refused_at_once_and_by_name(
    url: str, argument: str, value: Any
) -> None:
    with pytest.raises(ConfigError, match=argument) as caught:
        Consumer(url, **{"group": "g", argument: value})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_an_on_missing_that_raises_costs_no_event(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def raises(missing: MissingEvents) -> None:
        told.append((missing.first, missing.last))
        raise ValueError("the author's own")

    options = {"check_gaps": True, "reorder_seconds": 0.0, "on_missing": raises}
    with on(bus, monkeypatch, **options) as consumer:
        consumer.receive(0.0)
        items = records(5)
        ListFeed([items[0], *items[3:]]).publish(bus)
        got, raised = [], 0
        while len(got) < 3:
            try:
                delivery = consumer.receive(5.0)
            except ValueError:
                raised += 1
                continue
            assert delivery is not None
            got.append(delivery.id)
            delivery.ack()
    first = int(items[0].attributes["sequence"])
    assert got == [items[0].id, items[3].id, items[4].id]
    assert told == [(first + 1, first + 2)]
    assert raised == 1


@pytest.mark.parametrize("after", ["2", None, float("inf"), float("nan"), -1, 1e12, 10**400, True])
def test_a_retry_that_can_not_be_kept_is_refused_and_the_delivery_stays_open(url: str, after: Any) -> None:
    with Consumer(url, group="g") as consumer:
        delivery = consumer.receive(1.0)
        assert delivery is not None
        with pytest.raises(ConfigError, match="retry"):
            delivery.retry(after)
        delivery.ack()
    with Consumer(url, group="g") as consumer:
        assert delivery.id not in drain(consumer)


@pytest.mark.parametrize("reason", ["lone \udcff surrogate", None, b"bytes"])
def test_a_reason_that_is_no_text_is_refused_and_the_delivery_stays_open(url: str, reason: Any) -> None:
    with Consumer(url, group="g") as consumer:
        delivery = consumer.receive(1.0)
        assert delivery is not None
        with pytest.raises(ConfigError, match="reason"):
            delivery.dead_letter(reason)
        delivery.dead_letter("ünïcode \x00 " + "x" * 3000)


def test_a_handler_that_gives_no_verdicts_is_told_why_nothing_comes_any_more(
    bus: Bus, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with on(bus, monkeypatch, prefetch=2) as consumer:
        consumer.receive(0.0)
        ListFeed(records(3, keys=3)).drain(bus)
        first, second = consumer.receive(1.0), consumer.receive(1.0)
        assert consumer.receive(0.0) is None
        assert "no event has had its verdict" not in caplog.text  # they may still be worked on
        monkeypatch.setattr("virtbus.consumer._SILENT_SECONDS", 0.0)
        assert consumer.receive(0.0) is None
        assert "no event has had its verdict" in caplog.text
        assert first is not None
        assert second is not None
        first.ack()
        assert consumer.receive(1.0) is not None


# ------------------------------------------------------------------------------------- validation


def broken() -> Any:
    record = a_record()
    return record._replace(body=b'{"not": "an io_error"}')


def test_without_validation_data_is_handed_over_as_it_is(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    items, validated = [broken(), a_record()], []
    monkeypatch.setattr("virtbus.schema.validate", lambda *words: validated.append(words) or [])
    with on(bus, monkeypatch, validate=False) as consumer:
        consumer.receive(0.0)
        ListFeed(items).publish(bus)
        first, second = consumer.receive(1.0), consumer.receive(1.0)
    assert first is not None
    assert first.event is None
    assert first.data == {"not": "an io_error"}
    assert second is not None
    assert second.event is not None
    assert validated == []


def test_with_validation_each_event_is_validated_once(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    from virtbus import schema

    item, validate, validated = a_record(), schema.validate, []
    monkeypatch.setattr("virtbus.schema.validate", lambda *words: validated.append(words) or validate(*words))
    with on(bus, monkeypatch) as consumer:
        consumer.receive(0.0)
        ListFeed([item]).publish(bus)
        assert consumer.receive(1.0) is not None
    assert len(validated) == 1


# ------------------------------------------------------------------------------------- refusals


class Refusing(EmbeddedBus):
    """A broker that refuses whoever subscribes, until it is told better."""

    def __init__(self, folder: Path, error: Exception) -> None:
        super().__init__(f"embedded://{folder}/bus.db", options=BusOptions())
        self.error: Exception | None = error
        self.asked = 0

    def consume(self, group: str | None, **more: Any) -> Any:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return super().consume(group, **more)


def test_a_refused_log_in_is_ridden_out_like_an_absent_broker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = Refusing(tmp_path, BusDenied("access refused"))
    with on(bus, monkeypatch) as consumer:
        assert consumer.receive(0.2) is None
        bus.error = None
        assert consumer.receive(0.0) is None
        ListFeed([a_record()]).publish(bus)
        assert consumer.receive(5.0) is not None


@pytest.mark.parametrize("options", [{"give_up_when_denied": True}, {"patient": False}])
def test_a_refused_log_in_is_raised_for_who_asks_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, bool]
) -> None:
    with (
        on(Refusing(tmp_path, BusDenied("access refused")), monkeypatch, **options) as consumer,
        pytest.raises(BusDenied, match="access refused"),
    ):
        consumer.receive(0.2)


def test_a_member_that_was_replaced_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bus = Refusing(tmp_path, GroupTakenOver("a newer member took over"))
    with on(bus, monkeypatch) as consumer, pytest.raises(GroupTakenOver):
        consumer.receive(0.2)


def test_a_dead_letter_raises_nothing_that_a_broker_does(bus: Bus, monkeypatch: pytest.MonkeyPatch) -> None:
    with on(bus, monkeypatch) as consumer:
        consumer.receive(0.0)
        ListFeed([a_record()]).publish(bus)
        delivery = consumer.receive(1.0)
        assert delivery is not None

        def gone(message: Message, reason: str) -> None:
            raise BusUnavailable("gone")

        assert consumer._grip.subscription is not None
        monkeypatch.setattr(consumer._grip.subscription, "dead_letter", gone)
        delivery.dead_letter("no use")


# ------------------------------------------------------------------------------------- logging


def test_the_sdk_logs_under_virtbus_in_a_consumers_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bus = Refusing(tmp_path, BusUnavailable("connection refused"))
    with caplog.at_level(logging.INFO, logger="virtbus"), on(bus, monkeypatch) as consumer:
        consumer.receive(0.1)
    lines = [record for record in caplog.records if record.name == "virtbus"]
    assert any("delivered again" in line.getMessage() and line.levelname == "WARNING" for line in lines)
    assert not any("spool" in line.getMessage() for line in lines)


def test_the_sdk_writes_nothing_by_itself(tmp_path: Path) -> None:
    program = (
        "from virtbus import Consumer\n"
        f"c = Consumer('embedded://{tmp_path}/a-file/bus.db', group='g')\n"
        "c.receive(0.3); c.close()"
    )
    (tmp_path / "a-file").touch()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
