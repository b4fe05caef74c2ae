"""A dedupe file that can't be written for a while costs nothing but the wait."""

from __future__ import annotations

import os
import resource
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from virtbus.bus import BusOptions, open_bus
from virtbus.consumer import Consumer
from virtbus.errors import ConfigError, DedupeUnavailable
from virtbus.marks import Marks
from virtbus.testing import ListFeed, records


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "seen.db"


@pytest.fixture
def url(tmp_path: Path) -> str:
    """A bus with five events on it."""
    url = f"embedded://{tmp_path}/bus.db"
    bus = open_bus(url, BusOptions())
    with Consumer(url, group="g") as first:
        assert first.receive(0.0) is None
    ListFeed(records(5, keys=5)).drain(bus)
    bus.close()
    return url


@contextmanager
def consuming(url: str, file: Path) -> Iterator[Consumer]:
    with Consumer(url, group="g", dedupe=file, prefetch=1) as consumer:
        assert consumer._seen._database is not None
        consumer._seen._database.execute("PRAGMA busy_timeout = 50")
        yield consumer


@contextmanager
def locked(file: Path) -> Iterator[None]:
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    yield
    other.close()


@contextmanager
def full(file: Path) -> Iterator[None]:
    """No file of this process grows beyond the write-ahead log as it is: a commit finds no room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = file.with_name(f"{file.name}-wal").stat().st_size
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def left(url: str, file: Path) -> int:
    """How many of the five come to a consumer that starts now, those recognised not counted."""
    with Consumer(url, group="g", dedupe=file) as consumer:
        found = 0
        while (delivery := consumer.receive(0.3)) is not None:
            found += 1
            delivery.ack()
        return found


@pytest.mark.parametrize("trouble", [locked, full])
def test_an_ack_that_can_not_be_marked_stands_and_is_sent_when_it_can(url, file, trouble):
    with consuming(url, file) as consumer:
        delivery = consumer.receive(1.0)
        with (
            trouble(file),
            pytest.raises(DedupeUnavailable, match=rf"dedupe file {file} .*make room") as told,
        ):
            delivery.ack()
        assert told.value.retryable
        second = consumer.receive(1.0)  # with a prefetch of one it comes only when the first was acknowledged
        assert second is not None
        assert second.id != delivery.id
        second.ack()
    assert left(url, file) == 3


@pytest.mark.parametrize("trouble", [locked, full])
def test_while_no_mark_can_be_written_nothing_new_is_received(url, file, trouble):
    with consuming(url, file) as consumer:
        delivery = consumer.receive(1.0)
        with trouble(file):
            for call in (delivery.ack, lambda: consumer.receive(0.0), lambda: consumer.receive(0.0)):
                with pytest.raises(DedupeUnavailable):
                    call()
    assert left(url, file) == 4


def test_a_close_without_the_marks_says_so_and_lets_go_of_the_bus(url, file):
    consumer = Consumer(url, group="g", dedupe=file)
    consumer._seen._database.execute("PRAGMA busy_timeout = 50")
    delivery = consumer.receive(1.0)
    with locked(file):
        with pytest.raises(DedupeUnavailable):
            delivery.ack()
        with pytest.raises(DedupeUnavailable):
            consumer.close()
    assert left(url, file) == 5


def test_a_start_on_a_full_disk_can_be_tried_again(url: str, file: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        for _ in range(2):
            with pytest.raises(ConfigError, match="can't be used"):
                Consumer(url, group="g", dedupe=file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert left(url, file) == 5


@pytest.mark.parametrize("version", [0, 1])
def test_another_programs_database_is_refused_untouched(version: int, url: str, file: Path) -> None:
    with closing(sqlite3.connect(file)) as other:
        other.execute("CREATE TABLE theirs (x)")
        other.execute(f"PRAGMA user_version = {version}")
    file.chmod(0o644)
    before = file.read_bytes()
    with pytest.raises(ConfigError, match="another"):
        Consumer(url, group="g", dedupe=file)
    assert file.read_bytes() == before  # also the mode of its journal
    assert file.stat().st_mode & 0o777 == 0o644


def test_a_group_evicts_nobody_elses_marks(file: Path) -> None:
    mine = [("agent", str(number)) for number in range(50)]
    marks = Marks(file, "mine", 50)
    marks.write(mine)
    marks.close()
    other = Marks(file, "other", 10)
    other.write([("agent", str(number)) for number in range(30)])
    assert not other.has(("agent", "0"))  # its own oldest gave way
    assert other.has(("agent", "29"))
    other.close()
    marks = Marks(file, "mine", 50)
    assert all(marks.has(mark) for mark in mine)
    marks.close()


def test_a_path_that_is_no_file_is_refused_untouched(url: str, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o644)
    for path, told in (
        (pipe, "not a regular file"),
        (tmp_path, "not a regular file"),
        (tmp_path / "none" / "seen.db", f"no folder {tmp_path}/none; create it"),
    ):
        with pytest.raises(ConfigError, match=told):
            Consumer(url, group="g", dedupe=path)
    assert pipe.stat().st_mode & 0o777 == 0o644
    assert not (tmp_path / "pipe.lock").exists()


@pytest.mark.parametrize("replaced", [False, True], ids=["removed", "replaced"])
def test_a_file_that_is_taken_away_under_its_consumer_is_made_again(url, file, replaced):
    with Consumer(url, group="g", dedupe=file) as consumer:
        for number in range(4):
            delivery = consumer.receive(1.0)
            delivery.ack()
            if number == 1:
                for part in file.parent.glob(f"{file.name}*"):
                    part.unlink()
                if replaced:
                    file.touch()
    with closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as database:
        assert database.execute("SELECT count(*) FROM seen").fetchone() == (4,)
    assert left(url, file) == 1


def test_a_file_that_can_not_be_made_again_now_is_waited_for(url, file):
    with Consumer(url, group="g", dedupe=file) as consumer:
        delivery = consumer.receive(1.0)
        for part in file.parent.glob(f"{file.name}*"):
            part.unlink()
        file.mkdir()
        with pytest.raises(DedupeUnavailable, match="not a regular file"):
            delivery.ack()
        with pytest.raises(DedupeUnavailable):
            consumer.receive(0.0)
        file.rmdir()
        assert consumer.receive(1.0) is not None
    assert left(url, file) == 4


def test_a_damaged_file_is_told_as_such(url, file):
    with Consumer(url, group="g", dedupe=file) as consumer:
        consumer.receive(1.0).ack()
    with Consumer(url, group="g", dedupe=file) as consumer:
        with file.open("r+b") as pages:
            pages.seek(4 * 4096)
            pages.write(b"A" * 4096)
        consumer._seen._database.execute("PRAGMA shrink_memory")  # it reads from the file
        with pytest.raises(DedupeUnavailable, match="damaged: move it away"):
            consumer.receive(1.0)
        file.rename(file.with_name("damaged"))
        consumer.receive(3.0).ack()


@pytest.mark.parametrize("name", ["", "a\0b", "x" * 300, f"{'x' * 300}/seen.db"])
def test_what_can_not_be_a_files_name_is_refused_like_any_other_setting(url, tmp_path, name):
    with pytest.raises(ConfigError, match="dedupe file"):
        Consumer(url, group="g", dedupe=f"{tmp_path}/{name}" if name else name)
