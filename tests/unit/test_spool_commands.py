"""What an operator sees of the spool and does to it, with and without a running agent."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner

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
AT_ONCE = ("--yes", "--timeout", "0")  # what an agent does is not waited for


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


def said(command, folder, *words):
    """What `virtbus spool COMMAND` prints; what it raises is raised here."""
    arguments = [command, *words, "--state-dir", str(folder)]
    done = CliRunner().invoke(commands.command, arguments, standalone_mode=False)
    if done.exception is not None:
        raise done.exception
    return done.stdout


def test_status_beside_a_running_agent_names_it_and_counts(filled, folder):
    data = json.loads(said("status", folder, "--json"))
    assert (data["pending"], data["dead"], data["unnamed"]) == (2, 1, 1)
    assert data["held_by"].startswith(f"{os.getpid()} (")
    assert data["runs"][-1]["last_sequence"] == 3
    text = said("status", folder)
    assert "waiting    2 events" in text
    assert "dead       1 events" in text


def test_status_of_a_stopped_spool_says_nobody_and_changes_nothing(filled, folder):
    filled.close()
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert "held by    nobody" in said("status", folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name in before} == before


def test_list_shows_the_oldest_first_and_says_what_it_left_out(filled, folder):
    text = said("list", folder, "--limit", "1")
    assert domain_uuid(2) in text
    assert "… and 1 more" in text
    lines = [json.loads(line) for line in said("list", folder, "--json").splitlines()]
    assert [(line["sequence"], line["kind"], line["count"]) for line in lines] == [
        (2, "opened", 7),
        (3, "opened", 1),
    ]


def test_list_of_dead_letters_says_why(filled, folder):
    assert "refused: too large" in said("list", folder, "--dead")


def test_show_prints_the_event_as_it_would_go_out(filled, folder):
    (record, _) = filled.take(10, NOBODY)
    event = json.loads(said("show", folder, record.id))
    assert event["id"] == record.id
    assert event["data"] == json.loads(record.body)


def test_show_of_an_unknown_event_says_where_to_look(filled, folder):
    with pytest.raises(InputMissing, match="virtbus spool list"):
        said("show", folder, "nonsense")


def test_a_folder_without_a_spool_is_one_clear_line(tmp_path):
    with pytest.raises(InputMissing, match=r"no spool in .*--state-dir"):
        said("status", tmp_path)


def test_a_damaged_spool_is_told_and_left_alone(folder):
    folder.mkdir()
    (folder / "spool.db").write_bytes(b"x" * 8192)
    with pytest.raises(SpoolCorrupt, match="next start"):
        said("status", folder)
    assert (folder / "spool.db").read_bytes() == b"x" * 8192


def test_drop_asks_and_does_nothing_without_a_yes(filled, folder):
    arguments = ["drop", "--state-dir", str(folder)]
    done = CliRunner().invoke(commands.command, arguments, input="n\n")
    assert f"Drop 2 waiting events of {folder} for good?" in done.stderr
    assert done.stdout == "nothing was dropped\n"
    assert filled.stats().pending == 2


def test_drop_without_an_agent_is_done_at_once_and_named_at_the_next_start(filled, folder, clock):
    filled.close()
    assert said("drop", folder, "--yes") == "2 events to be dropped: done\n"
    after = open_spool(folder, clock=clock)
    after.commit([gap()])
    found = gaps_of(records(after))
    after.close()
    assert after.opening.damage is None
    dropped = next(data for data in found if data["reason"] == "operator_dropped")
    assert ranges_of(dropped) == [(filled.epoch, 2, 3)]
    assert dropped["missing_occurrences"] == 8


def test_drop_beside_an_agent_is_done_by_the_agent(filled, folder, clock):
    assert "the agent does it" in said("drop", folder, "2", *AT_ONCE)
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
    assert said("retry", folder) == "1 events to be sent again: done\n"
    after = open_spool(folder, clock=clock)
    assert domain_uuid(1) in {record.key for record in records(after)}
    assert after.stats().dead == 0
    after.close()


def test_drop_of_dead_letters_leaves_the_waiting_events(filled, folder, clock):
    said("drop", folder, "--dead", *AT_ONCE)
    clock.pass_time(11)
    filled.alive(Moment.of(clock()))
    assert filled.stats().dead == 0
    assert {record.key for record in records(filled)} >= {domain_uuid(2), domain_uuid(3)}


def test_a_retry_waits_for_an_agent_that_does_nothing_only_so_long_and_leaves_it_the_wish(filled, folder):
    with pytest.raises(AgentUnavailable, match="1 of 1 events still wait for the agent"):
        said("retry", folder, "--timeout", "0.3")
    assert json.loads(said("status", folder, "--json"))["requests"] == 1


def test_an_agent_that_is_asked_for_much_does_it_all_at_its_next_sign_of_life(folder, clock):
    spool = open_spool(folder, clock=clock)
    spool.commit([io_error(number) for number in range(2500)])
    said("drop", folder, *AT_ONCE)
    clock.pass_time(11)
    spool.alive(Moment.of(clock()))
    assert spool.stats().pending == 0
    assert json.loads(said("status", folder, "--json"))["requests"] == 0
    spool.close()


def test_where_nothing_is_to_be_done_that_is_said_and_is_no_failure(filled, folder, clock):
    said("drop", folder, "--dead", *AT_ONCE)
    clock.pass_time(11)
    filled.alive(Moment.of(clock()))
    assert said("retry", folder) == "no dead letter was refused: nothing to send again\n"
    assert said("drop", folder, "--dead") == "no dead letters\n"


def test_an_event_that_was_named_and_is_not_there_is_a_failure(filled, folder):
    for number in ("99", "9" * 30, "²"):
        with pytest.raises(InputMissing, match="no such event"):
            said("retry", folder, number)


def test_a_spool_whose_pages_are_damaged_is_told(folder, clock):
    spool = open_spool(folder, clock=clock)
    spool.commit([io_error(number) for number in range(200)])
    spool.close()
    file = folder / "spool.db"
    whole = file.read_bytes()
    file.write_bytes(whole[: 4096 * 2] + b"\xff" * (len(whole) - 4096 * 3) + whole[-4096:])
    with pytest.raises(SpoolCorrupt, match="next start"):
        said("list", folder)


def test_an_empty_file_is_no_spool_and_is_told(folder):
    folder.mkdir()
    (folder / "spool.db").touch()
    with pytest.raises(SpoolCorrupt, match="next start"):
        said("status", folder)
