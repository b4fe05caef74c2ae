"""What a person sees on a terminal, and what a pipe, a log and a narrow or dumb terminal are spared."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from tests.agent.process import AgentProcess, on_a_terminal, virtbus
from tests.commandline import cli, commands_of
from tests.faults.spool_kit import io_error, open_spool
from virtbus import schema
from virtbus.commands.ask import table as status_table
from virtbus.commands.fleet import table
from virtbus.fleet import BackendHealth, Blame, FleetView, HostHealth
from virtbus.model import Refused
from virtbus.telemetry import configure

ESCAPE = "\x1b"
BAR = re.compile(r"\x1b\[\?25l(\w+)  \[[#-]+\] +(\d+)%")
LONG_NAME = "compute-0123456789-0123456789-0123456789.rack-17.example.org"


# ------------------------------------------------------------------------------------------- help


def everything(command: click.Command = cli, name: str = "virtbus") -> Iterator[tuple[str, click.Command]]:
    """(words, command) of every command and group."""
    yield name, command
    if isinstance(command, click.Group):
        for word, one in commands_of(command).items():
            yield from everything(one, f"{name} {word}")


def help_of(name: str, command: click.Command) -> str:
    with click.Context(command, info_name=name, terminal_width=80, max_content_width=100) as context:
        return command.get_help(context)


EVERYTHING = list(everything())
COMMANDS = pytest.mark.parametrize(("name", "command"), EVERYTHING, ids=[name for name, _ in EVERYTHING])


@COMMANDS
def test_a_help_text_fits_80_columns(name: str, command: click.Command) -> None:
    assert [line for line in help_of(name, command).splitlines() if len(line) > 80] == []


@COMMANDS
def test_a_help_text_has_examples_that_the_command_line_understands(
    name: str, command: click.Command
) -> None:
    lines = re.findall(r"^(?!Usage:).*(?:  |: )(virtbus .*)$", help_of(name, command), re.MULTILINE)
    assert lines, "no example"
    assert any(f"{name} " in f"{line} " for line in lines)
    for line in lines:
        for part in re.split(r" \| | > ", line):
            words = shlex.split(part)
            if words[0] != "virtbus":
                continue  # a file's name
            understood(cli, words[1:])


def understood(command: click.Command, words: list[str]) -> None:
    """Raise what click raises for words that it does not take."""
    while isinstance(command, click.Group) and not words[0].startswith("-"):
        command = commands_of(command)[words[0]]
        words = words[1:]
    command.make_context(command.name, words)


# ----------------------------------------------------------------------------------------- colour


@pytest.fixture
def doctor(tmp_path: Path) -> tuple[str, ...]:
    return ("doctor", "--bus", "embedded:", "--state-dir", str(tmp_path), "--libvirt", "replay:/dev/null")


def test_on_a_terminal_there_is_colour(doctor: tuple[str, ...]) -> None:
    code, shown = on_a_terminal(*doctor)
    assert code == 0
    assert f"{ESCAPE}[32mok  {ESCAPE}[0m schemas: " in shown
    assert f"{ESCAPE}[1mbroker connected" in shown  # a line of the log


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
def test_who_wants_no_colour_gets_none(doctor: tuple[str, ...], environment: dict[str, str]) -> None:
    code, shown = on_a_terminal(*doctor, **environment)
    assert code == 0
    assert "broker connected" in shown
    assert ESCAPE not in shown


def test_a_pipe_gets_no_colour(doctor: tuple[str, ...]) -> None:
    told = virtbus(*doctor, VIRTBUS_LOG__FORMAT="text")
    assert "broker connected" in told.stderr
    assert ESCAPE not in told.stdout + told.stderr


def test_a_dumb_terminal_is_not_wiped_by_the_live_table(tmp_path: Path) -> None:
    bus = f"embedded://{tmp_path}/bus.db"
    words = ("fleet", "--bus", bus, "--listen", "2")
    assert f"{ESCAPE}[2J" in on_a_terminal(*words)[1]
    assert ESCAPE not in on_a_terminal(*words, TERM="dumb")[1]


# ------------------------------------------------------------------------------------------- bars


@pytest.fixture
def listening(tmp_path: Path) -> tuple[str, ...]:
    return ("fleet", "--bus", f"embedded://{tmp_path}/bus.db", "--once", "--listen", "3")


def steps(shown: str, label: str) -> list[int]:
    """The per cents that a bar went through."""
    return [int(number) for name, number in BAR.findall(shown) if name == label]


def test_a_round_of_listening_shows_how_far_it_is_and_leaves_the_json_alone(
    listening: tuple[str, ...], tmp_path: Path
) -> None:
    with (tmp_path / "out").open("wb") as out:
        code, shown = on_a_terminal(*listening, "--json", stdout=out.fileno())
    assert code == 0
    assert {0, 33, 66} <= set(seen := steps(shown, "listening"))
    assert seen == sorted(seen)
    assert json.loads((tmp_path / "out").read_bytes())["hosts"] == {}


def test_a_dumb_terminal_gets_no_bar(listening: tuple[str, ...]) -> None:
    code, shown = on_a_terminal(*listening, TERM="dumb")
    assert code == 0
    assert "listening" not in shown
    assert ESCAPE not in shown


def test_a_bar_fits_a_narrow_terminal(listening: tuple[str, ...]) -> None:
    _, shown = on_a_terminal(*listening, columns=40, VIRTBUS_LOG__LEVEL="error")
    pictures = [line for line in re.split(r"[\r\n]", shown) if "listening " in line and "[" in line]
    assert pictures
    assert max(len(re.sub(r"\x1b\[\S+?[lhK]", "", line)) for line in pictures) <= 40


def fill_with_dead_letters(folder: Path, number: int) -> None:
    spool = open_spool(folder)
    for first in range(0, number, 500):
        spool.commit([io_error(each) for each in range(first, min(number, first + 500))])
        while taken := spool.take(500, frozenset()):
            spool.settle([(record, Refused(ValueError("too large"))) for record in taken])
    spool.close()


@pytest.fixture
def quiet_log() -> None:
    configure(level="error", stream=io.StringIO())


def test_a_retry_of_many_beside_an_agent_shows_how_far_the_agent_is(tmp_path: Path, quiet_log: None) -> None:
    fill_with_dead_letters(tmp_path / "state", 2500)
    with AgentProcess(tmp_path, libvirt="replay:/dev/null", bus="amqp://127.0.0.1:1//").ready() as agent:
        assert agent.status()["spool"]["dead"] == 2500
        code, shown = on_a_terminal("spool", "retry", "--state-dir", str(agent.state_dir))
        assert agent.status()["spool"]["dead"] == 0
    assert code == 0, shown
    assert steps(shown, "retry")[-1] == 100
    assert "2500 events to be sent again: done" in shown


def test_a_drop_of_many_without_an_agent_shows_how_far_it_is(tmp_path: Path, quiet_log: None) -> None:
    fill_with_dead_letters(tmp_path / "state", 2500)
    code, shown = on_a_terminal("spool", "drop", "--dead", "--yes", "--state-dir", str(tmp_path / "state"))
    assert code == 0, shown
    assert steps(shown, "drop") == [0, 40, 80, 100]


def test_a_replay_of_many_errors_shows_how_far_it_is_between_whole_events(tmp_path: Path) -> None:
    recording = tmp_path / "recording.jsonl"
    line = {"kind": "callback", "cb": "IO_ERROR_REASON", "id": 1, "srcPath": "/x", "devAlias": "virtio-disk0",
            "action": 2, "reason": "", "t": 1.0}  # fmt: skip
    recording.write_text("".join(json.dumps({**line, "name": f"guest-{n}"}) + "\n" for n in range(150)))
    code, shown = on_a_terminal("demo", "--recording", str(recording))
    assert code == 0, shown
    assert steps(shown, "replaying")[-1] == 100
    assert "replayed=150 delivered=150 lost=0" in shown
    # What stands on each line when the cursor leaves it.
    screen = [line.rpartition(f"{ESCAPE}[K")[2] for line in shown.split("\r\n")]
    assert screen.count("{") >= 150
    assert [line for line in screen if "replaying" in line and '"' in line] == []


def big_file_of_events(path: Path, number: int) -> None:
    data = dict(schema.load(schema.ENVELOPE)["examples"][0])
    data["padding"] = "x" * 4000
    path.write_text((json.dumps(data) + "\n") * number)


def test_a_check_of_a_large_file_shows_how_far_it_is_and_each_problem_on_a_line_of_its_own(
    tmp_path: Path,
) -> None:
    events = tmp_path / "events.jsonl"
    big_file_of_events(events, 4000)
    with events.open("a") as file:
        file.write('{"broken": 1}\n' * 3)
    big_file_of_events(tmp_path / "more", 500)
    code, shown = on_a_terminal("validate", str(events), str(tmp_path / "more"))
    assert code == 65
    assert steps(shown, "checking")[-1] >= 99
    assert "4503 checked, 3 invalid" in shown
    screen = [line.rpartition(f"{ESCAPE}[K")[2] for line in shown.split("\r\n")]
    told = [line for line in screen if line.startswith(f"{events}:")]
    assert {line.split(":")[1] for line in told} == {"4001", "4002", "4003"}


def test_a_small_file_is_checked_without_a_bar(tmp_path: Path) -> None:
    big_file_of_events(tmp_path / "events.jsonl", 2)
    assert on_a_terminal("validate", str(tmp_path / "events.jsonl")) == (0, "2 checked, 0 invalid\r\n")


# ----------------------------------------------------------------------------------------- tables


def too_wide(text: str) -> list[str]:
    """Lines of more than 80 columns; but a long word on its own line stays whole."""
    return [line for line in text.splitlines() if len(line) > 80 and " " in line.strip()]


def test_the_list_of_a_spool_fits_80_columns(tmp_path: Path, quiet_log: None) -> None:
    spool = open_spool(tmp_path)
    spool.commit([io_error(1), io_error(2, count=1_000_000)])
    (record,) = spool.take(1, frozenset())
    spool.settle([(record, Refused(ValueError("the broker says " + "that it is too large, " * 20)))])
    for dead in (False, True):
        shown = virtbus("spool", "list", *(["--dead"] if dead else []), "--state-dir", str(tmp_path)).stdout
        assert record.key in shown or not dead
        assert too_wide(shown) == []
    assert too_wide(virtbus("spool", "status", "--state-dir", str(tmp_path)).stdout) == []
    spool.close()


def test_the_list_of_schemas_fits_80_columns() -> None:
    shown = virtbus("schema", "list").stdout
    assert shown.count("\n") == len(schema.entries())
    assert too_wide(shown) == []


def test_the_status_of_an_agent_on_a_host_with_a_long_name_fits_80_columns() -> None:
    answer = {
        "agent_id": "f" * 36,
        "version": "1.2.3",
        "host": LONG_NAME,
        "started_at": "2026-01-01T00:00:00.000000+00:00",
        "source": {"state": "disconnected", "since": "2026-01-01T00:00:00.000000+00:00"},
        "bus": {"url": f"amqps://virtbus@{LONG_NAME}:5671//", "error": "connecting: " + "refused, " * 20},
        "spool": {"pending": 10**6, "bytes": 10**9, "oldest_seconds": 10**6, "parked_keys": 10**4,
                  "dead": 10**5, "committed_sequence": 10**12, "confirmed_sequence": 10**12},
        "incidents": {"open": 1000},
        "not_ready": ["source is disconnected", "spool: the disk is full: make room"],
    }  # fmt: skip
    assert too_wide(status_table(answer)) == []


def test_the_table_of_a_fleet_of_long_names_fits_80_columns() -> None:
    why = "because of this and that, " * 6
    host = HostHealth(LONG_NAME, "id", "observing", 1.0, Blame.UNDETERMINED, why, False, 1.0, 99_999, 99_999,
                      99_999, 1, 9999.9, ("a",), True)  # fmt: skip
    backend = BackendHealth(f"nfs://{LONG_NAME}/export", "nfs", Blame.UNDETERMINED, why, True, 1.0,
                            (LONG_NAME,), 99_999, 99_999, 1.0, ())  # fmt: skip
    view = FleetView((host,) * 1000, (backend,), 10_000, 10**6, 10**6, True)
    lines = table(view, rows=None, columns=80)
    assert [line for line in lines if len(line) > 80] == []
    assert (
        sum(line.startswith("compute-0123456789-0123456789-0… undetermined  observing") for line in lines)
        == 1000
    )
    assert sum(line.startswith("    because of this and that, ") for line in lines) == 1001
