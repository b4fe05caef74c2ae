"""What an operator sees of the spool and does to it, with and without a running agent."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path

import pytest

from tests.faults.spool_kit import (
    HandClock,
    domain_uuid,
    gap,
    gaps_of,
    io_error,
    open_spool,
    ranges_of,
    records,
)
from virtbus.commands import spool as commands
from virtbus.errors import AgentUnavailable, InputMissing, SpoolCorrupt
from virtbus.model import Refused
from virtbus.seen import Moment

NOBODY = frozenset()


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def clock():
    return HandClock()


@pytest.fixture
def filled(folder, clock):
    """A running agent's spool: one dead letter, two events that wait."""
    spool = open_spool(folder, clock=clock)
    spool.commit([io_error(1), io_error(2, count=7), io_error(3)])
    (first,) = spool.take(1, NOBODY)
    spool.settle([(first, Refused(ValueError("too large")))])
    yield spool
    spool.close()


def said(call, *args, **more):
    out = io.StringIO()
    call(*args, out, **more)
    return out.getvalue()


def test_status_beside_a_running_agent_names_it_and_counts(filled, folder):
    data = json.loads(said(commands.status, folder, as_json=True))
    assert (data["pending"], data["dead"], data["unnamed"]) == (2, 1, 1)
    assert data["held_by"].startswith(f"{os.getpid()} (")
    assert data["runs"][-1]["last_sequence"] == 3
    text = said(commands.status, folder)
    assert "waiting    2 events" in text
    assert "dead       1 events" in text


def test_status_of_a_stopped_spool_says_nobody_and_changes_nothing(filled, folder):
    filled.close()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "held by    nobody" in said(commands.status, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name in before} == before


def test_list_shows_the_oldest_first_and_says_what_it_left_out(filled, folder):
    text = said(commands.list_events, folder, limit=1)
    assert domain_uuid(2) in text
    assert "… and 1 more" in text
    lines = [json.loads(line) for line in said(commands.list_events, folder, as_json=True).splitlines()]
    assert [(line["sequence"], line["kind"], line["count"]) for line in lines] == [
        (2, "opened", 7),
        (3, "opened", 1),
    ]


def test_list_of_dead_letters_says_why(filled, folder):
    assert "refused: too large" in said(commands.list_events, folder, dead=True)


def test_show_prints_the_event_as_it_would_go_out(filled, folder):
    (record, _) = filled.take(10, NOBODY)
    out = io.StringIO()
    commands.show(folder, record.id, out)
    event = json.loads(out.getvalue())
    assert event["id"] == record.id
    assert event["data"] == json.loads(record.body)


def test_show_of_an_unknown_event_says_where_to_look(filled, folder):
    with pytest.raises(InputMissing, match="virtbus spool list"):
        commands.show(folder, "nonsense", io.StringIO())


def test_a_folder_without_a_spool_is_one_clear_line(tmp_path):
    with pytest.raises(InputMissing, match=r"no spool in .*--state-dir"):
        commands.status(tmp_path, io.StringIO())


def test_a_damaged_spool_is_told_and_left_alone(folder):
    folder.mkdir()
    (folder / "spool.db").write_bytes(b"x" * 8192)
    with pytest.raises(SpoolCorrupt, match="next start"):
        commands.status(folder, io.StringIO())
    assert (folder / "spool.db").read_bytes() == b"x" * 8192


def test_drop_asks_and_does_nothing_without_a_yes(filled, folder):
    asked: list[str] = []
    out = io.StringIO()
    commands.drop(folder, [], out, confirm=lambda question: bool(asked.append(question)))
    assert asked == [f"Drop 2 waiting events of {folder} for good?"]
    assert "nothing was dropped" in out.getvalue()


def test_drop_without_an_agent_is_done_at_once_and_named_at_the_next_start(filled, folder, clock):
    filled.close()
    out = io.StringIO()
    commands.drop(folder, [], out, confirm=lambda _: True)
    assert "2 events to be dropped: done" in out.getvalue()
    after = open_spool(folder, clock=clock)
    after.commit([gap()])
    found = gaps_of(records(after))
    after.close()
    assert after.opening.damage is None
    dropped = next(data for data in found if data["reason"] == "operator_dropped")
    assert ranges_of(dropped) == [(filled.epoch, 2, 3)]
    assert dropped["missing_occurrences"] == 8


def test_drop_beside_an_agent_is_done_by_the_agent(filled, folder, clock):
    out = io.StringIO()
    commands.drop(folder, ["2"], out, confirm=lambda _: True)
    assert "the agent does it" in out.getvalue()
    clock.pass_time(11)
    filled.alive(Moment.of(clock()))
    filled.commit(())
    found = records(filled)
    assert domain_uuid(2) not in {record.key for record in found}
    assert [ranges_of(data) for data in gaps_of(found) if data["reason"] == "operator_dropped"] == [
        [(filled.epoch, 2, 2)]
    ]


def test_retry_without_an_agent_sends_the_dead_letter_at_the_next_start(filled, folder, clock):
    filled.close()
    out = io.StringIO()
    commands.retry(folder, [], out)
    assert "1 events to be sent again: done" in out.getvalue()
    after = open_spool(folder, clock=clock)
    assert domain_uuid(1) in {record.key for record in records(after)}
    assert after.stats().dead == 0
    after.close()


def test_drop_of_dead_letters_leaves_the_waiting_events(filled, folder, clock):
    commands.drop(folder, [], io.StringIO(), dead=True, confirm=lambda _: True)
    clock.pass_time(11)
    filled.alive(Moment.of(clock()))
    assert filled.stats().dead == 0
    assert {record.key for record in records(filled)} >= {domain_uuid(2), domain_uuid(3)}


def test_a_retry_waits_for_an_agent_that_does_nothing_only_so_long_and_leaves_it_the_wish(filled, folder):
    with pytest.raises(AgentUnavailable, match="1 of 1 events still wait for the agent"):
        commands.retry(folder, [], io.StringIO(), patience=0.3)
    assert json.loads(said(commands.status, folder, as_json=True))["requests"] == 1


def test_an_agent_that_is_asked_for_much_does_it_all_at_its_next_sign_of_life(folder, clock):
    spool = open_spool(folder, clock=clock)
    spool.commit([io_error(number) for number in range(2500)])
    commands.drop(folder, [], io.StringIO(), confirm=lambda _: True)
    clock.pass_time(11)
    spool.alive(Moment.of(clock()))
    assert spool.stats().pending == 0
    assert json.loads(said(commands.status, folder, as_json=True))["requests"] == 0
    spool.close()


def test_where_nothing_is_to_be_done_that_is_said_and_is_no_failure(filled, folder, clock):
    commands.drop(folder, [], io.StringIO(), dead=True, confirm=lambda _: True)
    clock.pass_time(11)
    filled.alive(Moment.of(clock()))
    assert said(commands.retry, folder, []) == "no dead letter was refused: nothing to send again\n"
    assert said(commands.drop, folder, [], dead=True, confirm=pytest.fail) == "no dead letters\n"


def test_an_event_that_was_named_and_is_not_there_is_a_failure(filled, folder):
    for number in ("99", "9" * 30, "²"):
        with pytest.raises(InputMissing, match="no such event"):
            commands.retry(folder, [number], io.StringIO())


def test_a_spool_whose_pages_are_damaged_is_told(folder, clock):
    spool = open_spool(folder, clock=clock)
    spool.commit([io_error(number) for number in range(200)])
    spool.close()
    file = folder / "spool.db"
    whole = file.read_bytes()
    file.write_bytes(whole[: 4096 * 2] + b"\xff" * (len(whole) - 4096 * 3) + whole[-4096:])
    with pytest.raises(SpoolCorrupt, match="next start"):
        commands.list_events(folder, io.StringIO())


def test_an_empty_file_is_no_spool_and_is_told(folder):
    folder.mkdir()
    (folder / "spool.db").touch()
    with pytest.raises(SpoolCorrupt, match="next start"):
        commands.status(folder, io.StringIO())
